"""What zero-shot tasks have shown: shares of right answers with standard errors, dense beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hf_sparse.counts import format_table
from hf_sparse.provenance.values import Metric
from hf_sparse.zeroshot.examples import Example
from hf_sparse.zeroshot.likelihood import Likelihood

# What a task may measure, in the order of tables.
_MEASURES = ("acc", "acc_norm", "perplexity")


@dataclass(frozen=True)
class TaskScores:
    """The figures of one model on one task.

    Attributes:
        task: its name.
        examples: how many were asked.
        acc: share of right answers, the choice of the highest likelihood; of single continuations
            the share that is greedy, token for token. In `[0, 1]`.
        acc_stderr: its standard error; None of a single example.
        acc_norm: share of right answers by the likelihood over the number of characters; None where
            it has no meaning.
        acc_norm_stderr: its standard error.
        perplexity: of single continuations: `exp` of the mean of `-log p`; None elsewhere.
        cut: contexts that have lost their beginning, since the model takes no more tokens.
    """

    task: str
    examples: int
    acc: float
    acc_stderr: float | None = None
    acc_norm: float | None = None
    acc_norm_stderr: float | None = None
    perplexity: float | None = None
    cut: int = 0

    @classmethod
    def of(
        cls,
        task: str,
        examples: Sequence[Example],
        found: Sequence[Sequence[Likelihood]],
        *,
        normalised: bool,
        cut: int,
    ) -> TaskScores:
        """Score the answers to a task.

        Args:
            task: its name.
            examples: its questions.
            found: the likelihood of each of their requests.
            normalised: whether `acc_norm` is told.
            cut: see above.
        """
        groups = [example.group for example in examples]
        right = [_is_right(example, own) for example, own in zip(examples, found, strict=True)]
        acc, acc_stderr = _mean(right, groups)
        norm, norm_stderr, perplexity = None, None, None
        if normalised and examples[0].lengths:
            by_length = [
                _best([one.log / length for one, length in zip(own, example.lengths, strict=True)])
                == example.label
                for example, own in zip(examples, found, strict=True)
            ]
            norm, norm_stderr = _mean(by_length, groups)
        if examples[0].label is None:
            mean = -sum(own[0].log for own in found) / len(found)
            perplexity = math.exp(mean) if mean < 700 else math.inf
        return cls(task, len(examples), acc, acc_stderr, norm, norm_stderr, perplexity, cut)


def _is_right(example: Example, found: Sequence[Likelihood]) -> bool:
    if example.label is None:
        return found[0].greedy
    return _best([one.log for one in found]) == example.label


def _best(values: Sequence[float]) -> int:
    """The first of the greatest, as lm-evaluation-harness breaks ties."""
    return values.index(max(values))


def _mean(right: Sequence[bool], groups: Sequence[str | None]) -> tuple[float, float | None]:
    """The mean of the groups' means, and its standard error."""
    members: dict[str | None, list[bool]] = {}
    for value, group in zip(right, groups, strict=True):
        members.setdefault(group, []).append(value)
    means, variance = [], 0.0
    for values in members.values():
        mean, count = sum(values) / len(values), len(values)
        means.append(mean)
        variance += mean * (1 - mean) / (count - 1) if count > 1 else math.inf
    error = math.sqrt(variance) / len(means)
    return sum(means) / len(means), error if math.isfinite(error) else None


@dataclass(frozen=True)
class ChoiceReport:
    """The figures of a model on zero-shot tasks, and those of the dense one beside it.

    `print` shows them as a table.

    Attributes:
        scores: of the model, a task each.
        dense: of the dense model; empty if none was given.
        seconds: that it took.
    """

    scores: tuple[TaskScores, ...]
    dense: tuple[TaskScores, ...] = ()
    seconds: float | None = None

    def __getitem__(self, task: str) -> TaskScores:
        """The model's figures on a task."""
        for score in self.scores:
            if score.task == task:
                return score
        raise KeyError(task)

    @property
    def mean(self) -> float:
        """Mean of `acc` over the tasks."""
        return sum(score.acc for score in self.scores) / len(self.scores)

    @property
    def dense_mean(self) -> float | None:
        """Mean of `acc` over the tasks, of the dense model."""
        return sum(score.acc for score in self.dense) / len(self.dense) if self.dense else None

    @property
    def metrics(self) -> list[Metric]:
        """The figures for a model card: `save_pretrained(..., metrics=report.metrics)`."""
        found = []
        dense = {score.task: score for score in self.dense}
        for score in self.scores:
            for measure in _MEASURES:
                value, error = getattr(score, measure), getattr(score, f"{measure}_stderr", None)
                if value is None:
                    continue
                told = "" if error is None else f", standard error {error:.4f}"
                name = f"zero-shot {score.task}, {measure}, {score.examples:,} examples{told}"
                beside = getattr(dense[score.task], measure) if dense else None
                found.append(Metric(name, value, beside))
        if len(self.scores) > 1:
            name = f"zero-shot mean of acc over {len(self.scores)} tasks"
            found.append(Metric(name, self.mean, self.dense_mean))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        described = asdict(self)
        for score in (*described["scores"], *described["dense"]):
            if score["perplexity"] is not None and not math.isfinite(score["perplexity"]):
                score["perplexity"] = None
        return {**described, "mean": self.mean, "dense_mean": self.dense_mean}

    def __str__(self) -> str:
        dense = dict(zip((score.task for score in self.scores), self.dense, strict=False))
        head = ["task", "examples", "measure", "value", "standard error"]
        rows = []
        for score in self.scores:
            for measure in _MEASURES:
                value, error = getattr(score, measure), getattr(score, f"{measure}_stderr", None)
                if value is None:
                    continue
                row = [score.task, f"{score.examples:,}", measure, f"{value:.4f}"]
                row.append("" if error is None else f"{error:.4f}")
                rows.append(
                    [*row, *([f"{getattr(dense[score.task], measure):.4f}"] if dense else [])]
                )
        if len(self.scores) > 1:
            row = ["mean", "", "acc", f"{self.mean:.4f}", ""]
            rows.append([*row, *([f"{self.dense_mean:.4f}"] if dense else [])])
        notes = [
            f"{score.task}: {score.cut:,} texts were too long for the model: their beginnings were cut"
            for score in self.scores
            if score.cut
        ]
        return "\n".join([format_table([*head, *(["dense"] if dense else [])], rows), *notes])
