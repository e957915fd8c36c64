"""A mixture of experts made from SmolLM2-135M, for the benchmarks that need a real one.

    python benchmarks/real_mixture.py MIXTURE --data FOLDER    # C4, see real_models.texts
    python benchmarks/real_mixture.py MIXTURE                  # prose that Python ships

Of each MLP the neurons that give most on all texts become the shared expert of a Qwen2-MoE; the others
are clustered into experts of equal size, by the tokens on which they are active together. Then, block
after block, on the hidden states that the blocks before it give:

1. The router learns by logistic regression which experts give most to a token.
2. The last matrices are fitted by ridge regression towards their dense values, so that shared expert
   and a token's experts together give what makes the hidden states those of the dense model: they take
   over what other experts did, and what earlier blocks miss.

With `--train` all weights are then trained on so many windows, with the dense model as teacher and the
loss that balances the experts' tokens, as mixtures are trained. A mixture that lies in the folder is
taken, not built anew. Prints
for each block how much of what all experts give (by squares) goes through those of a token, as the
router, the best choice and chance choose them, and the error of the hidden states; at the end held-out
perplexities.

Sources: clusters of neurons that are active together, Zhang et al., "MoEfication",
https://arxiv.org/abs/2110.01786; a shared expert of those that are active most, Pei et al., "CMoE",
https://arxiv.org/abs/2502.04416.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder for the mixture")
    parser.add_argument(
        "--data", type=Path, help="folder with WikiText-2 and C4, see real_models.py"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=4)
    parser.add_argument(
        "--shared", type=float, default=0.5, help="share of neurons that stay dense"
    )
    parser.add_argument("--windows", type=int, default=24, help="to fit on, of 512 tokens")
    parser.add_argument("--train", type=int, default=0, help="windows to train on afterwards")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the balancing loss")
    parser.add_argument(
        "--trained-out", type=Path, help="folder of the trained mixture (default: out)"
    )
    parser.add_argument("--held-out", type=int, default=8, help="windows to measure on")
    parser.add_argument("--blocks", type=int, help="stop after so many: to look at the errors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, machine, texts
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

import hf_sparse

_ROUNDS = 8
_CLUSTERED = 8192  # tokens
_RIDGE = 0.01  # of the mean of the Gram matrix's diagonal
_STEPS, _TOKENS, _RATE = 300, 2048, 0.01
# The spread of a token's scores: so small that its experts weigh almost the same.
_SPREAD = 0.1
# What trains: windows in a step, and the teacher's share of the loss.
_ACCUMULATE, _TAUGHT = 2, 0.8


@dataclass(frozen=True)
class Shape:
    """Of a mixture: experts, how many a token gets, neurons that all tokens get, and of each expert."""

    experts: int
    top_k: int
    common: int
    inner: int


def main(options: argparse.Namespace) -> None:
    """Build the mixture, save it, and print perplexities."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    print(machine(), f"seed {options.seed}", sep="; ", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = dense_smollm2(Path(temporary))
        dense = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration, held_out = texts(options.data)
    windows = hf_sparse.calibration_batches(
        tokenizer, calibration, num_samples=options.windows + options.train, window=512
    )
    measured = {
        name: hf_sparse.calibration_batches(
            tokenizer, told, num_samples=options.held_out, window=512
        )
        for name, told in held_out.items()
    }
    start = time.process_time()
    if (options.out / "config.json").exists():
        model = AutoModelForCausalLM.from_pretrained(options.out).eval()
    else:
        model = mixture_of(dense, windows[: options.windows], options)
        if options.blocks is not None:
            return
        model.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        tell("dense", dense, measured, 0.0)
        tell("mixture", model, measured, time.process_time() - start)
    if options.train:
        start = time.process_time()
        train_(model, dense, windows[options.windows :], options)
        model.save_pretrained(options.trained_out or options.out)
        tokenizer.save_pretrained(options.trained_out or options.out)
        tell("mixture, trained", model, measured, time.process_time() - start)


def tell(
    name: str, model: Any, measured: dict[str, list[dict[str, Tensor]]], seconds: float
) -> None:
    """Print perplexities."""
    found = {text: round(perplexity(model, windows), 2) for text, windows in measured.items()}
    print(f"{name}: {found}, {seconds:.0f} s of CPU until then", flush=True)


@torch.no_grad()
def perplexity(model: Any, windows: list[dict[str, Tensor]]) -> float:
    """Of the next token, over windows."""
    losses = [model(**window, labels=window["input_ids"]).loss.float() for window in windows]
    return float(torch.stack(losses).mean().exp())


@torch.no_grad()
def mixture_of(dense: Any, windows: list[dict[str, Tensor]], options: argparse.Namespace) -> Any:
    """The dense model, a Llama, as a mixture that is fitted block after block."""
    neurons = dense.config.intermediate_size
    common = int(neurons * options.shared)
    inner = (neurons - common) // options.experts
    shape = Shape(options.experts, options.top_k, common, inner)
    model = empty(dense, shape)
    ids = torch.cat([window["input_ids"] for window in windows])
    theirs = ours = dense.model.embed_tokens(ids)
    places = torch.arange(ids.shape[1])[None]
    angles = dense.model.rotary_emb(theirs[:1], places)
    pairs = list(zip(dense.model.layers, model.model.layers, strict=True))
    for number, (old, new) in enumerate(pairs[: options.blocks]):
        attended = after_attention(old, theirs, angles)
        theirs = attended + old.mlp(old.post_attention_layernorm(attended))
        residual = after_attention(new, ours, angles)
        inputs = new.post_attention_layernorm(residual).flatten(0, 1)
        wanted = (theirs - residual).flatten(0, 1)
        told, given = fit_(new.mlp, old.mlp, inputs, wanted, shape)
        ours = residual + given.view_as(residual)
        error = float((ours - theirs).square().sum() / theirs.square().sum())
        print(f"block {number}: {told}, error of the hidden states {error:.4f}", flush=True)
    return model


def empty(dense: Any, shape: Shape) -> Any:
    """A Qwen2-MoE with the embeddings, attention, norms and head of the dense model."""
    known = dense.config.to_dict()
    for name in ("model_type", "architectures", "attention_bias", "mlp_bias", "head_dim"):
        known.pop(name, None)
    config = Qwen2MoeConfig(
        **known,
        moe_intermediate_size=shape.inner,
        shared_expert_intermediate_size=shape.common,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        qkv_bias=False,
    )
    model = Qwen2MoeForCausalLM(config).eval()
    given = dense.state_dict()
    own = model.state_dict()
    model.load_state_dict({n: given.get(n, torch.zeros_like(v)) for n, v in own.items()})
    return model


def after_attention(block: Any, hidden: Tensor, angles: Any) -> Tensor:
    """The hidden states between attention and MLP, `(windows, tokens, hidden)`."""
    parts = []
    for own in hidden.split(8):
        turned = tuple(angle.expand(len(own), -1, -1) for angle in angles)
        entered = block.input_layernorm(own)
        parts.append(
            own + block.self_attn(entered, position_embeddings=turned, attention_mask=None)[0]
        )
    return torch.cat(parts)


def fit_(new: Any, old: Any, inputs: Tensor, wanted: Tensor, shape: Shape) -> tuple[str, Tensor]:
    """Give a block of experts the neurons of an MLP, and fit router and last matrices.

    Args:
        new: the block, whose values do not matter.
        old: the MLP.
        inputs: that the block gets, `(tokens, hidden)`.
        wanted: what it is to give, `(tokens, hidden)`.
        shape: of the mixture.

    Returns:
        What to print, and what the block gives now.
    """
    down = old.down_proj.weight
    inner = old.act_fn(old.gate_proj(inputs)) * old.up_proj(inputs)
    activity = inner.abs() * down.norm(dim=0)
    order = activity.square().mean(dim=0).argsort(descending=True)
    common, others = order[: shape.common].sort().values, order[shape.common :].sort().values
    clusters = alike(activity[:_CLUSTERED, others].T, shape.experts)
    groups = [others[own] for own in clusters]
    sizes = torch.stack([(inner[:, own] @ down[:, own].T).square().sum(dim=1) for own in groups], 1)
    router = fitted_router(inputs, sizes, shape.top_k)
    top, chosen = (inputs @ router.T).topk(shape.top_k, dim=1)
    shares = torch.zeros_like(sizes).scatter(1, chosen, shape.top_k * top.softmax(dim=1))
    neurons = torch.cat([common, *groups])
    asked = inner[:, neurons]
    routed = shares.repeat_interleave(shape.inner, dim=1)
    asked[:, shape.common :] *= routed
    gram = asked.T @ asked
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    before = down[:, neurons]
    last = before + torch.linalg.solve(gram, asked.T @ (wanted - asked @ before.T)).T
    # The gate of the shared expert is 0, whose sigmoid is a half; a token's experts weigh 1 / top_k.
    new.shared_expert.gate_proj.weight.copy_(old.gate_proj.weight[common])
    new.shared_expert.up_proj.weight.copy_(old.up_proj.weight[common])
    new.shared_expert.down_proj.weight.copy_(2 * last[:, : shape.common])
    for expert, own in enumerate(groups):
        first = torch.cat([old.gate_proj.weight[own], old.up_proj.weight[own]])
        new.experts.gate_up_proj[expert].copy_(first)
    parts = last[:, shape.common :].split(shape.inner, dim=1)
    new.experts.down_proj.copy_(shape.top_k * torch.stack(parts))
    new.gate.weight.copy_(router)
    through = [float(sizes.gather(1, c).sum() / sizes.sum()) for c in (chosen, best(sizes, shape))]
    told = f"through the router {through[0]:.3f}, at best {through[1]:.3f}"
    return f"{told}, by chance {shape.top_k / shape.experts:.3f}", asked @ last.T


def best(sizes: Tensor, shape: Shape) -> Tensor:
    """The experts that give most, `(tokens, top_k)`."""
    return sizes.topk(shape.top_k, dim=1).indices


def alike(rows: Tensor, count: int) -> list[Tensor]:
    """Groups of equal size of rows that point the same way: balanced k-means, the farthest first."""
    units = functional.normalize(rows, dim=1)
    generator = torch.Generator().manual_seed(0)
    first = [int(torch.randint(len(units), (1,), generator=generator))]
    while len(first) < count:
        first.append(int((units @ units[first].T).max(dim=1).values.argmin()))
    centres, room = units[first], len(units) // count
    for _ in range(_ROUNDS):
        groups: list[list[int]] = [[] for _ in range(count)]
        placed = set()
        for flat in (units @ centres.T).flatten().argsort(descending=True).tolist():
            row, group = divmod(flat, count)
            if len(groups[group]) < room and row not in placed:
                groups[group].append(row)
                placed.add(row)
        chosen = [torch.tensor(sorted(group)) for group in groups]
        centres = functional.normalize(
            torch.stack([units[own].mean(dim=0) for own in chosen]), dim=1
        )
    return chosen


@torch.enable_grad()
def fitted_router(inputs: Tensor, sizes: Tensor, top_k: int) -> Tensor:
    """Learn which experts give most: `(experts, hidden)`.

    Logistic regression, an expert and a token weighted by how far the expert is from the border between
    those that should be chosen and the others.

    Args:
        inputs: `(tokens, hidden)`.
        sizes: squares of what each expert gives, `(tokens, experts)`.
        top_k: experts that a token gets.
    """
    wanted = torch.zeros_like(sizes).scatter(1, sizes.topk(top_k, dim=1).indices, 1.0)
    border = sizes.topk(top_k + 1, dim=1).values[:, top_k - 1 :].mean(dim=1, keepdim=True)
    matters = (sizes - border).abs() / sizes.mean()
    weight = torch.zeros(sizes.shape[1], inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=_RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, _STEPS)
    for _ in range(_STEPS):
        rows = torch.randint(len(inputs), (_TOKENS,))
        losses = functional.binary_cross_entropy_with_logits(
            inputs[rows] @ weight.T, wanted[rows], reduction="none"
        )
        optimizer.zero_grad()
        (losses * matters[rows]).mean().backward()
        optimizer.step()
        rates.step()
    found = weight.detach()
    return found * (_SPREAD / (inputs @ found.T).std(dim=1).mean())


def train_(
    model: Any, dense: Any, windows: list[dict[str, Tensor]], options: argparse.Namespace
) -> None:
    """Train all weights on windows, once, with the dense model as teacher."""
    model.router_aux_loss_coef = options.balance / (1 - _TAUGHT)  # of the whole loss
    model.config.output_router_logits = True
    taught = hf_sparse.Distillation(dense, logits=_TAUGHT, temperature=1.0).attach(model.train())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.0
    )
    steps = len(windows) // _ACCUMULATE
    rates = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.lr, total_steps=steps, pct_start=0.1
    )
    order = torch.randperm(len(windows)).tolist()
    for step in range(steps):
        total = 0.0
        for number in order[step * _ACCUMULATE : (step + 1) * _ACCUMULATE]:
            window = windows[number]
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**window, labels=window["input_ids"]).loss / _ACCUMULATE
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        print(f"step {step + 1} of {steps}: loss {total:.3f}", flush=True)
    taught.remove()
    model.config.output_router_logits = False
    model.eval()


if __name__ == "__main__":
    main(options)
