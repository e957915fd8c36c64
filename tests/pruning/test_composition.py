"""What is combined with the methods: allocation, reconstruction, whole networks, learned masks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_sparse import SparsityConfig, prune_
from hf_sparse.calibration.input_statistics import Grams, Norms
from hf_sparse.calibration.walk import Residence, walk
from hf_sparse.calibration.windows import fingerprint
from hf_sparse.pruning import proxsparse, sparsellm
from hf_sparse.pruning.allocation import block_sparsities, tail_exponent
from hf_sparse.pruning.feed_forward import find_feed_forward
from hf_sparse.pruning.methods import METHODS
from hf_sparse.structure.layers import find_stacks, layers_in, target_layers
from tests.support.closeness import nearly_same, same
from tests.support.layer_error import layer_error
from tests.support.tiny_models import tiny_batches, tiny_model

HALF = SparsityConfig("unstructured", 0.5)
NETWORKS = {"llama": True, "gpt2": True, "opt": True, "bert": True, "gpt_neox": True, "t5": False}


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
def test_allocations_keep_the_mean(allocation: str) -> None:
    sizes = [100, 400, 250]
    found = block_sparsities([0.1, 0.5, 0.2], sizes, 0.6, allocation)
    mean = sum(s * n for s, n in zip(found, sizes, strict=True)) / sum(sizes)
    assert mean == pytest.approx(0.6, abs=1e-9)
    assert found[0] > found[2] > found[1]  # a higher score gets fewer zeros
    width = 0.16 if allocation == "owl" else 0.36
    assert found[0] - found[1] == pytest.approx(width)
    assert block_sparsities([1.0, 1.0], [5, 5], 0.6, allocation) == [0.6, 0.6]
    extreme = block_sparsities([0.0, 1.0], [10, 10], 0.98, allocation)
    assert max(extreme) <= 0.99
    assert sum(extreme) / 2 == pytest.approx(0.98)


@pytest.mark.parametrize("allocation", ["owl", "alpha"])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_blocks_get_different_sparsities_and_the_model_the_promised_one(
    allocation: str, method: str
) -> None:
    model = tiny_model("llama")
    report = prune_(model, HALF, method, tiny_batches("llama"), allocation=allocation)
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    shares = {round(tensor.sparsity, 2) for tensor in report.tensors}
    assert len(shares) == 3  # one for each block
    with pytest.raises(ValueError, match="fixes the sparsity of every block"):
        prune_(model, SparsityConfig("2:4"), method, tiny_batches("llama"), allocation=allocation)


def test_heavier_tails_have_smaller_exponents() -> None:
    model = tiny_model("llama")
    layers = target_layers(model)[:1]
    before = tail_exponent(layers)
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layers[0].weight, full_matrices=False)
        layers[0].weight.copy_(u @ torch.diag(s**3) @ v)
    assert tail_exponent(layers) > before  # the score is the exponent, negated


@pytest.mark.few(1)
@pytest.mark.parametrize("method", [m for m in METHODS if not METHODS[m].nm_only])
def test_reconstruction_lowers_the_error_and_keeps_the_zeros(method: str) -> None:
    batches = tiny_batches("gpt2", count=4)
    plain, trained = tiny_model("gpt2"), tiny_model("gpt2")
    prune_(plain, HALF, method, batches)
    report = prune_(trained, HALF, method, batches, reconstruct=3)
    assert report.sparsity == 0.5
    assert report.options["reconstruct"] == 3
    (note,) = [note for note in report.notes if "reconstructed" in note]
    before, after = (float(word.rstrip(".")) for word in note.split() if word[:2] == "0.")
    assert after < before
    first = [target_layers(model)[0].weight for model in (plain, trained)]
    assert torch.equal(first[0] == 0, first[1] == 0)
    assert not torch.equal(first[0], first[1])


def test_reconstruction_of_a_16_bit_model() -> None:
    model = tiny_model("llama").bfloat16()
    report = prune_(model, HALF, "wanda", tiny_batches("llama"), reconstruct=2)
    assert report.sparsity == 0.5
    assert model.dtype == torch.bfloat16


def test_reconstruction_leaves_requires_grad_as_it_was() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    prune_(model, HALF, "wanda", tiny_batches("llama"), reconstruct=1)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert [name for name, flag in flags.items() if not flag] == ["model.embed_tokens.weight"]
    assert all(parameter.grad is None for parameter in model.parameters())


@torch.no_grad()
def test_statistics_are_shared_and_stopping_early_loses_nothing() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    layers = target_layers(model)
    for step in walk(model, find_stacks(model), batches, Residence()):
        inside = layers_in(step.block, layers)
        found = []
        for kind, stop in ((Grams, True), (Grams, False), (Norms, True)):
            statistics = kind()
            with statistics.collecting(inside, stop=stop):
                step.run(statistics)
            found.append(statistics.groups())
        names = [[layer.name.split(".")[-1] for layer in seen.layers] for seen in found[0]]
        assert names == [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ]
        for early, late, norms in zip(*found, strict=True):
            assert same(early.statistic, late.statistic)
            assert early.tokens == late.tokens == norms.tokens
            torch.testing.assert_close(
                norms.statistic.float(), early.statistic.diagonal().sqrt(), rtol=1e-4, atol=1e-4
            )


class Experts(nn.Module):
    """A block of which only one branch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.used(hidden_states)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList([Experts(), Experts()])

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "sparsellm"])
def test_layers_without_inputs_are_pruned_by_magnitude_and_told(method: str) -> None:
    model = Branches()
    report = prune_(model, HALF, method, [torch.arange(16)[None]])
    assert report.sparsity == 0.5
    assert any(
        note == "layers.0.idle and 1 more saw no calibration token and was pruned by magnitude."
        for note in report.notes
    )


@pytest.mark.parametrize("family", NETWORKS)
def test_feed_forward_networks_are_found(family: str) -> None:
    model = tiny_model(family)
    layers = target_layers(model)
    block = find_stacks(model)[0].blocks[0]
    network = find_feed_forward(block, layers_in(block, layers))
    assert (network is not None) == NETWORKS[family]
    if network is not None:
        assert (network.gate is not None) == (family == "llama")
        assert network.up.weight.shape == network.down.weight.T.shape
        assert find_feed_forward(block, [network.up]) is None


def network_error(model: nn.Module, dense: nn.Module, seed: int = 0) -> float:
    """The error of the first feed-forward network on inputs of the size that it sees."""
    torch.manual_seed(seed)
    inputs = torch.randn(64, 32)
    with torch.no_grad():
        found, wanted = (m.model.layers[0].mlp(inputs) for m in (model, dense))
    return float((found - wanted).square().sum())


@pytest.mark.few(1)
@pytest.mark.parametrize("sparsity", [0.5, 0.8])
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_sparsellm_is_never_worse_than_its_round_0(family: str, sparsity: float) -> None:
    """The error of the block's output, measured apart from the code that keeps the best round."""
    config, batches = SparsityConfig("unstructured", sparsity), tiny_batches(family, count=4)
    dense = tiny_model(family)
    errors = []
    for rounds in (0, 3):
        model = tiny_model(family)
        prune_(model, config, "sparsellm", batches, rounds=rounds)
        block, original = (find_stacks(m)[0].blocks[0] for m in (model, dense))
        network, wanted = (
            find_feed_forward(b, layers_in(b, target_layers(m)))
            for b, m in ((block, model), (original, dense))
        )
        entered: list[torch.Tensor] = []
        network.up.module.register_forward_pre_hook(lambda _, args, e=entered: e.append(args[0]))
        with torch.no_grad():
            for batch in batches:
                model(**batch)
            errors.append(
                sum(
                    float(
                        (n[0].down.module(n[0].inner(x)) - n[1].down.module(n[1].inner(x))).norm()
                    )
                    ** 2
                    for x in entered[: len(batches)]
                    for n in [(network, wanted)]
                )
            )
    assert errors[1] <= errors[0] * (1 + 1e-5)
    assert errors[1] < errors[0] or sparsity == 0.5


def test_the_update_of_a_relu_is_the_exact_minimiser() -> None:
    layer, p = torch.randn(200), torch.randn(200)
    found = sparsellm._fitted(nn.ReLU(), layer, p)
    grid = torch.linspace(-6, 6, 24001)[:, None]
    lost = (grid - layer).square() + (p - grid.clamp_min(0)).square()
    value = (found - layer).square() + (p - found.clamp_min(0)).square()
    assert (value <= lost.min(dim=0).values + 1e-6).all()


def test_the_update_of_a_smooth_activation_lowers_its_objective() -> None:
    act, layer, p, factor = nn.SiLU(), torch.randn(200), torch.randn(200), torch.randn(200)

    def value(x: torch.Tensor) -> torch.Tensor:
        return ((x - layer).square() + (p - act(x) * factor).square()).sum()

    assert value(sparsellm._fitted(act, layer, p, factor=factor)) < value(layer)


@pytest.mark.slow
def test_proxsparse_learns_masks_and_keeps_weights() -> None:
    model = tiny_model("llama")
    dense = copy.deepcopy(model)
    report = prune_(
        model,
        SparsityConfig("2:4"),
        "proxsparse",
        tiny_batches("llama", count=8),
        lam=0.6,
        epochs=10,
    )
    assert report.violations == 0
    for layer, given in zip(target_layers(model), target_layers(dense), strict=True):
        kept = layer.weight != 0
        assert torch.equal(layer.weight[kept], given.weight[kept])
    (note,) = [note for note in report.notes if "before the final mask" in note]
    assert float(note.split("2: ")[1].split("%")[0]) > 50  # most groups had found their zeros
    untouched = prune_(copy.deepcopy(dense), SparsityConfig("2:4"), "magnitude")
    assert report.zeros == untouched.zeros


def interrupt_at(monkeypatch: pytest.MonkeyPatch, call: int) -> list[object]:
    """Let the loss of ProxSparse raise at one call; returns the list that counts them."""
    real, calls = proxsparse.loss_of, []

    def breaking(*args: object) -> torch.Tensor:
        calls.append(args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(proxsparse, "loss_of", breaking)
    return calls


@pytest.mark.few(1)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_proxsparse_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(proxsparse, "_SAVE_EVERY", 2)
    config, batches = SparsityConfig("2:4"), tiny_batches("llama", count=4)
    options = {"epochs": 6, "accumulate": 2, "gradient_checkpointing": checkpointing, "lam": 0.05}
    whole, stopped = tiny_model("llama"), tiny_model("llama")
    prune_(whole, config, "proxsparse", batches, **options)
    calls = interrupt_at(monkeypatch, 11)
    with pytest.raises(KeyboardInterrupt):
        prune_(stopped, config, "proxsparse", batches, state=str(tmp_path), **options)
    fresh = tiny_model("llama")
    prune_(fresh, config, "proxsparse", batches, state=str(tmp_path), **options)
    assert len(calls) - 11 == (12 - 4) * 2  # the four steps that were saved are not taken again
    for layer, other in zip(target_layers(fresh), target_layers(whole), strict=True):
        assert torch.equal(layer.weight, other.weight)
    with pytest.raises(ValueError, match="the state of another run"):
        prune_(
            tiny_model("llama"),
            config,
            "proxsparse",
            batches,
            state=str(tmp_path),
            **options,
            preserve=1.0,
        )


def test_the_preserving_term_has_the_gradient_of_its_formula() -> None:
    weight = torch.randn(50, dtype=torch.float64, requires_grad=True)
    original = torch.randn(50, dtype=torch.float64)
    ((weight * (weight - original) / original) ** 2 / 2 / 0.3**2).sum().backward()
    found = proxsparse._preserving_gradient(weight.detach(), original, 0.3)
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-4)


def test_bad_compositions_are_refused_before_anything_changes() -> None:
    model, batches = tiny_model("llama"), tiny_batches("llama")
    before = copy.deepcopy(model.state_dict())
    for options, message in (
        ({"allocation": "best"}, "allocation is 'best'"),
        ({"refine": "more"}, "refine is 'more'"),
        ({"reconstruct": -1}, "reconstruct is -1"),
        ({"reconstruct": 0.5}, "reconstruct is 0.5"),
        ({"scope": "global"}, "has no option scope"),
        ({"reconstruct": True}, "reconstruct is True"),
    ):
        with pytest.raises(ValueError, match=message):
            prune_(model, HALF, "wanda", batches, **options)
    with pytest.raises(ValueError, match="exchanges single weights"):
        prune_(model, SparsityConfig("row", 0.5), "wanda", batches, refine="swaps")
    with pytest.raises(ValueError, match="Use one of them"):
        prune_(model, HALF, "magnitude", batches, scope="global", allocation="owl")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_activations_that_are_not_finite_name_block_and_layer() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.mul_(1e30)
    with pytest.raises(
        ValueError, match=r"inputs of model\.layers\.1\.mlp\.down_proj are not finite"
    ):
        prune_(model, HALF, "sparsegpt", tiny_batches("llama"))


def test_fingerprints_tell_batches_apart() -> None:
    one, other = tiny_batches("llama"), tiny_batches("llama")
    assert fingerprint(one) == fingerprint(other)
    other[0]["input_ids"][0, 0] += 1
    assert fingerprint(one) != fingerprint(other)


def test_layer_error_is_relative() -> None:
    weight, gram = torch.randn(4, 6), torch.eye(6)
    assert layer_error(weight, torch.zeros_like(weight), gram) == pytest.approx(1.0)
    assert layer_error(weight, weight, gram) == 0.0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sparsegpt", {"damping": "0.01"}),
        ("sparsegpt", {"damping": float("nan")}),
        ("sparsegpt", {"block_size": 2.5}),
        ("alps", {"iterations": True}),
        ("sparsellm", {"rounds": 1.5}),
        ("sparsellm", {"solver": "wanda"}),
        ("proxsparse", {"lam": float("inf")}),
        ("proxsparse", {"state": 5}),
    ],
)
def test_values_of_the_wrong_kind_are_refused(method: str, options: dict[str, object]) -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is "):
        prune_(model, SparsityConfig("2:4"), method, tiny_batches("llama"), **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.rand(2, 4)}, "input_ids are torch.float32"),
        ({"input_ids": torch.full((2, 4), 999)}, "the model has 256 tokens"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"of shape \(2, 0\)"),
        ({"attention_mask": torch.ones(2, 3)}, "attention_mask has shape"),
    ],
)
def test_bad_batches_are_named(change: dict[str, torch.Tensor], message: str) -> None:
    batch = {"input_ids": torch.zeros(2, 4, dtype=torch.long), **change}
    with pytest.raises(ValueError, match=message):
        prune_(tiny_model("llama"), HALF, "sparsegpt", [batch])


@pytest.mark.parametrize("failure", ["one token", "interrupt"])
def test_proxsparse_gives_the_weights_back_when_it_fails(
    failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = tiny_model("llama"), list(tiny_batches("llama"))
    before = copy.deepcopy(model.state_dict())
    error: type[BaseException] = ValueError
    if failure == "one token":
        batches.append({"input_ids": torch.tensor([[5]])})
    else:
        interrupt_at(monkeypatch, 3)
        error = KeyboardInterrupt
    with pytest.raises(error):
        prune_(model, SparsityConfig("2:4"), "proxsparse", batches, accumulate=1)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.few(2)
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_are_zero_already_are_no_error(method: str) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in layers_in(model.model.layers[1], target_layers(model)):
            layer.weight.zero_()
    report = prune_(model, SparsityConfig("2:4"), method, tiny_batches("llama"))
    assert report.violations == 0


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "sparsellm"])
def test_the_order_of_the_batches_makes_no_difference(method: str) -> None:
    batches = tiny_batches("llama", count=5)
    one, other = tiny_model("llama"), tiny_model("llama")
    prune_(one, HALF, method, batches)
    prune_(other, HALF, method, batches[::-1])
    for first, second in zip(target_layers(one), target_layers(other), strict=True):
        assert nearly_same((first.weight == 0).float(), (second.weight == 0).float(), share=0.9)
