"""sparsify_: a model made as good as a given effort allows, with one call."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.adapters.loading import import_peft
from hf_sparse.adapters.on_layers import adaptable
from hf_sparse.arguments import check_gradients, check_has_values, check_kinds, check_model
from hf_sparse.calibration.progress import WholeRun, announce
from hf_sparse.calibration.windows import checked_batches, fingerprint
from hf_sparse.checkpoint.can_save import check_not_quantized
from hf_sparse.checkpoint.same_weights import hash_weights
from hf_sparse.checkpoint.save import tensors_to_store
from hf_sparse.configuration_sparse import SparsityConfig, check_config
from hf_sparse.counts import SparsityReport, measure_sparsity
from hf_sparse.effort.plan import SparsifyPlan
from hf_sparse.effort.probe import estimated
from hf_sparse.effort.stages import EFFORTS, PRUNE, Stage, is_causal, stages_for
from hf_sparse.effort.work import KeptBlocks, restore_stages, save_stage
from hf_sparse.files.work_folder import check_work_folder, work_folder
from hf_sparse.provenance.record import provenance_of, remember_
from hf_sparse.provenance.values import Calibration, pairs
from hf_sparse.pruning.oneshot import prune_kept
from hf_sparse.recover import recover_
from hf_sparse.recovery.held_out import held_out_loss
from hf_sparse.recovery.methods import RECOVERIES
from hf_sparse.structure.changeable import check_changeable
from hf_sparse.structure.targets import Targets
from hf_sparse.suggestions import did_you_mean, shortened

Batches = Sequence[Mapping[str, Any]]


def plan_sparsify(
    model: nn.Module,
    config: SparsityConfig | None,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    effort: str | os.PathLike[str] | SparsifyPlan = "minutes",
) -> SparsifyPlan:
    """Choose what `sparsify_` does, and estimate what it takes; the model stays as it is.

    Args:
        model, config, batches, effort: as of `sparsify_`.

    Returns:
        The plan, with an estimate of time and memory from a short measurement on this machine: a few
        forward passes, and two prunings of one block, which gets its weights back. `print` shows it,
        `.save(file)` writes it as a recipe.

    Raises:
        ValueError: as `sparsify_`.
    """
    check_model(model, "plan_sparsify", PreTrainedModel)
    return planned(model, config, batches, effort)[0]


def planned(
    model: nn.Module,
    config: SparsityConfig | None,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    effort: str | os.PathLike[str] | SparsifyPlan,
) -> tuple[SparsifyPlan, Targets, list[dict[str, Any]]]:
    """`plan_sparsify`, with the targets and the checked batches that `follow` takes."""
    given, targets, plan = _chosen(model, config, batches, effort)
    if not plan.seconds:
        plan = estimated(plan, model, targets, given)
    return plan, targets, given


def sparsify_(
    model: nn.Module,
    config: SparsityConfig | None,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    effort: str | os.PathLike[str] | SparsifyPlan = "minutes",
    *,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> SparsityReport:
    """Make a model sparse in place, as well as an effort allows.

    Method, allocation, refinement and reconstruction are those that have measured best for pattern,
    sparsity, kind of model and number of tokens; docs/effort.md tells what of recovery was measured.
    `prune_` and `recover_` do single steps. The plan is printed with its estimates before it starts,
    one progress bar goes over all of it, and the model's card tells every stage and the recipe.

    Args:
        model: any transformers model, dense, in memory.
        config: pattern, sparsity and targets. None: those of the recipe.
        batches: as from `hf_sparse.calibration_batches`, or with labels from `labelled_batches`. Give
            all that there are: each stage takes what it has use for.
        effort: `"seconds"`, `"minutes"` or `"hours"`; or a plan of `plan_sparsify`; or the file of a
            recipe, which names its stages exactly.
        folder: that the model will be saved in. Finished work is kept in `FOLDER.unfinished` until
            the call returns: each pruned block, and the model after each stage.
        resume: go on with what is there, with the same model, data and plan.

    Returns:
        Exact counts, with the time of all stages, and what each of them noted.

    Memory: see the plan; and for a model that is recovered, its weights once more.

    Raises:
        ValueError: too few tokens for the effort, a recipe of a newer version or for another family,
            work of a run with other data, or what `prune_` and `recover_` refuse. The model has not
            changed then, unless its loss became infinite in training.
    """
    check_model(model, "sparsify_", PreTrainedModel)
    check_kinds(sparsify_, locals())
    if resume and folder is None:
        raise ValueError(
            "resume=True goes on with the work beside a folder, and none was given: folder=..."
        )
    if folder is not None:
        check_work_folder(Path(folder), {}, resume=resume)
    plan, targets, given = planned(model, config, batches, effort)
    if folder is None:
        announce(str(plan))
        return follow(model, plan, targets, given, None)
    run = described_run(model, plan, given)
    check_work_folder(Path(folder), run, resume=resume)
    announce(str(plan))
    with work_folder(Path(folder), run, resume=resume) as work:
        return follow(model, plan, targets, given, work)


def _chosen(
    model: Any,
    config: SparsityConfig | None,
    batches: Iterable[Mapping[str, Tensor] | Tensor],
    effort: str | os.PathLike[str] | SparsifyPlan,
) -> tuple[list[dict[str, Any]], Targets, SparsifyPlan]:
    """The batches, the targets, and the plan without estimates; all that can be refused is."""
    check_has_values(model, "sparsify_")
    check_changeable(model, "sparsify_", "sparsify")
    check_not_quantized(model)
    check_gradients(model, "sparsify_")
    recipe = _recipe(effort)
    if config is None and recipe is None:
        raise ValueError(
            "config is None; wanted a SparsityConfig, such as SparsityConfig('2:4'), or a recipe."
        )
    if config is not None:
        check_config(config)
    family = _family(model)
    if recipe is not None:
        if recipe.family != family:
            raise ValueError(
                f"the recipe is for models of type '{recipe.family}', and this is '{family}'. Take an "
                "effort for it."
            )
        if config is not None and config != recipe.config:
            raise ValueError(
                f"the recipe makes {recipe.config!r}, and the config given is {config!r}. Give "
                "config=None, or an effort in the place of the recipe."
            )
        config = recipe.config
    assert config is not None
    if config.grid is not None or config.embedding_grid is not None:
        raise ValueError(
            "sparsify_ chooses for weights of full precision, and the config asks for few bits. Use "
            "hf_sparse.prune_."
        )
    given = checked_batches(batches, model, "sparsify_")
    targets = Targets.of(model, config)
    data = Calibration.of(given, fingerprint(given))
    if recipe is not None:
        plan = recipe.for_data(data, len(given))
    else:
        stages, notes = stages_for(model, targets, given, str(effort))
        plan = SparsifyPlan(str(effort), family, config, data, tuple(stages), notes=tuple(notes))
    for stage in plan.stages:
        _check_stage(model, targets, stage)
    return given, targets, plan


def _check_stage(model: nn.Module, targets: Targets, stage: Stage) -> None:
    """Refuse a recovery that would fail after the pruning before it."""
    if stage.kind == PRUNE:
        return
    if not is_causal(model):
        raise ValueError(
            f"the plan recovers, and {type(model).__name__} is no causal language model. Train it with "
            "hf_sparse.KeepZeros instead."
        )
    if RECOVERIES[stage.method].r is not None:
        import_peft()
        if not adaptable(targets.layers):
            raise ValueError(
                f"the plan recovers by '{stage.method}', and no adapter reaches experts in 3-D "
                "parameters. Take a recipe with 'finetune'."
            )
    elif any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError(
            "the plan fine-tunes all weights, and in half precision small updates are lost. Load the "
            "model with dtype=torch.float32, or install PEFT: pip install 'hf_sparse[peft]'."
        )


def _recipe(effort: Any) -> SparsifyPlan | None:
    """The plan that is given, or in a file; None for the name of an effort."""
    if isinstance(effort, SparsifyPlan):
        return effort
    if isinstance(effort, str) and effort in EFFORTS:
        return None
    if isinstance(effort, os.PathLike) or (isinstance(effort, str) and effort.endswith(".json")):
        return SparsifyPlan.load(effort)
    raise ValueError(
        f"effort is {shortened(effort)}; wanted one of {', '.join(EFFORTS)}, a plan of plan_sparsify, "
        f"or the .json file of a recipe.{did_you_mean(effort, EFFORTS)}"
    )


def _family(model: Any) -> str:
    return str(model.config.model_type).removeprefix("sparse_")


def described_run(model: Any, plan: SparsifyPlan, batches: Batches) -> dict[str, Any]:
    """What a run must share with the one that it resumes."""
    return {
        "config": plan.config.to_dict(),
        "stages": [str(stage) for stage in plan.stages],
        "batches": [stage.batches for stage in plan.stages],
        "data": fingerprint(batches),
        "model": hash_weights(tensors_to_store(model)),
    }


def follow(
    model: nn.Module, plan: SparsifyPlan, targets: Targets, batches: Batches, work: Path | None
) -> SparsityReport:
    """Do what a plan says.

    Args:
        model: to be made sparse.
        plan: with estimates.
        targets: of its config.
        batches: its data.
        work: folder for finished work, and with that of an earlier run; None: nothing is kept.
    """
    start, first = time.perf_counter(), len(provenance_of(model).steps)
    distilled = any(stage.options.get("distilled") for stage in plan.stages)
    teacher = copy.deepcopy(model) if distilled else None
    done = 0 if work is None else restore_stages(model, work, len(plan.stages))
    bar = WholeRun("Sparsifying", plan.total_seconds)
    notes: list[str] = []
    report = measure_sparsity(model, plan.config)
    try:
        for number, stage in enumerate(plan.stages):
            seconds = plan.seconds[number]
            if number < done:
                bar.skip(sum(seconds))
                continue
            with bar.stage(str(stage), seconds):
                if stage.kind == PRUNE:
                    report = _prune(model, plan, stage, targets, batches, work)
                else:
                    report = _recover(model, stage, batches, teacher)
            notes += report.notes
            _name_recipe(model, plan, number)
            if work is not None:
                save_stage(model, work, number)
    finally:
        bar.close()
    method = report.method
    if method is None and len(steps := provenance_of(model).steps) > first:
        method = steps[-1].method  # an earlier run's, or that before what was taken back
    return replace(
        report,
        method=method,
        seconds=time.perf_counter() - start,
        notes=(*dict.fromkeys(notes), f"recipe {plan.digest}, effort {plan.effort}"),
    )


def _prune(
    model: nn.Module,
    plan: SparsifyPlan,
    stage: Stage,
    targets: Targets,
    batches: Batches,
    work: Path | None,
) -> SparsityReport:
    residence = None if work is None else KeptBlocks(work, targets)
    chosen = batches[: stage.batches]
    return prune_kept(model, plan.config, stage.method, chosen, None, stage.options, residence)


def _recover(
    model: Any, stage: Stage, batches: Batches, teacher: nn.Module | None
) -> SparsityReport:
    """Train the model; if that has not helped on the held-out batches, it is as before."""
    options = {name: value for name, value in stage.options.items() if name != "distilled"}
    if stage.options.get("distilled"):
        options["teacher"] = teacher
    held = batches[len(batches) - stage.held_out :] if stage.held_out else []
    kept = (
        {name: tensor.clone() for name, tensor in tensors_to_store(model).items()} if held else {}
    )
    known, before = provenance_of(model), held_out_loss(model, held)
    report = recover_(model, batches[: stage.batches], stage.method, **options)
    if not held:
        return report
    after = held_out_loss(model, held)
    told = f"loss on {len(held)} held-out batches: {before:.3f}, recovered {after:.3f}"
    if after < before:
        losses = {"held_out_loss_before": round(before, 3), "held_out_loss": round(after, 3)}
        _add_options_(model, losses)
        return replace(report, notes=(*report.notes, told))
    for name, tensor in tensors_to_store(model).items():
        tensor.data.copy_(kept[name])
    remember_(model, known)
    _add_options_(model, {f"recovery by {stage.method}": f"taken back: {told}"})
    counted = measure_sparsity(model)
    return replace(counted, notes=(f"{told}: it did not help, and was taken back",))


def _name_recipe(model: nn.Module, plan: SparsifyPlan, number: int) -> None:
    """Let the step of a stage name the recipe that it is a part of, for the card."""
    if "recipe" in dict(provenance_of(model).steps[-1].options):
        return  # of an earlier stage: this one was taken back
    place = f"stage {number + 1} of {len(plan.stages)}"
    _add_options_(model, {"effort": plan.effort, "recipe": f"{plan.digest}, {place}"})


def _add_options_(model: nn.Module, more: Mapping[str, Any]) -> None:
    """Tell more of the last step that a model remembers."""
    known = provenance_of(model)
    step = known.steps[-1]
    step = replace(step, options=pairs({**dict(step.options), **more}))
    remember_(model, replace(known, steps=(*known.steps[:-1], step)))
