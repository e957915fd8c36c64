"""The sections about matrices: the zeros of one, the weights of all, their distance from dense."""

from __future__ import annotations

import statistics

import torch

from hf_sparse.pages import pictures
from hf_sparse.pages.facts import GROUP, Mask, ModelFacts
from hf_sparse.pages.names import Place
from hf_sparse.pages.sections import Section, Shown, Table, cut, grid, grid_table


def one_matrix(key: str, facts: ModelFacts) -> Section | None:
    """The section; None if there is nothing to show."""
    mask = facts.mask
    if mask is None:
        return None
    words: tuple[str, ...] = (
        f"{mask.name}, {mask.shape[0]:,} rows x {mask.shape[1]:,} columns. {mask.empty_rows:,} rows "
        f"and {mask.empty_columns:,} columns are zero as a whole.",
    )
    height, width = mask.tile
    tiles = _tiles_table(mask)
    shown: tuple[Shown, ...] = (
        Shown(pictures.mask_window(f"{key}-mask", mask), _groups_table(mask)),
    )
    if mask.window.shape != mask.shape:
        shown += (Shown(pictures.mask_whole(f"{key}-matrix", mask), tiles),)
    if max(height, width) > 1:
        words += (
            f"The picture of the whole is in tiles of about {height:.3g} x {width:.3g} weights.",
        )
    return Section(f"{key}-mask", "One matrix from near by", words, shown)


def _groups_table(mask: Mask) -> Table:
    total = max(sum(mask.groups), 1)
    rows = tuple(
        (f"{number} of {GROUP}", f"{count:,}", f"{count / total:.2%}")
        for number, count in enumerate(mask.groups)
    )
    caption = f"Nonzeros among {GROUP} weights side by side in a row, whole matrix"
    return Table(caption, ("nonzeros", "groups", "share"), rows)


def _tiles_table(mask: Mask) -> Table:
    """The whole matrix in eight parts each way."""
    whole = torch.nn.functional.adaptive_avg_pool2d(
        mask.tiles[None], (min(8, len(mask.tiles)), min(8, mask.tiles.shape[1]))
    )[0]
    rows = tuple(
        (f"rows, part {number}", *(f"{1 - value:.2%}" for value in cells))
        for number, cells in enumerate(whole.tolist(), 1)
    )
    head = ("", *(f"columns, part {number}" for number in range(1, whole.shape[1] + 1)))
    return Table("Zeros in parts of the matrix", head, rows)


def weights(key: str, facts: ModelFacts) -> Section | None:
    """The section; None if there is nothing to show."""
    if not any(len(spread.after) for spread in facts.spreads.values()):
        return None
    lines = []
    for kind, spread in facts.spreads.items():
        for model, values in (("this model", spread.after), ("dense", spread.before)):
            if len(values):
                size = values.abs().double()
                points = size.quantile(torch.tensor([0.01, 0.5, 0.99], dtype=torch.float64))
                lines.append(
                    (
                        f"{kind}, {model}",
                        f"{len(values):,}{' sampled' if spread.sampled else ''}",
                        *(f"{point:.3g}" for point in points.tolist()),
                    )
                )
    head = ("matrix", "nonzeros", "1 % smaller than", "half", "99 %")
    table = Table("Sizes of nonzero weights, |w|", head, cut(lines))
    picture = pictures.histograms(f"{key}-weights", facts.spreads)
    sampled = any(spread.sampled for spread in facts.spreads.values())
    words = (
        ("A sample of the weights, at even distances; all other figures here are of all weights.",)
        if sampled
        else ()
    )
    return Section(f"{key}-weights", "Weights", words, shown=(Shown(picture, table),))


def distances(key: str, facts: ModelFacts) -> Section | None:
    """The section; None if there is nothing to show."""
    if not facts.changes:
        return None
    found: dict[str, dict[int, list[float]]] = {}
    for change in facts.changes:
        place = Place.of(change.name)
        found.setdefault(place.kind, {}).setdefault(place.block or 0, []).append(change.relative)
    means = {
        kind: {block: statistics.fmean(values) for block, values in sorted(cells.items())}
        for kind, cells in found.items()
    }
    kinds, blocks = list(means), sorted({block for row in means.values() for block in row})
    values = grid(means, kinds, blocks)
    title = "Distance from the dense weights"
    table = grid_table(title, "block", kinds, blocks, values)
    words = (
        f"Of each matrix ||W - W0|| / ||W0||, W0 from {facts.base}: what the weights lost, and what "
        "an update of those that stayed changed. It is no measure of quality.",
    )
    picture = pictures.distances(f"{key}-distances", means)
    return Section(f"{key}-distances", title, words, (Shown(picture, table),))
