"""The command `prune --effort`: stages that are chosen, or read from a recipe."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import hf_sparse
from hf_sparse.calibration.documents import read_documents
from hf_sparse.calibration.windows import token_windows
from hf_sparse.checkpoint.can_save import check_can_save, check_not_quantized
from hf_sparse.cli.asked import asked_config
from hf_sparse.cli.loading import batches_of, load, optional_tokenizer, skeleton
from hf_sparse.cli.printing import print_saved
from hf_sparse.effort.run import described_run, follow, planned
from hf_sparse.files.work_folder import check_work_folder, work_folder


def prune_by_effort(options: argparse.Namespace) -> int:
    """Plan, tell the plan, follow it, and save the model; finished work is kept until it is saved."""
    recipe = None if options.recipe is None else hf_sparse.SparsifyPlan.load(options.recipe)
    config = recipe.config if recipe is not None else asked_config(options)
    folder = Path(options.output)
    check_work_folder(folder, {}, resume=options.resume)
    bones = skeleton(options.model, options)
    check_can_save(bones, options.output, config)
    tokenizer = optional_tokenizer(options, bones.config, needed=True)
    batches = _batches(options, bones, tokenizer)
    model, _ = load(options.model, options, needs_tokenizer=False)
    check_not_quantized(model)
    plan, targets, given = planned(model, config, batches, recipe or options.effort)
    run = described_run(model, plan, given)
    check_work_folder(folder, run, resume=options.resume)
    if not options.json:
        print(plan, flush=True)
    if options.save_recipe is not None:
        plan.save(options.save_recipe)
    with work_folder(folder, run, resume=options.resume) as work:
        report = follow(model, plan, targets, given, work)
        hf_sparse.save_pretrained(
            model, folder, plan.config, tokenizer=tokenizer, base_model=options.base_model
        )
    return print_saved(report, options, options.model, tokenizer)


def _batches(options: argparse.Namespace, bones: Any, tokenizer: Any) -> list[Any]:
    """All the data that there are, or as many windows or rows as --num-samples tells."""
    if options.labels:
        return batches_of(options, bones, tokenizer)
    documents = read_documents(options.calibration)
    windows = token_windows(tokenizer, documents, options.window, options.num_samples)
    return [{"input_ids": batch} for batch in windows.split(options.batch_size)]
