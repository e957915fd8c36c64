"""The command that rounds a model to few bits."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import hf_sparse
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.cli.loading import batches_of, load, optional_tokenizer, skeleton
from hf_sparse.cli.printing import print_saved
from hf_sparse.structure.grids import gridded
from hf_sparse.structure.layers import promised_config
from hf_sparse_cli.quantizing import grid_options


def quantize(options: argparse.Namespace) -> int:
    """Round a model to few bits, its zeros kept, and save it."""
    bones = skeleton(options.model, options)
    check_can_save(bones, options.output)
    known = promised_config(bones) or hf_sparse.SparsityConfig("unstructured", 0.0)
    ignored = (*known.ignore, *(options.ignore or ()))
    config = replace(known, **grid_options(options), ignore=ignored)
    gridded(bones, config)  # tells of groups that do not divide
    looks = bool(options.calibration or options.labels)
    tokenizer = optional_tokenizer(options, bones.config, needed=looks)
    batches = batches_of(options, bones, tokenizer) if looks else None
    model, _ = load(options.model, options, needs_tokenizer=False)
    if options.bit_budget is not None:
        config = _within_budget(model, config, options.bit_budget, batches)
    report = hf_sparse.quantize_(model, config, batches=batches, method=options.method)
    hf_sparse.save_pretrained(
        model, options.output, tokenizer=tokenizer, base_model=options.base_model
    )
    return print_saved(report, options, options.model, tokenizer)


def _within_budget(
    model: Any, config: hf_sparse.SparsityConfig, budget: str, batches: Any
) -> hf_sparse.SparsityConfig:
    """The config without the layers that are worth their bytes."""
    assert config.bits is not None
    plan = hf_sparse.bit_budget(
        model,
        budget,
        batches,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        targets=config.targets,
        ignore=config.ignore,
    )
    return replace(config, ignore=plan.config.ignore)
