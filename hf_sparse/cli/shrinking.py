"""The command that makes models smaller: zero heads and neurons, blocks, experts, hidden features."""

from __future__ import annotations

import argparse
from typing import Any

import hf_sparse
from hf_sparse.checkpoint.can_save import check_can_save
from hf_sparse.cli.loading import batches_of, load, optional_tokenizer, skeleton
from hf_sparse.cli.printing import print_json, without
from hf_sparse.dropping.counts import number_of_some
from hf_sparse.dropping.experts import number_of_experts
from hf_sparse.structure.depth import Depth
from hf_sparse.structure.hidden import HiddenPlan, hidden_size_of
from hf_sparse.structure.mixtures import Mixtures


def shrink(options: argparse.Namespace) -> int:
    """Remove what is useless, or what the flags name, and save the smaller model."""
    bones = skeleton(options.model, options)
    check_can_save(bones, options.output)
    _check(options, bones)
    looks = bool(options.calibration or options.labels)
    tokenizer = optional_tokenizer(options, bones.config, needed=looks)
    batches = batches_of(options, bones, tokenizer) if looks else None
    model, _ = load(options.model, options, needs_tokenizer=False)
    report = _shrunk(options, model, batches)
    hf_sparse.save_pretrained(
        model, options.output, tokenizer=tokenizer, base_model=options.base_model
    )
    if options.json:
        print_json(report, options)
    else:
        print(report)
        print(f"saved to {options.output}{without(tokenizer)}")
    return 0


def _check(options: argparse.Namespace, bones: Any) -> None:
    """Refuse counts that the model cannot lose, before its weights are read."""
    if options.blocks is not None:
        number_of_some(options.blocks, len(Depth.of(bones).blocks), "block")
    if options.experts is not None:
        mixtures = Mixtures.of(bones)
        mixtures.check(mixtures.number - number_of_experts(options.experts, mixtures))
    if options.hidden is not None:
        size = hidden_size_of(bones)
        HiddenPlan.of(bones, size - number_of_some(options.hidden, size, "hidden feature"))


def _shrunk(options: argparse.Namespace, model: Any, batches: list[Any] | None) -> Any:
    """Make the model smaller as the flags say, and report."""
    if options.blocks is not None:
        return hf_sparse.drop_blocks_(model, options.blocks, batches or [], by=options.by or "loss")
    if options.experts is not None:
        return hf_sparse.drop_experts_(
            model, options.experts, batches, by=options.by or "reap", merge=options.merge
        )
    if options.hidden is not None:
        return hf_sparse.drop_hidden_(model, options.hidden, batches or [])
    return hf_sparse.shrink_(model, uniform=options.uniform)
