"""What the training examples share: their sparsity arguments, and dense beside sparse.

Each example trains the dense model and then, from the same start and with the same budget, the
sparse one; saves the sparse model; loads it back with its Auto class; and prints both scores.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments

import hf_sparse
from hf_sparse.report import format_table
from hf_sparse_cli.words import in_flags

OPTIMIZERS = ("sparse_adamw", "magnitude", "movement", "none")


class WrongArgumentError(ValueError):
    """What was asked for cannot be done; the message tells why."""


def run(main: Callable[[], Any]) -> None:
    """Run an example as a program, which tells wrong arguments in a sentence."""
    try:
        main()
    except WrongArgumentError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


@dataclass
class SparsityArguments:
    """How sparse the model becomes, and how."""

    model_name_or_path: str = field(
        metadata={"help": "Hub name or folder of the model to start from."}
    )
    pattern: str = field(
        default="unstructured", metadata={"help": "unstructured, 2:4, block:4x1, ..."}
    )
    sparsity: float | None = field(
        default=None, metadata={"help": "Fraction of zeros; needed, but for N:M."}
    )
    targets: list[str] | None = field(
        default=None, metadata={"help": "Layers to be sparse, such as query key; all by default."}
    )
    ignore: list[str] | None = field(default=None, metadata={"help": "Layers to leave dense."})
    optimizer: str = field(
        default="sparse_adamw",
        metadata={
            "help": "How the zeros come; none trains the dense model only.",
            "choices": OPTIMIZERS,
        },
    )
    penalty: str = field(default="l0", metadata={"help": "Of sparse_adamw: see docs/training.md."})
    schedule: str = field(default="cubic", metadata={"help": "constant, linear or cubic."})
    begin: float = field(
        default=0.1, metadata={"help": "Fraction of the run before the first zeros."}
    )
    end: float = field(default=0.6, metadata={"help": "Fraction after which the zeros are frozen."})
    distil: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the dense model's hidden states and logits as a teacher; 0: none."
        },
    )
    dense_model: str | None = field(
        default=None,
        metadata={"help": "A dense model trained on the task, instead of training one."},
    )
    smoke: bool = field(
        default=False,
        metadata={"help": "10 steps on 32 examples, to try it; the scores mean nothing."},
    )

    def config(self) -> hf_sparse.SparsityConfig:
        """The wanted sparsity."""
        return hf_sparse.SparsityConfig(self.pattern, self.sparsity, self.targets, self.ignore)

    def callback(self) -> hf_sparse.SparsityCallback:
        """What leads there."""
        return hf_sparse.SparsityCallback(
            self.config(),
            method="proximal" if self.optimizer == "sparse_adamw" else self.optimizer,
            schedule=hf_sparse.Schedule(self.schedule, self.begin, self.end),
        )


@dataclass
class DataArguments:
    """Where the examples come from: the Hub, or two files."""

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name of a data set."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(default=None, metadata={"help": "File to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "File to evaluate on."})


def load_splits(data: DataArguments, read: Callable[[str], Any] | None = None) -> Any:
    """The splits `train` and `validation`.

    Args:
        data: where from.
        read: a data set from a file, where `datasets` does not know the layout.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise WrongArgumentError(
            "data sets are read by the package datasets, which is not installed: "
            "pip install 'hf_sparse[train]'"
        ) from error
    if data.dataset_name:
        return load_dataset(data.dataset_name, data.dataset_config)
    if not (data.train_file and data.validation_file):
        raise WrongArgumentError("wanted --dataset_name, or --train_file and --validation_file.")
    files = {"train": data.train_file, "validation": data.validation_file}
    if missing := [file for file in files.values() if not Path(file).is_file()]:
        raise WrongArgumentError(f"there is no file {', '.join(missing)}.")
    if read:
        return {name: read(file) for name, file in files.items()}
    kind = {".csv": "csv", ".txt": "text"}.get(Path(data.train_file).suffix, "json")
    options = {"sample_by": "paragraph"} if kind == "text" else {}
    return load_dataset(kind, data_files=files, **options)


def parse(data_arguments: type, argv: list[str] | None) -> tuple[SparsityArguments, Any, Any]:
    """Read the command line: sparsity, data and Trainer arguments."""
    parser = HfArgumentParser((SparsityArguments, data_arguments, TrainingArguments))
    sparsity, data, training = parser.parse_args_into_dataclasses(argv)
    training.dataloader_pin_memory &= torch.cuda.is_available()
    if sparsity.optimizer != "none":  # refuse nonsense before anything is loaded
        try:
            sparsity.callback()
            hf_sparse.trainer_optimizer(sparsity.config(), lr=1.0, penalty=sparsity.penalty)
        except ValueError as error:
            raise WrongArgumentError(in_flags(str(error))) from error
    if not 0 <= sparsity.distil < float("inf"):
        raise WrongArgumentError(f"--distil is {sparsity.distil}; wanted a number >= 0.")
    if str(training.resume_from_checkpoint).lower() == "true":
        training = dataclasses.replace(training, resume_from_checkpoint=True)
    if sparsity.smoke:
        training = dataclasses.replace(training, max_steps=10, logging_steps=2, report_to=[])
    return sparsity, data, training


def load(auto_class: Any, path: str, **changes: Any) -> Any:
    """A model of the Auto class; a Sparse class where the family has one."""
    config = AutoConfig.from_pretrained(path, **changes)
    sparse = getattr(hf_sparse, f"Sparse{type(config).__name__}", None)
    if sparse is not None:
        config = sparse.from_pretrained(path, **changes)
    return auto_class.from_pretrained(path, config=config)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model, with room for pads at the right: positions are counted from left."""
    return AutoTokenizer.from_pretrained(path, padding_side="right")


def few(dataset: Any, smoke: bool) -> Any:
    """The data set, or the first 32 examples of it."""
    return dataset.select(range(min(32, len(dataset)))) if smoke else dataset


@dataclass
class Task:
    """What an example does besides sparsity.

    Attributes:
        auto_class: loads the models.
        make_trainer: `(model, **arguments of Trainer)`; `args` may be others than the parsed.
        evaluate: scores of a trainer's model by name.
        tokenizer: saved with the model.
        settings: of the config, to load the dense model with.
    """

    auto_class: Any
    make_trainer: Callable[..., Trainer]
    evaluate: Callable[[Trainer], dict[str, float]]
    tokenizer: Any
    settings: dict[str, Any] = field(default_factory=dict)

    def make_model(self, path: str) -> Any:
        """The dense model of a path."""
        return load(self.auto_class, path, **self.settings)


def compare(
    sparsity: SparsityArguments, training: TrainingArguments, task: Task
) -> dict[str, dict[str, float]]:
    """Train dense and sparse, save the sparse model to `output_dir`, load it, print both scores.

    Returns:
        The scores of `"dense"` and `"sparse"`.
    """
    dense = _dense_trainer(sparsity, training, task)
    scores = {"dense": task.evaluate(dense)}
    if sparsity.optimizer != "none":
        scores["sparse"] = _train_sparse(sparsity, training, task, dense.model, scores["dense"])
    names = list(scores["dense"])
    rows = [(kind, *(f"{found[name]:.4f}" for name in names)) for kind, found in scores.items()]
    print(format_table(("model", *names), rows))
    return scores


def _dense_trainer(sparsity: SparsityArguments, training: TrainingArguments, task: Task) -> Trainer:
    """A trainer with the dense model: trained, and saved to `dense` in the output folder, or given."""
    folder = Path(training.output_dir, "dense")
    there = sparsity.dense_model
    if there is None and training.resume_from_checkpoint and (folder / "config.json").exists():
        there = str(folder)  # an interrupted run has got this far
    plain = dataclasses.replace(training, output_dir=str(folder))
    dense = task.make_trainer(task.make_model(there or sparsity.model_name_or_path), args=plain)
    if there is None:
        dense.train()
        dense.save_model()
        task.tokenizer.save_pretrained(folder)
    return dense


def _train_sparse(
    sparsity: SparsityArguments,
    training: TrainingArguments,
    task: Task,
    dense: Any,
    dense_scores: dict[str, float],
) -> dict[str, float]:
    config = sparsity.config()
    model = task.make_model(sparsity.model_name_or_path)
    if sparsity.distil:
        weight = sparsity.distil
        hf_sparse.Distillation(dense, logits=min(weight, 1.0), hidden=weight).attach(model)
    proximal = sparsity.optimizer == "sparse_adamw"
    callback = sparsity.callback()
    factory = hf_sparse.trainer_optimizer(
        config,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        penalty=sparsity.penalty if proximal else "l0",
    )
    trainer = task.make_trainer(model, optimizer_cls_and_kwargs=factory, callbacks=[callback])
    callback.log_through(trainer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)

    folder, described = Path(training.output_dir), {"report": callback.report}
    hf_sparse.save_pretrained(trainer.model, folder, config, tokenizer=task.tokenizer, **described)
    loaded = task.auto_class.from_pretrained(folder)
    print(hf_sparse.measure_sparsity(loaded, config).summary())
    scores = task.evaluate(task.make_trainer(loaded))
    described["metrics"] = [
        hf_sparse.Metric(name, sparse=value, dense=dense_scores[name])
        for name, value in scores.items()
    ]
    hf_sparse.save_pretrained(trainer.model, folder, config, tokenizer=task.tokenizer, **described)
    return scores
