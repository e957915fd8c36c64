"""What each command does: thin wrappers over the package's functions."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError

import hf_sparse
from hf_sparse.calibration.documents import read_documents
from hf_sparse.calibration.windows import token_windows
from hf_sparse.checkpoint.can_save import check_can_save, check_not_quantized
from hf_sparse.cli.asked import asked_config
from hf_sparse.cli.effort import prune_by_effort
from hf_sparse.cli.evaluating import evaluate
from hf_sparse.cli.loading import (
    batches_of,
    load,
    load_tokenizer,
    model_config,
    optional_tokenizer,
    skeleton,
    windows,
)
from hf_sparse.cli.messages import messages
from hf_sparse.cli.printing import print_saved, without
from hf_sparse.cli.pushing import push
from hf_sparse.cli.quantizing import quantize
from hf_sparse.cli.reporting import report
from hf_sparse.cli.shrinking import shrink
from hf_sparse.cli.slimming import slim
from hf_sparse.configuration_sparse import HIGHEST_SPARSITY
from hf_sparse.exporters.can_export import check_can_export
from hf_sparse.exporters.gguf_export import check_can_export_gguf
from hf_sparse.pruning.experts import check_experts
from hf_sparse.pruning.methods import Recipe
from hf_sparse.pruning.streaming import check_run
from hf_sparse.pruning.uniform import check_uniform
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import promised_config
from hf_sparse.structure.targets import Targets
from hf_sparse.timing import profile
from hf_sparse_cli.effort import by_effort
from hf_sparse_cli.usage import method_options, needs_calibration


def run(options: argparse.Namespace) -> int:
    """Run the command that the options name; returns the exit code.

    Raises:
        ValueError, OSError, ImportError: what is wrong, told for people.
    """
    try:
        with messages(options):
            return COMMANDS[options.command](options)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except HfHubHTTPError:
        raise
    except Exception as error:
        # What went wrong on the network has no common class: the client's library decides it.
        cause = next((e for e in _with_causes(error) if _is_of_the_network(e)), None)
        if cause is None:
            raise
        told = str(error) if error is cause else f"{error} ({cause})"
        again = " The same command again goes on: what has arrived is not sent twice."
        raise OSError(
            f"the Hub could not be reached: {told}{again if options.command == 'push' else ''}"
        ) from error


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what it was raised from."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _is_of_the_network(error: BaseException) -> bool:
    """Whether an error is one of the client's library, or the answer of a Hub that is in trouble."""
    own = type(error).__module__.startswith(("httpx", "httpcore"))
    return own or isinstance(error, HfHubHTTPError)


def prune(options: argparse.Namespace) -> int:
    """Prune a model and save it."""
    if by_effort(options):
        return prune_by_effort(options)
    config, bones = _checked(options)
    tokenizer, batches = _calibration(options, bones)
    pruned = _streamed if options.stream else _in_memory
    report = pruned(options, config, tokenizer, batches)
    return print_saved(report, options, options.model, tokenizer)


def _checked(options: argparse.Namespace) -> tuple[hf_sparse.SparsityConfig, Any]:
    """The config of a pruning run and the model without weights; bad options are refused here."""
    config = asked_config(options)
    own = method_options(options)
    recipe = Recipe.of(options.method, config.pattern, own)
    bones = skeleton(options.model, options)
    if config.uniform:
        check_uniform(bones, Targets.of(bones, config), recipe)
    gridded(bones, config)  # tells of groups that do not divide a weight
    if config.pattern.whole_matrices:
        check_experts(bones, Targets.of(bones, config), recipe.all_options["scope"])
    check_can_save(bones, options.output, config)
    if options.stream:
        check_run(options.model, options.output, config, options.method, own, options.resume)
    return config, bones


def _calibration(options: argparse.Namespace, bones: Any) -> tuple[Any, list[Any] | None]:
    """The tokenizer, if there is one, and the data that the method looks at, if it does.

    The data are windows of text, or labelled texts.
    """
    rounds = options.bits is not None and bool(options.calibration or options.labels)
    needed = needs_calibration(options) or rounds
    tokenizer = optional_tokenizer(options, bones.config, needed=needed)
    return tokenizer, batches_of(options, bones, tokenizer) if needed else None


def _streamed(
    options: argparse.Namespace,
    config: hf_sparse.SparsityConfig,
    tokenizer: Any,
    batches: list[Any] | None,
) -> hf_sparse.SparsityReport:
    """Prune a model from disk to disk."""
    return hf_sparse.prune_checkpoint(
        options.model,
        options.output,
        config,
        options.method,
        batches,
        resume=options.resume,
        overwrite=options.overwrite,
        tokenizer=tokenizer,
        dtype=options.dtype,
        base_model=options.base_model,
        **method_options(options),
    )


def _in_memory(
    options: argparse.Namespace,
    config: hf_sparse.SparsityConfig,
    tokenizer: Any,
    batches: list[Any] | None,
) -> hf_sparse.SparsityReport:
    """Load a model, prune it, and save it."""
    model, _ = load(options.model, options, needs_tokenizer=False)
    check_not_quantized(model)
    own = method_options(options)
    report = hf_sparse.prune_(model, config, options.method, batches, **own)
    hf_sparse.save_pretrained(
        model,
        options.output,
        None if config.pattern.whole_matrices else config,  # a share of few experts is rounded
        tokenizer=tokenizer,
        report=report,
        base_model=options.base_model,
    )
    return report


def recover(options: argparse.Namespace) -> int:
    """Train a sparse model on text, its zeros kept, and save it."""
    if options.method == "finetune" and options.dtype == "auto":
        options.dtype = "float32"
    bones = skeleton(options.folder, options)
    check_can_save(bones, options.output, _stored_in(options.format, promised_config(bones)))
    tokenizer = load_tokenizer(options.folder, options, bones.config)
    documents = read_documents(options.data)
    if options.teacher is not None:
        model_config(options.teacher, options)  # a name that is wrong is told before the work
    windows = token_windows(tokenizer, documents, options.window, options.num_samples)
    batches = [{"input_ids": batch} for batch in windows.split(options.batch_size)]
    model, _ = load(options.folder, options, needs_tokenizer=False)
    check_not_quantized(model)
    teacher = None
    if options.teacher is not None:
        teacher, _ = load(options.teacher, options, needs_tokenizer=False)
    report = hf_sparse.recover_(
        model,
        batches,
        options.method,
        teacher=teacher,
        epochs=options.epochs,
        accumulate=options.accumulate,
        lr=options.lr,
        r=options.r,
        logits=options.logits,
        hidden=options.hidden,
        temperature=options.temperature,
        held_out=options.held_out,
    )
    config = _stored_in(options.format, promised_config(model), report.sparsity)
    hf_sparse.save_pretrained(model, options.output, config, tokenizer=tokenizer, report=report)
    return print_saved(report, options, options.folder, tokenizer)


def _stored_in(
    format: str | None, promised: hf_sparse.SparsityConfig | None, sparsity: float = 0.0
) -> hf_sparse.SparsityConfig | None:
    """The config of a model in another format; None: as it is, if no format is given.

    Args:
        format: of `--format`.
        promised: what the model was pruned to, if that is known.
        sparsity: of the model, where it is not.
    """
    if format is None:
        return None
    if promised is None:
        promised = hf_sparse.SparsityConfig("unstructured", min(sparsity, HIGHEST_SPARSITY))
    return hf_sparse.SparsityConfig.from_dict({**promised.to_dict(), "format": format})


def inspect(options: argparse.Namespace) -> int:
    """Print what a checkpoint folder holds."""
    inspection = hf_sparse.inspect_checkpoint(options.folder)
    report = inspection.report
    if options.json:
        described = dataclasses.asdict(inspection)
        described["config"] = inspection.config.to_dict() if inspection.config else None
        described["report"] = json.loads(report.to_json())
        print(json.dumps(described, indent=2))
    else:
        print(inspection.table() if options.tensors else inspection)
    if (
        inspection.config is not None
        and inspection.config.pattern.implied_sparsity
        and report.violations
    ):
        print(
            f"hf-sparse: error: {report.violations} groups break the promised pattern "
            f"'{report.pattern}'",
            file=sys.stderr,
        )
        return 1
    return 0


def bench(options: argparse.Namespace) -> int:
    """Time a model with torch, with dense kernels, and compiled."""
    model, _ = load(options.model, options, needs_tokenizer=False)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape = options.batch, options.tokens, options.repeats
    if options.profile:
        profiles = profile(model, *shape, options.bits)
        if options.json:
            print(
                json.dumps(
                    {kind: dataclasses.asdict(timings) for kind, timings in profiles.items()}
                )
            )
            return 0
        print("\n\n".join(f"{kind}: {timings}" for kind, timings in profiles.items()))
        return 0
    timings = hf_sparse.benchmark(model, *shape, options.bits)
    if options.json:
        print(json.dumps(timings.to_dict()))
        return 0
    if options.explain:
        compiled: Any = hf_sparse.compile(model, bits=options.bits)
        print(compiled.explain(options.batch * options.tokens), end="\n\n")
    print(timings)
    return 0


def export(options: argparse.Namespace) -> int:
    """Export a model as an ONNX graph, or as a GGUF file."""
    bones = skeleton(options.model, options)
    if options.gguf:
        check_can_export_gguf(bones, options.output)
        tokenizer = optional_tokenizer(options, bones.config, needed=False)
        model, _ = load(options.model, options, needs_tokenizer=False)
        written = hf_sparse.export_gguf(model, options.output, tokenizer=tokenizer)
        told = f"{written}{without(tokenizer)}"
        print(json.dumps(written.to_dict()) if options.json else told)
        return 0
    check_can_export(bones, options.output)
    tokenizer = optional_tokenizer(options, bones.config, needed=bool(options.calibration))
    batches = None
    if options.calibration:
        batches = windows(tokenizer, read_documents(options.calibration), options)
    model, _ = load(options.model, options, needs_tokenizer=False)
    report = hf_sparse.export_onnx(
        model,
        options.output,
        tokenizer=tokenizer,
        pack=not options.no_pack,
        quantize=options.quantize,
        batches=batches,
    )
    print(json.dumps(report.to_dict()) if options.json else f"{report}{without(tokenizer)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Convert an old checkpoint."""
    folder = hf_sparse.convert_legacy(
        options.folder, options.output, format=options.format, overwrite=options.overwrite
    )
    print(json.dumps({"folder": str(folder)}) if options.json else f"saved to {folder}")
    return 0


COMMANDS = {
    "prune": prune,
    "recover": recover,
    "eval": evaluate,
    "inspect": inspect,
    "report": report,
    "bench": bench,
    "shrink": shrink,
    "slim": slim,
    "quantize": quantize,
    "export": export,
    "push": push,
    "convert": convert,
}
