"""Wrong usage, told before torch and transformers are imported: every check here takes no time.

What needs the model's config or its tokenizer is checked by the package, before the weights are read.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_sparse_cli.choices import (
    COMPOSITION,
    EXPERT_METHODS,
    METHODS,
    PATTERNS,
    SCOPES,
    Method,
)
from hf_sparse_cli.effort import by_effort, check_effort
from hf_sparse_cli.names import did_you_mean, suggestions
from hf_sparse_cli.places import (
    check_files,
    check_model,
    check_no_file,
    check_output,
    similar_folder,
    unfinished,
)
from hf_sparse_cli.quantizing import check_grid, check_quantize
from hf_sparse_cli.reporting import check_report
from hf_sparse_cli.shrinking import check_parts
from hf_sparse_cli.tasks import check_tasks

_SIZED = (r"\d{1,4}:\d{1,4}", r"block:\d{1,6}x\d{1,6}", r"head(?:_in)?:\d{1,6}")
# Flags whose values are counts, and the least of them.
_COUNTS = {
    **dict.fromkeys(("num_samples", "batch_size", "max_windows", "epochs", "accumulate", "r"), 1),
    **dict.fromkeys(("batch", "tokens", "repeats", "threads", "window", "limit"), 1),
    "reconstruct": 0,
}
# Flags that name files to read.
_FILES = ("calibration", "labels", "data", "text")
# Positional arguments that name a model to read: a folder, or a model on the Hub.
_MODELS = ("model", "teacher", "dense", "base", "tokenizer")


def check(options: argparse.Namespace) -> None:
    """Raise a ValueError or an OSError for options that no run can follow."""
    given = vars(options)
    for name, least in _COUNTS.items():
        if given.get(name) is not None and given[name] < least:
            raise ValueError(f"--{_flag(name)} is {given[name]}; wanted at least {least}.")
    for name in _FILES:
        check_files(given.get(name) or ())
    if given.get("labels"):
        text_fields(options)
    for name in _MODELS:
        if given.get(name) is not None:
            check_model(given[name])
    for source in given.get("models") or ():
        check_model(source)
    if given.get("folder") is not None:
        # Of the Hub, too: what is recovered, and what is inspected under the name of an owner.
        named = options.command == "inspect" and "/" in options.folder
        check_model(options.folder, local=options.command != "recover" and not named)
    if options.command in _CHECKS:
        _CHECKS[options.command](options)


def _check_prune(options: argparse.Namespace) -> None:
    check_effort(options)
    goes_on = options.resume and unfinished(options.output).exists()
    if by_effort(options):
        if options.recipe is None:
            _check_sparsity(options.pattern, options.sparsity, implied_sparsity(options.pattern))
        return check_output(options, "model", "the dense model", asked=goes_on)
    _check_method(options)
    return check_output(options, "model", "the dense model", asked=goes_on)


def _check_method(options: argparse.Namespace) -> None:
    implied = implied_sparsity(options.pattern)
    _check_sparsity(options.pattern, options.sparsity, implied)
    method = _method(options)
    own = method_options(options)
    if method.nm_only and implied is None:
        raise ValueError(
            f"method '{options.method}' learns N:M masks; the pattern is '{options.pattern}'. Use "
            "--pattern 2:4, or another method."
        )
    if own.get("allocation", "uniform") != "uniform" and implied is not None:
        raise ValueError(
            f"pattern '{options.pattern}' fixes the sparsity of every block: --allocation "
            f"{own['allocation']} has nothing to choose. Leave it out."
        )
    if options.stream and not method.streams:
        names = ", ".join(name for name, other in METHODS.items() if other.streams)
        raise ValueError(
            f"method '{options.method}' looks at all layers at once, and such methods do not --stream. "
            f"Leave --stream out, or use one that goes through the blocks: {names}."
        )
    if options.resume and not options.stream:
        raise ValueError("--resume goes on with a run of --stream or --effort: give --stream too.")
    check_grid(options, needed=False)
    if needs_calibration(options) and not options.calibration and not options.labels:
        raise ValueError(
            f"method '{options.method}' needs calibration text: --calibration FILE, or of a classifier "
            "--labels FILE"
        )


def _check_recover(options: argparse.Namespace) -> None:
    if isinstance(options.lr, float) and not options.lr > 0:
        raise ValueError(f"--lr is {options.lr}; wanted a number > 0, or search.")
    if options.lr == "search" and options.held_out < 1:
        raise ValueError("--lr search compares losses on held-out batches: --held-out 16.")
    if options.hidden and options.teacher is None:
        raise ValueError("--hidden compares states with those of a teacher: --teacher DENSE.")
    if options.r is not None and options.method == "finetune":
        raise ValueError("--r is for the methods lora and shira: leave it out.")
    check_output(options, "folder", "the pruned model")


def _check_shrink(options: argparse.Namespace) -> None:
    check_parts(options)
    check_output(options, "model", "the larger model")


def _check_quantize(options: argparse.Namespace) -> None:
    check_quantize(options)
    check_output(options, "model", "the model as it was")


def _check_convert(options: argparse.Namespace) -> None:
    check_output(options, "folder", "the old checkpoint")


def _check_export(options: argparse.Namespace) -> None:
    if options.quantize == "static" and not options.calibration:
        raise ValueError("--quantize static calibrates on text: --calibration FILE")
    if options.calibration and options.quantize != "static":
        raise ValueError("--calibration is for --quantize static alone: leave it out.")
    if not options.gguf:
        check_no_file(options.output)
    elif options.quantize or options.no_pack:
        raise ValueError("--quantize and --no-pack are for ONNX graphs: leave them out, or --gguf.")


_CHECKS: dict[str, Callable[[argparse.Namespace], None]] = {
    "prune": _check_prune,
    "recover": _check_recover,
    "eval": check_tasks,
    "shrink": _check_shrink,
    "slim": lambda options: check_output(options, "model", "the larger model"),
    "quantize": _check_quantize,
    "convert": _check_convert,
    "export": _check_export,
    "report": check_report,
}


def implied_sparsity(pattern: str) -> float | None:
    """The sparsity that a pattern fixes; None where it is free.

    Raises:
        ValueError: no notation of `hf_sparse.patterns`.
    """
    if not _is_pattern(pattern):
        meant = suggestions().meant_pattern(pattern, lambda name: _is_pattern(name) or None)
        raise ValueError(
            f"unknown pattern '{pattern}'. Known patterns: {', '.join(PATTERNS)}.{meant}"
        )
    n, colon, m = pattern.partition(":")
    if not colon or not n.isdigit():
        return None
    if not 1 <= int(n) < int(m):
        raise ValueError(f"pattern '{pattern}': wanted N:M with 1 <= N < M, as in '2:4'.")
    return 1 - int(n) / int(m)


def _is_pattern(notation: str) -> bool:
    """Whether a text has the form of a pattern."""
    plain = notation in PATTERNS and notation.isalpha()
    return plain or any(re.fullmatch(shape, notation, re.ASCII) for shape in _SIZED)


def _check_sparsity(pattern: str, sparsity: float | None, implied: float | None) -> None:
    if sparsity is None:
        if implied is None:
            raise ValueError(f"pattern '{pattern}' needs a sparsity: --sparsity 0.5")
        return
    if not 0 <= sparsity < 1:  # False for NaN too
        share = sparsity / 100
        meant = f" Did you mean --sparsity {share:g}?" if 0.01 < share < 1 else ""
        raise ValueError(f"sparsity is {sparsity:g}; wanted a fraction of zeros in [0, 1).{meant}")
    if implied is not None and abs(sparsity - implied) > 1e-6:
        raise ValueError(
            f"pattern '{pattern}' fixes the sparsity at {implied:.4g}, but --sparsity {sparsity:g} was "
            "given. Leave --sparsity out, or choose another pattern."
        )


def _method(options: argparse.Namespace) -> Method:
    """The method of a pruning.

    Raises:
        ValueError: it is not for the pattern.
    """
    own, others = METHODS, EXPERT_METHODS
    if options.pattern == "expert":
        own, others = others, own
    if options.method not in own:
        wanted = "--pattern expert" if options.method in EXPERT_METHODS else "another pattern"
        raise ValueError(
            f"method '{options.method}' is for {wanted}; the pattern is '{options.pattern}'. Give "
            f"--method {', '.join(own)}."
        )
    return own[options.method]


def needs_calibration(options: argparse.Namespace) -> bool:
    """Whether a pruning looks at data."""
    composed = options.allocation == "owl" or options.refine or options.reconstruct
    composed = composed or options.token_weights
    return _method(options).needs_calibration or bool(composed)


def method_options(options: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `prune_` that the flags give.

    Raises:
        ValueError: the method has no such option, or a value cannot be read as the option's type.
    """
    defaults = _method(options).options
    own: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("scope", *COMPOSITION)
        if getattr(options, name) is not None
    }
    if "scope" in own and "scope" not in defaults:
        names = " and ".join(name for name, other in METHODS.items() if "scope" in other.options)
        raise ValueError(
            f"--scope is for the methods {names}; method '{options.method}' goes layer by layer. "
            "Leave it out."
        )
    for given in options.option or ():
        name, value = _own_option(given, options.method, defaults)
        own[name] = value
    if own.get("scope", "layer") not in SCOPES:
        raise ValueError(f"scope is {own['scope']!r}; wanted one of {', '.join(SCOPES)}.")
    return own


def _own_option(given: str, method: str, defaults: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and the value of one `--option`.

    Raises:
        ValueError: the method has no such option, or the value cannot be read as its type.
    """
    name, equals, text = given.partition("=")
    known = ", ".join(f"{option}={value}" for option, value in defaults.items())
    start = f"--option {given}: "
    if name in COMPOSITION:
        raise ValueError(f"{start}{name} is a flag of its own: --{name} {text or 'VALUE'}")
    if not defaults:
        raise ValueError(f"{start}method '{method}' has no options of its own. Leave it out.")
    if name not in defaults:
        meant = did_you_mean(name, defaults)
        raise ValueError(f"{start}method '{method}' has the options {known}.{meant}")
    if not equals:
        raise ValueError(f"{start}wanted a value too, as --option {name}={defaults[name]}")
    try:
        return name, _read_as(defaults[name], text)
    except ValueError as error:
        raise ValueError(f"{start}wanted a value like {name}={defaults[name]}.") from error


def _read_as(default: Any, text: str) -> Any:
    """The text as a value of the default's type."""
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    return text if default is None else type(default)(text)


def text_fields(options: argparse.Namespace) -> list[str]:
    """The names in `--fields`: of one text, or two.

    Raises:
        ValueError: another number of names, or the label's.
    """
    fields: list[str] = options.fields.split(",")
    if len(fields) > 2 or "label" in fields or len(set(fields)) < len(fields) or not all(fields):
        raise ValueError(
            f"--fields {options.fields}: wanted the name of a text, or two, by a comma."
        )
    return fields


def doubts(options: argparse.Namespace) -> Iterator[str]:
    """Warnings of options that may be meant in another way, for before the work."""
    given = vars(options)
    for name in (*_MODELS, "folder"):
        source = given.get(name)
        if source is None or Path(source).exists():
            continue
        similar, parent = similar_folder(Path(source)), Path(source).parent
        if similar or ("/" in source and parent.is_dir()):
            yield f"there is no folder {source}, so that the Hub is asked for it.{similar}"
    if given.get("resume") and not unfinished(options.output).exists():
        yield (
            f"there is nothing to resume, no {unfinished(options.output)}: the run begins with the "
            "first block."
        )


def _flag(name: str) -> str:
    return name.replace("_", "-")
