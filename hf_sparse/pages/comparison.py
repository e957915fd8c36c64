"""Several models side by side: a table, and quality against size and time with its front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hf_sparse.pages.drawing import MARKERS, Colours, Picture
from hf_sparse.pages.facts import ModelFacts
from hf_sparse.pages.sections import Section, Shown, Table

# Words at the start of a metric's name that tell which way is better.
_LOWER = ("perplexity", "loss", "error", "bits", "nll", "cross-entropy", "wer", "rmse", "mse")
_HIGHER = (
    *("accuracy", "acc", "f1", "exact match", "matthews", "mcc", "pearson", "spearman", "recall"),
    *("precision", "bleu", "rouge", "zero-shot", "top-1", "auc", "score"),
)
# The way whose time stands for a model, the first that was measured.
_WAYS = ("compiled", "ONNX Runtime", "torch")


@dataclass(frozen=True)
class Point:
    """A model, or the dense one that it was measured beside, in a plane of cost and quality."""

    name: str
    cost: float
    quality: float
    dense: bool = False


def better(metric: str) -> str | None:
    """Whether `"lower"` or `"higher"` figures of a metric are better, as its name tells; else None."""
    name = metric.lower().replace("word error", "wer")
    for way, words in (("lower", _LOWER), ("higher", _HIGHER)):
        if any(name.startswith(word) for word in words):
            return way
    return None


def front(points: Sequence[Point], way: str) -> list[Point]:
    """The points that no other one beats: none costs less, or the same, and is better.

    Returns:
        By cost; of points that are equal in both the first.
    """
    sign = 1 if way == "higher" else -1
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, -sign * point.quality)):
        if not found or sign * point.quality > sign * found[-1].quality:
            found.append(point)
    return found


def comparison(models: Sequence[ModelFacts]) -> Section:
    """A section with all models of a page."""
    table = _table(models)
    shown = []
    names = list(dict.fromkeys(m.name for facts in models for m in facts.provenance.metrics))
    for number, metric in enumerate(names, 1):
        for cost, unit in (("size", "MB of weight files"), ("time", "ms of a call")):
            points = _points(models, metric, cost)
            if len(points) >= 2:
                shown.append(_plane(f"pareto-{cost}-{number}", metric, unit, points))
    words = []
    if len(models) > 1 and not shown:
        words.append(
            "No quality against size is drawn: no two of these models were measured by the same "
            "metric and have files."
        )
    elif shown:
        words.append(
            "The line is the front: no other point costs less and is better. Hollow points are the "
            "dense models that were measured beside."
        )
    title = "Side by side" if len(models) > 1 else "At a glance"
    return Section("overview", title, tuple(words), tuple(shown), (table,))


def _table(models: Sequence[ModelFacts]) -> Table:
    names = list(dict.fromkeys(m.name for facts in models for m in facts.provenance.metrics))[:6]
    times = any(facts.latency for facts in models)
    head = (
        *("model", "class", "pattern", "sparsity", "whole model", "weights", "MB", "MB dense"),
        *(("ms",) if times else ()),
        *names,
    )
    rows = []
    for facts in models:
        report, files, measured = facts.report, facts.files, dict[str, str]()
        for metric in facts.provenance.metrics:
            beside = "" if metric.dense is None else f" (dense {metric.dense:.4g})"
            measured[metric.name] = f"{metric.sparse:.4g}{beside}"
        cost = _time(facts)
        rows.append(
            (
                facts.title,
                facts.architecture.removeprefix("Sparse") or "not known",
                facts.promised or "none promised",
                f"{report.sparsity:.2%}",
                f"{report.model_sparsity:.2%}",
                f"{report.parameters:,}",
                "in memory" if files is None else f"{files.weights / 1e6:,.2f}",
                "" if files is None or files.dense is None else f"{files.dense / 1e6:,.2f}",
                *(("" if cost is None else f"{cost:,.2f}",) if times else ()),
                *(measured.get(name, "not measured") for name in names),
            )
        )
    return Table("All models of this page", head, tuple(rows), folded=False)


def _time(facts: ModelFacts) -> float | None:
    if facts.latency is None:
        return None
    times = {one.name: one.median for one in facts.latency.forward}
    return next((times[way] for way in _WAYS if way in times), None)


def _points(models: Sequence[ModelFacts], metric: str, cost: str) -> list[Point]:
    points: list[Point] = []
    for facts in models:
        for found in facts.provenance.metrics:
            if found.name != metric:
                continue
            files = facts.files
            dense: float | None
            if cost == "size":
                own = None if files is None else files.weights / 1e6
                dense = None if files is None or files.dense is None else files.dense / 1e6
            else:
                own = _time(facts)
                times = {} if facts.latency is None else dict(_medians(facts))
                dense = times.get("torch")
            if own is not None and math.isfinite(found.sparse):
                points.append(Point(facts.title, own, found.sparse))
            if dense is not None and found.dense is not None and math.isfinite(found.dense):
                point = Point(f"dense, beside {facts.title}", dense, found.dense, dense=True)
                same = [p for p in points if p.dense and p.quality == point.quality]
                if not any(abs(p.cost - point.cost) < 0.01 * point.cost for p in same):
                    points.append(point)
    return points


def _medians(facts: ModelFacts) -> list[tuple[str, float]]:
    return [] if facts.latency is None else [(m.name, m.median) for m in facts.latency.forward]


def _plane(name: str, metric: str, unit: str, points: Sequence[Point]) -> Shown:
    way = better(metric)
    best = [] if way is None else front(points, way)

    def draw(figure: Any, colours: Colours) -> None:
        axes = figure.add_subplot()
        if len(best) > 1:
            axes.plot(
                [point.cost for point in best],
                [point.quality for point in best],
                color=colours.line,
                linewidth=2,
                zorder=1,
            )
        shades = (colours.after, colours.before, colours.third, colours.soft)
        for number, point in enumerate(points):
            shade = shades[number % len(shades)]
            axes.scatter(
                point.cost,
                point.quality,
                s=46,
                marker=MARKERS[number % len(MARKERS)],
                facecolor=colours.paper if point.dense else shade,
                edgecolor=shade,
                linewidth=1.5,
                label=point.name,
                zorder=2,
            )
        axes.set_xlabel(unit)
        axes.set_ylabel(metric if len(metric) <= 34 else f"{metric[:33]}…")
        axes.set_xlim(left=0)
        axes.margins(x=0.1, y=0.15)
        axes.grid()
        if way == "lower" and min(point.quality for point in points) > 0 and _spans(points):
            axes.set_yscale("log")
        figure.legend(loc="outside lower center", ncols=1)

    told = f", {way} is better" if way else ""
    title = f"{metric}{told}, against {unit}"
    figures = "; ".join(f"{p.name}: {p.cost:,.2f} and {p.quality:.4g}" for p in points)
    picture = Picture(name, title, f"Points of {title}: {figures}.", draw, 2.8 + 0.21 * len(points))
    on_front = {id(point) for point in best}
    rows = tuple(
        (p.name, f"{p.cost:,.2f}", f"{p.quality:.4g}", "yes" if id(p) in on_front else "no")
        for p in points
    )
    head = ("model", unit, metric, "on the front")
    return Shown(picture, Table(title, head, rows))


def _spans(points: Sequence[Point]) -> bool:
    qualities = [point.quality for point in points]
    return max(qualities) > 20 * min(qualities)
