"""What stands on a page about one model, section by section."""

from __future__ import annotations

from collections.abc import Iterable

from hf_sparse.checkpoint.card import step_rows
from hf_sparse.counts import TensorSparsity
from hf_sparse.pages import pictures
from hf_sparse.pages.facts import ModelFacts
from hf_sparse.pages.matrix_sections import distances, one_matrix, weights
from hf_sparse.pages.names import Place
from hf_sparse.pages.sections import ModelPage, Section, Shown, Table, grid, grid_table
from hf_sparse.timing import Benchmark


def model_page(key: str, facts: ModelFacts) -> ModelPage:
    """The page of one model.

    Args:
        key: a short name for anchors and files, such as `model-1`.
        facts: what is known.
    """
    sections = [
        _done(key, facts),
        _measured(key, facts),
        _sparsity(key, facts),
        _experts(key, facts),
        weights(key, facts),
        distances(key, facts),
        _sizes(key, facts),
        _latency(key, facts.latency),
        one_matrix(key, facts),  # the only one as wide as the page
    ]
    subtitle = " · ".join(
        text for text in (facts.architecture.removeprefix("Sparse"), facts.source) if text
    )
    found = tuple(section for section in sections if section is not None)
    return ModelPage(key, facts.title, subtitle, _figures(facts), found)


def _figures(facts: ModelFacts) -> tuple[tuple[str, str], ...]:
    report = facts.report
    told = [
        (f"{report.sparsity:.1%}", "zeros in the target weights"),
        (f"{report.model_sparsity:.1%}", "zeros in the whole model"),
        (_counted(report.parameters), "weights in all"),
    ]
    if facts.promised:
        told.insert(0, (facts.promised, "pattern"))
    if facts.files is not None:
        dense = facts.files.dense
        beside = "" if dense is None else f", {pictures.megabytes(dense / 1e6)} if stored dense"
        told.append((pictures.megabytes(facts.files.weights / 1e6), f"of weight files{beside}"))
    for metric in facts.provenance.metrics[:2]:
        beside = "" if metric.dense is None else f", dense {metric.dense:.4g}"
        told.append((f"{metric.sparse:.4g}", f"{metric.name}{beside}"))
    return tuple(told)


def _counted(number: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:,.1f} {letter}"
    return str(number)


def _done(key: str, facts: ModelFacts) -> Section:
    provenance = facts.provenance
    base = provenance.base_model or "not recorded"
    words = [f"Base model: {base}."]
    if not provenance.steps:
        words.append("No step was recorded in this model.")
    tables = []
    for number, step in enumerate(provenance.steps, 1):
        caption = f"Step {number}: {step.method}" if len(provenance.steps) > 1 else step.method
        rows = tuple(row for row in step_rows(step) if row[0] != "method")
        tables.append(Table(caption, ("", ""), rows, folded=len(provenance.steps) > 3))
    return Section(f"{key}-done", "What was done", (*words, *facts.notes), tables=tuple(tables))


def _measured(key: str, facts: ModelFacts) -> Section:
    metrics = facts.provenance.metrics
    if not metrics:
        words = (
            "No quality was measured, or none was recorded. hf-sparse eval measures it; give the "
            "figures to save_pretrained as metrics=[Metric(...)].",
        )
        return Section(f"{key}-quality", "Quality", words)
    rows = tuple(
        (
            metric.name,
            "not measured" if metric.dense is None else f"{metric.dense:.4g}",
            f"{metric.sparse:.4g}",
            "" if not metric.dense else f"{metric.sparse / metric.dense - 1:+.1%}",
        )
        for metric in metrics
    )
    head = ("metric", "dense", "this model", "difference")
    return Section(
        f"{key}-quality", "Quality", tables=(Table("Measured figures", head, rows, folded=False),)
    )


def _by_stack(facts: ModelFacts) -> dict[str, list[tuple[Place, TensorSparsity]]]:
    found: dict[str, list[tuple[Place, TensorSparsity]]] = {}
    for place, tensor in facts.places:
        if place.block is not None:
            found.setdefault(place.stack, []).append((place, tensor))
    return found


def _sparsity(key: str, facts: ModelFacts) -> Section:
    shown = []
    for number, (stack, found) in enumerate(_by_stack(facts).items(), 1):
        pooled = _pooled((place.kind, place.block or 0, tensor) for place, tensor in found)
        kinds, blocks = list(pooled), sorted({block for row in pooled.values() for block in row})
        values = grid(pooled, kinds, blocks)
        title = f"Zeros by block and matrix: {stack or 'blocks'}"
        picture = pictures.heat_map(
            f"{key}-sparsity-{number}", title, kinds, blocks, values, "block"
        )
        shown.append(Shown(picture, grid_table(title, "block", kinds, blocks, values)))
    report = facts.report
    words = [
        f"{report.zeros:,} of {report.numel:,} target weights are zero ({report.sparsity:.2%}), in "
        f"{len(report.tensors)} matrices."
    ]
    if report.violations:
        words.append(f"{report.violations:,} groups break the pattern {report.pattern}.")
    alone = tuple(
        (tensor.name, *_row(tensor)) for place, tensor in facts.places if place.block is None
    )
    head = ("matrix", "rows x columns", "zeros", "sparsity")
    tables = (Table("Matrices outside of blocks", head, alone),) if alone else ()
    return Section(f"{key}-sparsity", "Where the zeros are", tuple(words), tuple(shown), tables)


def _row(tensor: TensorSparsity) -> tuple[str, str, str]:
    rows, columns = tensor.shape
    return f"{rows} x {columns}", f"{tensor.zeros:,}", f"{tensor.sparsity:.2%}"


def _experts(key: str, facts: ModelFacts) -> Section | None:
    found = [
        (f"block {place.block}", place.expert, tensor)
        for place, tensor in facts.places
        if place.expert is not None
    ]
    if not found:
        return None
    pooled = _pooled(found)
    rows, experts = list(pooled), sorted({expert for row in pooled.values() for expert in row})
    values = grid(pooled, rows, experts)
    title = "Zeros by block and expert"
    picture = pictures.heat_map(f"{key}-experts", title, rows, experts, values, "expert")
    table = grid_table(title, "expert", rows, experts, values)
    return Section(f"{key}-experts", "Experts", shown=(Shown(picture, table),))


def _pooled(
    found: Iterable[tuple[str, int, TensorSparsity]],
) -> dict[str, dict[int, float]]:
    """The sparsity of all matrices of a row and a column together."""
    counts: dict[str, dict[int, list[int]]] = {}
    for row, column, tensor in found:
        cell = counts.setdefault(row, {}).setdefault(column, [0, 0])
        cell[0] += tensor.zeros
        cell[1] += tensor.numel
    return {
        row: {column: zeros / max(numel, 1) for column, (zeros, numel) in cells.items()}
        for row, cells in counts.items()
    }


def _sizes(key: str, facts: ModelFacts) -> Section | None:
    files = facts.files
    if files is None:
        return None
    rows = [(part, f"{size:,}", f"{size / 1e6:,.2f}") for part, size in files.parts.items()]
    total = sum(files.parts.values())
    rows.append(("all files", f"{total:,}", f"{total / 1e6:,.2f}"))
    if files.dense is not None:
        rows.append(
            ("weight files, if stored dense", f"{files.dense:,}", f"{files.dense / 1e6:,.2f}")
        )
    table = Table("Sizes of files by part", ("part", "bytes", "MB"), tuple(rows))
    picture = pictures.sizes(f"{key}-sizes", files)
    return Section(f"{key}-sizes", "Files", shown=(Shown(picture, table),))


def _latency(key: str, found: Benchmark | None) -> Section | None:
    if found is None:
        return None
    times = {one.name: one.median for one in found.forward}
    rows = tuple(
        (
            one.name,
            f"{one.median:,.2f}",
            f"{min(one.milliseconds):,.2f}",
            str(len(one.milliseconds)),
        )
        for one in found.forward
    )
    head = ("way", "median ms", "least ms", "calls")
    what = f"{found.batch} x {found.tokens} tokens, {found.threads} threads"
    words = (
        f"One call with {what} on {found.processor}, machine code for {found.target}, all ways in "
        "turns. Other programs on the machine slow them all down.",
    )
    picture = pictures.bars(
        f"{key}-latency", "Time of a call", times, "ms", f"Bars, medians of a call with {what}"
    )
    table = Table("Time of a call", head, rows)
    return Section(f"{key}-latency", "Time on this machine", words, (Shown(picture, table),))
