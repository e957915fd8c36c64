"""The pictures of one model: each drawn from plain values, with the words that say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse.pages.drawing import HATCHES, MARKERS, SCALE, Colours, Picture
from hf_sparse.pages.facts import Files, Mask, Spread

# Columns of a heat map whose cells get numbers, labels of columns, panels of a picture.
_NUMBERED, _LABELLED, _PANELS = 8, 12, 8


def heat_map(
    name: str,
    title: str,
    rows: Sequence[str],
    columns: Sequence[int],
    values: Tensor,
    across: str,
) -> Picture:
    """Sparsity as a table of colours.

    Args:
        name: of the files.
        title: in a few words.
        rows: their names.
        columns: their numbers.
        values: fractions `(rows, columns)`, NaN where there is no matrix.
        across: what a column is.
    """
    known = values[~values.isnan()]
    least, most = (float(known.min()), float(known.max())) if len(known) else (0.0, 0.0)

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(
            values.numpy() * 100,
            cmap=SCALE,
            vmin=0,
            vmax=100,
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_yticks(range(len(rows)), labels=rows)
        step = -(-len(columns) // _LABELLED)
        axes.set_xticks(range(0, len(columns), step), labels=columns[::step])
        axes.set_xlabel(across)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks([place - 0.5 for place in range(1, len(columns))], minor=True)
        axes.set_yticks([place - 0.5 for place in range(1, len(rows))], minor=True)
        if len(columns) <= _NUMBERED:
            for place in (values >= 0).nonzero().tolist():
                share = float(values[tuple(place)])
                ink = "#101820" if share > 0.5 else "#ffffff"  # on the light end, on the dark one
                axes.text(*place[::-1], f"{share:.0%}", ha="center", va="center", color=ink)
        if len(columns) <= 64:
            axes.grid(which="minor", color=colours.paper, linewidth=1)
        axes.tick_params(which="minor", length=0)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("zeros, %")
        bar.outline.set_visible(False)

    alt = (
        f"Heat map of {len(rows)} rows ({_listed(rows)}) and {len(columns)} columns, "
        f"one per {across}: zeros from {least:.1%} to {most:.1%}."
    )
    return Picture(name, title, alt, draw, max(1.3, 0.7 + 0.24 * len(rows)))


def mask_window(name: str, mask: Mask) -> Picture:
    """The corner of a matrix, weight by weight."""
    rows, columns = mask.window.shape

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        _show_kept(axes, mask.window, colours)
        axes.set_xticks(range(0, columns, 8))
        axes.set_yticks(range(0, rows, 8))
        axes.set_xlabel("input (column of the weight)")
        axes.set_ylabel("output (row)")

    kept = float(mask.window.float().mean())
    alt = (
        f"The first {rows} rows and {columns} columns of {mask.name}: each nonzero weight is a filled "
        f"cell, each zero an empty one; {kept:.1%} are filled."
    )
    return Picture(
        name, f"The first {rows} x {columns} weights", alt, draw, 0.6 + 4.4 * rows / columns
    )


def _show_kept(axes: Any, window: Tensor, colours: Colours) -> None:
    """Nonzeros as filled cells: a picture of dots, so that it has one size whatever the pattern."""
    import numpy
    from matplotlib.colors import to_rgba

    rows, columns = window.shape
    cell, edge = 10, 1
    kept = window.numpy().repeat(cell, 0).repeat(cell, 1)
    inside = numpy.arange(cell) >= edge
    kept &= numpy.tile(inside, rows)[:, None] & numpy.tile(inside, columns)[None]
    dots = numpy.zeros((*kept.shape, 4))
    # A middle blue, seen on white and on black: a picture of dots has the same colours in both.
    dots[kept] = to_rgba("#3d8fc4")
    axes.imshow(dots, extent=(-0.5, columns - 0.5, rows - 0.5, -0.5), interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.tick_params(length=2)


def mask_whole(name: str, mask: Mask) -> Picture:
    """The whole matrix, in tiles."""
    rows, columns = mask.shape

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        image = axes.imshow(
            (1 - mask.tiles.numpy()) * 100,
            cmap=SCALE,
            vmin=0,
            vmax=100,
            extent=(0, columns, rows, 0),
            aspect="auto",
            interpolation="nearest",
        )
        axes.set_xlabel("input (column of the weight)")
        axes.set_ylabel("output (row)")
        axes.spines[:].set_visible(False)
        bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
        bar.set_label("zeros, %")
        bar.outline.set_visible(False)

    height, width = mask.tile
    alt = (
        f"The whole of {mask.name}, {rows} x {columns}, in tiles of about {height:.3g} x {width:.3g} "
        f"weights: tiles have from {1 - float(mask.tiles.max()):.1%} to "
        f"{1 - float(mask.tiles.min()):.1%} zeros; {mask.empty_rows} rows and {mask.empty_columns} "
        "columns are zero as a whole."
    )
    return Picture(name, f"The whole matrix, {rows} x {columns}", alt, draw, 3.0)


def histograms(name: str, spreads: Mapping[str, Spread]) -> Picture:
    """Nonzero weights of each kind of matrix, with those of the dense model behind."""
    shown = dict(list(spreads.items())[:_PANELS])
    with_dense = any(len(spread.before) for spread in shown.values())

    def draw(figure: Any, colours: Colours) -> None:
        rows = -(-len(shown) // 2)
        panels = figure.subplots(rows, 2, squeeze=False).flat
        for axes, (kind, spread) in zip(panels, shown.items(), strict=False):
            edges = _edges(spread)
            if len(spread.before):
                counts = torch.histogram(spread.before, edges).hist
                axes.stairs(
                    counts / max(len(spread.before), 1) * 100,
                    edges,
                    color=colours.before,
                    linestyle="--",
                    linewidth=1.2,
                    label="dense",
                )
            # Of the sparse model as a share of the dense sample, so that what went is seen to be gone.
            whole = len(spread.before) or len(spread.after)
            counts = torch.histogram(spread.after, edges).hist
            axes.stairs(
                counts / max(whole, 1) * 100,
                edges,
                fill=True,
                color=colours.after,
                alpha=0.75,
                label="this model",
            )
            axes.set_title(kind, loc="left")
            axes.tick_params(labelsize=9)
            axes.locator_params(nbins=4)
        for axes in list(figure.axes)[len(shown) :]:
            axes.remove()
        figure.supxlabel("weight", fontsize="medium", color=colours.soft)
        figure.supylabel("% of the weights", fontsize="medium", color=colours.soft)
        if with_dense:
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper right", ncols=2)

    behind = ", with those of the dense model as a dashed line" if with_dense else ""
    alt = (
        f"Histograms of the nonzero weights of {_listed(list(shown))}{behind}. The table below has "
        "their quantiles."
    )
    height = 0.7 + 1.25 * -(-len(shown) // 2)
    return Picture(name, "Weights that are not zero", alt, draw, height)


def _edges(spread: Spread) -> Tensor:
    """60 bins over the middle 99.8 % of the weights."""
    values = torch.cat([spread.after, spread.before])
    if not len(values):
        return torch.linspace(-1, 1, 61)
    reach = (
        float(values.abs().quantile(0.998)) if len(values) < 1 << 24 else float(values.abs().max())
    )
    return torch.linspace(-1, 1, 61) * (reach or 1.0)


def bars(
    name: str,
    title: str,
    values: Mapping[str, float],
    unit: str,
    told: str,
) -> Picture:
    """One horizontal bar for each value, with its figure beside."""

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        names = list(values)
        drawn = axes.barh(names, list(values.values()), color=colours.after, height=0.62)
        axes.bar_label(
            drawn, [f"{value:,.2f}" for value in values.values()], padding=4, color=colours.ink
        )
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.margins(x=0.14)
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="x")

    figures = ", ".join(f"{key} {value:,.2f}" for key, value in values.items())
    return Picture(
        name, title, f"{told}: {figures} {unit}.", draw, 0.75 + 0.3 * max(len(values), 2)
    )


def sizes(name: str, files: Files) -> Picture:
    """Bytes of a folder in one bar of parts, above what dense weights would take."""
    parts = {part: size / 1e6 for part, size in files.parts.items()}

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        shades = (colours.after, colours.before, colours.third, colours.soft)
        start = 0.0
        for number, (part, size) in enumerate(parts.items()):
            axes.barh(
                "this folder",
                size,
                left=start,
                color=shades[number % len(shades)],
                hatch=HATCHES[number % len(HATCHES)],
                edgecolor=colours.paper,
                linewidth=0.5,
                height=0.6,
                label=f"{part}, {megabytes(size)}",
            )
            start += size
        if files.dense is not None:
            other = start - files.weights / 1e6
            axes.barh(
                "stored dense",
                files.dense / 1e6 + other,
                color="none",
                edgecolor=colours.soft,
                linestyle="--",
                height=0.6,
                label=f"all weights in place, {megabytes(files.dense / 1e6 + other)}",
            )
        axes.invert_yaxis()
        axes.set_xlabel("MB")
        axes.spines["left"].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="x")
        figure.legend(loc="outside lower center", ncols=1)

    told = ", ".join(f"{part} {megabytes(size)}" for part, size in parts.items())
    dense = (
        "" if files.dense is None else f" The weights would take {files.dense / 1e6:,.2f} MB dense."
    )
    height = 1.5 + 0.21 * (len(parts) + 1)
    return Picture(name, "Sizes of files by part", f"Bars: {told}.{dense}", draw, height)


def distances(name: str, values: Mapping[str, Mapping[int, float]]) -> Picture:
    """How far each matrix is from the dense one, a line for each kind over the blocks."""
    shown = dict(list(values.items())[:_PANELS])
    styles = ("-", "--", "-.", ":")

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        shades = (colours.after, colours.before, colours.third, colours.soft)
        for number, (kind, found) in enumerate(shown.items()):
            axes.plot(
                list(found),
                [value * 100 for value in found.values()],
                color=shades[number % 4],
                linestyle=styles[(number // 4 + number) % 4],
                marker=MARKERS[number],
                markersize=3.5,
                linewidth=1.2,
                label=kind,
            )
        axes.set_xlabel("block")
        axes.set_ylabel("% of the dense norm")
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2)

    every = [value for found in shown.values() for value in found.values()] or [0.0]
    alt = (
        f"Distance of each matrix from the dense one, by block and kind ({_listed(list(shown))}): "
        f"from {min(every):.1%} to {max(every):.1%} of the dense matrix's norm."
    )
    return Picture(
        name, "Distance from the dense weights", alt, draw, 2.7 + 0.2 * -(-len(shown) // 2)
    )


def megabytes(size: float) -> str:
    """A number of megabytes in a few digits."""
    if size < 0.01:
        return f"{size:.1g} MB"
    return f"{size:,.{0 if size >= 1000 else 1 if size >= 10 else 2}f} MB"


def _listed(names: Sequence[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"
