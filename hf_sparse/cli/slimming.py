"""The command that makes a smaller model for one budget."""

from __future__ import annotations

import argparse
from typing import Any

import torch

import hf_sparse
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.cli.loading import batches_of, load, optional_tokenizer, skeleton
from hf_sparse.cli.printing import print_json, without
from hf_sparse.slimming.search import check_budget


def slim(options: argparse.Namespace) -> int:
    """Search the mix of fewer and smaller blocks for a budget, print it, and save the smaller model."""
    bones = skeleton(options.model, options)
    check_can_save(bones, options.output)
    budget: dict[str, Any] = {"params": options.params, "ms": _time(options.ms), "mb": options.mb}
    axes = tuple(options.axes) if options.axes else None
    check_budget(_in_type(bones, options.dtype), axes=axes, **budget)
    tokenizer = optional_tokenizer(options, bones.config, needed=True)
    batches = batches_of(options, bones, tokenizer)
    model, _ = load(options.model, options, needs_tokenizer=False)
    plan = hf_sparse.plan_slim(model, batches, axes=axes, **budget)
    if not options.json:
        print(plan)
    report = hf_sparse.slim_(model, plan=plan)
    hf_sparse.save_pretrained(
        model, options.output, tokenizer=tokenizer, base_model=options.base_model
    )
    if options.json:
        print_json(report, options)
    else:
        print(report.summary())
        print(f"saved to {options.output}{without(tokenizer)}")
    return 0


def _in_type(bones: Any, dtype: str) -> Any:
    """A model without values, with the type that its weights will have."""
    return bones if dtype == "auto" else bones.to(getattr(torch, dtype))


def _time(text: str | None) -> str | float | None:
    """A share of the time, as `0.6x`, or milliseconds."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text
