"""Plain smaller models of SmolLM2-135M: by depth, by width, by both, by slim_, by two papers' rules.

    python benchmarks/slim.py --data FOLDER    # WikiText-2 and C4, see real_models.texts
    python benchmarks/slim.py                  # prose that Python ships
    python benchmarks/slim.py --table          # the results so far as Markdown
    python benchmarks/slim.py --latency        # times of what --work holds; wants a quiet machine

12.5, 25 and 37.5 % of the blocks' weights go. `plan_slim` is called once for each size: "depth",
"width" and "both" are the best of its mixes that take no heads and neurons, no blocks, or half as many
blocks as depth alone; "slim" is the best of all. Where the CPU multiplies bfloat16, the search looks at
the model in it, and perplexities are of models in it; what is left is cut from the float32 weights, and
trained in float32. Baselines, from the papers' formulas:

ShortGPT (https://arxiv.org/abs/2403.03853): the blocks of least influence 1 - E[cos(x_i, x_{i+1})] go,
as many as depth takes. 2SSP (https://arxiv.org/abs/2501.17771, equation 5, which the authors' code,
github.com/FabrizioSandri/2SSP at 88ab660, writes the same): of B blocks
round(B * sparsity^((|FFN| / |attention|) / 1.5)) lose their attention, one after another, without which
the perplexity of one sample is lowest; before that the neurons of least mean L2 norm over each
sample's tokens go, as many in each block as the rest of the weights asks for. Theirs are samples of
2,048 tokens; all rows here look at the same, shorter ones, `--calibration` windows. No config of
transformers tells a block without attention: 2SSP's models are made anew in memory.

Then each is trained on `--tokens` with the whole model as teacher. Results go into a file of JSON
lines; cells that it has are skipped, so that a run can be stopped and started again. Every cell runs in
a process of its own. Models are kept in `--work`.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cells import Keyed, add_flags, append, chosen, measured, read, table

if __name__ == "__main__":  # help and wrong usage need no slow import
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_flags(parser, "slim 0.25 healed", "bench_output/slim.jsonl")
    parser.add_argument("--work", type=Path, default=Path("bench_output/slim"))
    parser.add_argument("--latency", action="store_true", help="times; nothing else is done")
    parser.add_argument("--tokens", type=int, default=131_072, help="to train on")
    parser.add_argument("--calibration", type=int, default=8, help="windows that are looked at")
    parser.add_argument("--repeats", type=int, default=20, help="calls that are timed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()

import torch
from real_models import dense_smollm2, faster, machine, texts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import hf_sparse
from hf_sparse.calibration.block_scores import mean_loss
from hf_sparse.slimming.plan import SlimChoice, SlimPlan
from hf_sparse.structure.depth import Depth

WINDOW = 512
SHARES = (0.125, 0.25, 0.375)
OURS = ("slim", "depth", "width", "both")
ALPHA = 1.5


@dataclass(frozen=True)
class Cell(Keyed):
    """One line of the table."""

    method: str
    share: float = 0.0
    healed: bool = False

    @property
    def name(self) -> str:
        """What `--only` takes."""
        return " ".join(filter(None, [self.method, f"{self.share:g}", "healed" * self.healed]))


def cells() -> Iterator[Cell]:
    """All cells: those that need no training first."""
    yield Cell("dense")
    for healed in (False, True):
        for share in SHARES:
            for method in (*OURS, "shortgpt", "2ssp"):
                yield Cell(method, share, healed)


def main(options: argparse.Namespace) -> None:
    """Fill the table, print it, or with --cell measure one line in this process."""
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.latency:
        print_latency(options)
        return
    table(Cell, options, machine(), measure=measure, fill=fill, show=print_table)


def fill(options: argparse.Namespace) -> None:
    """Measure the cells that are missing; what another cell has measured of the same model is taken."""
    known = chosen(cells(), options.only)
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "dense" / "config.json").exists():
        dense_smollm2(options.work / "dense")
    for number, cell in enumerate(known, 1):
        rows = read(options.out)
        if any(Cell(**row["cell"]).key == cell.key for row in rows):
            continue
        print(f"{number} of {len(known)}: {cell.name}", flush=True)
        if cell.method in OURS:
            make_ours(cell.share, options)
        same = next((row for row in rows if is_same(cell, row, options)), None)
        if same is None:
            same = measured(cell)
        append(options.out, {**same, "cell": asdict(cell)})


def is_same(cell: Cell, row: dict[str, Any], options: argparse.Namespace) -> bool:
    """Whether a row is about the model that a cell of ours is about."""
    other = Cell(**row["cell"])
    if cell.method not in OURS or other.method not in OURS or other.healed != cell.healed:
        return False
    return folder_of(cell, options) == folder_of(other, options)


def dense(options: argparse.Namespace) -> Any:
    """The whole model."""
    return AutoModelForCausalLM.from_pretrained(options.work / "dense", dtype=torch.float32).eval()


def windows(options: argparse.Namespace, number: int, window: int) -> list[dict[str, Any]]:
    """Calibration data."""
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    documents = texts(options.data)[0]
    return hf_sparse.calibration_batches(tokenizer, documents, num_samples=number, window=window)


def block_weights(model: Any) -> int:
    """The weights in the blocks."""
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


def make_ours(share: float, options: argparse.Namespace) -> None:
    """Search the mixes for a size, and save the models of the best ones."""
    told = options.work / f"plan-{share:g}.json"
    if told.exists():
        return
    model = dense(options)
    limit = model.num_parameters() - round(share * block_weights(model))
    start = time.process_time()
    single = windows(options, options.calibration, WINDOW)
    halves = [single[: len(single) // 2], single[len(single) // 2 :]]
    inputs = [{name: torch.cat([one[name] for one in half]) for name in half[0]} for half in halves]
    plan = hf_sparse.plan_slim(copy.deepcopy(model).to(faster()), inputs, params=limit)
    seconds = time.process_time() - start
    print(plan, flush=True)
    most = max(len(choice.removed) for choice in plan.choices)
    groups = {
        "slim": list(plan.choices),
        "depth": [c for c in plan.choices if c.size == plan.size],
        "width": [c for c in plan.choices if not c.removed],
        "both": [c for c in plan.choices if len(c.removed) == most // 2],
    }
    folders = {}
    for method, choices in groups.items():
        best = min(choices, key=lambda choice: choice.loss)
        folders[method] = {"folder": folder_name(best), **asdict(best)}
        if not (options.work / folder_name(best) / "config.json").exists():
            smaller = copy.deepcopy(model)
            hf_sparse.slim_(smaller, plan=SlimPlan(**{**vars(plan), "choices": (best,)}))
            hf_sparse.save_pretrained(smaller, options.work / folder_name(best))
    told.write_text(json.dumps({**json.loads(plan.to_json()), "seconds": seconds, "of": folders}))


def folder_name(choice: SlimChoice) -> str:
    """A name that tells the mix."""
    assert choice.size is not None
    removed = "-".join(map(str, sorted(choice.removed)))
    return f"heads{choice.size.heads}-neurons{choice.size.neurons}-without{removed}"


def folder_of(cell: Cell, options: argparse.Namespace) -> Path:
    """Where the model of a cell of ours lies."""
    told = json.loads((options.work / f"plan-{cell.share:g}.json").read_text())
    folder: Path = options.work / told["of"][cell.method]["folder"]
    return folder


def model_of(cell: Cell, options: argparse.Namespace) -> Any:
    """The smaller model of a cell."""
    if cell.method in OURS:
        folder = folder_of(cell, options)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = dense(options)
    if cell.method == "shortgpt":
        return without_least_influence(model, cell.share, options)
    if cell.method == "2ssp":
        return two_stages(model, cell.share, options)
    return model


@torch.no_grad()
def without_least_influence(model: Any, share: float, options: argparse.Namespace) -> Any:
    """ShortGPT: the blocks of least influence go at once."""
    layers = model.model.layers
    count = -int(-share * len(layers) // 1)
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def look(number: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            sums[number] += torch.cosine_similarity(args[0], after, dim=-1).double().sum()

        return hook

    handles = [layer.register_forward_hook(look(n)) for n, layer in enumerate(layers)]
    for batch in windows(options, options.calibration, WINDOW):
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    order = sums.argsort(descending=True).tolist()
    Depth.of(model).keep_([n for n in range(len(layers)) if n not in order[:count]])
    return model


class NoAttention(nn.Module):
    """What stands in the place of an attention that went: nothing is added to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Zeros of the shape of the hidden states."""
        return torch.zeros_like(hidden_states), None


@torch.no_grad()
def two_stages(model: Any, share: float, options: argparse.Namespace) -> Any:
    """2SSP: neurons of least norm, then whole attentions by perplexity."""
    layers = model.model.layers
    of_attention, of_network = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (layers[0].self_attn, layers[0].mlp)
    )
    attentions = round(len(layers) * share ** (of_network / of_attention / ALPHA))
    rest = share * block_weights(model) - attentions * of_attention
    width = layers[0].mlp.down_proj.in_features
    kept = round(width * (1 - rest / len(layers) / of_network))
    norms = [torch.zeros(width, dtype=torch.float64) for _ in layers]

    def look(number: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            norms[number] += args[0].double().norm(dim=1).sum(dim=0)  # over tokens, then samples

        return hook

    inputs = windows(options, options.calibration, WINDOW)
    handles = [
        layer.mlp.down_proj.register_forward_pre_hook(look(n)) for n, layer in enumerate(layers)
    ]
    for batch in inputs:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    for number, layer in enumerate(layers):
        chosen = norms[number].topk(kept).indices.sort().values
        mlp = layer.mlp
        for entry in (mlp.gate_proj, mlp.up_proj):
            entry.weight = nn.Parameter(entry.weight[chosen].clone())
            entry.out_features = kept
        mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, chosen].clone())
        mlp.down_proj.in_features = kept
    model.config.intermediate_size = kept
    for _ in range(attentions):
        losses = {}
        for number, layer in enumerate(layers):
            own = layer.self_attn
            if not isinstance(own, NoAttention):
                layer.self_attn = NoAttention()
                losses[number] = mean_loss(model, [{**inputs[0], "use_cache": False}])
                layer.self_attn = own
        layers[min(losses, key=losses.__getitem__)].self_attn = NoAttention()
    return model


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Make the model smaller, train it, and measure perplexity, parameters and time."""
    model = model_of(cell, options)
    whole = dense(options)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "dense")
    row: dict[str, Any] = {
        "data": "prose" if options.data is None else "WikiText-2, C4",
        "max_windows": options.max_windows,
        "calibration": options.calibration * WINDOW,
        "parameters": model.num_parameters(),
        "removed": 1 - block_weights(model) / block_weights(whole),
        "blocks": len(model.model.layers),
        "heads": model.config.num_attention_heads,
        "neurons": model.config.intermediate_size,
    }
    row["no_attention"] = sum(isinstance(m, NoAttention) for m in model.modules())
    if cell.healed:
        inputs = windows(options, options.tokens // WINDOW, WINDOW)
        start = time.process_time()
        report = hf_sparse.recover_(model, inputs, teacher=whole)
        row["tokens"], row["trained"] = len(inputs) * WINDOW, report.notes[0]
        row["options"], row["seconds"] = report.options, time.process_time() - start
        if cell.method in OURS:
            folder = folder_of(cell, options)
            hf_sparse.save_pretrained(model, folder.with_name(f"{folder.name}-healed"))
    model.to(faster())
    row["measured in"] = str(faster()).removeprefix("torch.")
    row["perplexity"] = {
        name: hf_sparse.perplexity(model, tokenizer, text, WINDOW, max_windows=options.max_windows)
        for name, text in texts(options.data)[1].items()
    }
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    """The results as Markdown."""
    if not rows:
        raise SystemExit("no results yet")
    print(
        f"{rows[0]['machine']}\n{rows[0]['data']}, {rows[0]['max_windows']} windows of {WINDOW}, "
        f"measured in {rows[0]['measured in']}\n"
    )
    names = list(rows[0]["perplexity"])
    columns = [f"{when}: {name}" for when in ("before", "after training") for name in names]
    head = ["removed", "method", "blocks", "heads", "neurons", "parameters", *columns]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    found = {Cell(**row["cell"]): row for row in rows}
    for cell, row in found.items():
        if cell.healed:
            continue
        after = found.get(Cell(cell.method, cell.share, True))
        values = [f"{row['perplexity'][name]:.2f}" for name in names]
        values += [f"{after['perplexity'][name]:.2f}" if after else "" for name in names]
        blocks = f"{row['blocks']}"
        if row["no_attention"]:
            blocks += f", {row['no_attention']} without attention"
        told = [
            f"{row['removed']:.1%}",
            cell.method,
            blocks,
            str(row["heads"]),
            str(row["neurons"]),
        ]
        print("| " + " | ".join([*told, f"{row['parameters'] / 1e6:.1f}M", *values]) + " |")


def print_latency(options: argparse.Namespace) -> None:
    """Times of the models that lie in --work, each in turns with the whole one."""
    print(f"{machine()}\n\n| model | how | 1 x 128, ms | dense | a token, ms | dense |")
    print("|---|---|---|---|---|---|", flush=True)
    for plan in sorted(options.work.glob("plan-*.json")):
        of = json.loads(plan.read_text())["of"]
        for folder in dict.fromkeys(one["folder"] for one in of.values()):
            methods = ", ".join(name for name, one in of.items() if one["folder"] == folder)
            share = plan.stem.removeprefix("plan-")
            pair = [options.work / folder, options.work / "dense"]
            for how, times in {
                **in_torch(pair, options),
                "ONNX Runtime": in_onnx(pair, options),
            }.items():
                told = [f"{times[kind][which]:.2f}" for kind in (0, 1) for which in (0, 1)]
                print(f"| {methods} {share} | {how} | {' | '.join(told)} |", flush=True)


Times = tuple[tuple[float, float], tuple[float, float]]


def in_torch(pair: list[Path], options: argparse.Namespace) -> dict[str, Times]:
    """Medians of both models in torch and compiled: of a forward pass, of a new token."""
    found = []
    for folder in pair:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        found.append(hf_sparse.benchmark(model, 1, 128, options.repeats).to_dict())
    names = {"torch": "torch", "compiled": "hf_sparse.compile"}
    return {
        told: tuple(  # type: ignore[misc]
            tuple(one[kind][name] for one in found) for kind in ("forward_ms", "decode_ms")
        )
        for name, told in names.items()
    }


def in_onnx(pair: list[Path], options: argparse.Namespace) -> Times:
    """The same in ONNX Runtime, both models in turns."""
    try:
        import onnxruntime
    except ImportError as error:
        raise SystemExit("onnxruntime is needed: pip install 'hf_sparse[onnx]'") from error

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.threads
    sessions = []
    for folder in pair:
        graph = folder.with_name(f"{folder.name}-onnx")
        if not graph.exists():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            hf_sparse.export_onnx(model, graph)
        [file] = graph.glob("*.onnx")
        sessions.append(onnxruntime.InferenceSession(str(file), settings, ["CPUExecutionProvider"]))
    return (timed(sessions, 128, 0, options.repeats), timed(sessions, 1, 127, options.repeats))


def timed(sessions: list[Any], tokens: int, cached: int, repeats: int) -> tuple[float, float]:
    """Medians in milliseconds of a call with some tokens behind others in the cache."""
    given = [inputs_of(session, tokens, cached) for session in sessions]
    times: list[list[float]] = [[] for _ in sessions]
    for turn in range(repeats + 2):
        for session, inputs, found in zip(sessions, given, times, strict=True):
            start = time.perf_counter()
            session.run(None, inputs)
            if turn >= 2:
                found.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[0]), statistics.median(times[1])


def inputs_of(session: Any, tokens: int, cached: int) -> dict[str, Any]:
    """Inputs of an exported causal model."""
    import numpy

    given = {}
    for one in session.get_inputs():
        if one.name == "input_ids":
            given[one.name] = numpy.full((1, tokens), 42, numpy.int64)
        elif one.name == "attention_mask":
            given[one.name] = numpy.ones((1, cached + tokens), numpy.int64)
        elif one.name == "position_ids":
            given[one.name] = numpy.arange(cached, cached + tokens, dtype=numpy.int64)[None]
        else:
            shape = [1, one.shape[1], cached, one.shape[3]]
            given[one.name] = numpy.zeros(shape, numpy.float32)
    return given


if __name__ == "__main__":
    main(options)
