"""What the commands read: models, tokenizers, and texts as the flags want them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hf_sparse
from hf_sparse.checkpoint.loading import dense_model_class
from hf_sparse.checkpoint.reading import check_is_checkpoint
from hf_sparse.checkpoint.source import remember_source_
from hf_sparse.documents import read_documents, read_rows

# Any of these makes a tokenizer.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt"),
)


def load(source: str, options: argparse.Namespace, needs_tokenizer: bool = True) -> tuple[Any, Any]:
    """Load a model with the head that it was saved with, and its tokenizer if that is needed.

    Raises:
        ValueError: there is no such folder, the config names no class that transformers or
            hf_sparse has, or the tokenizer is not the model's.
    """
    import transformers

    known = _known_arguments(source, options)
    config = transformers.AutoConfig.from_pretrained(source, **known)
    name = (config.architectures or ["AutoModelForCausalLM" if known else ""])[0]
    if name.startswith("Sparse") and hasattr(hf_sparse, name):
        model_class = getattr(hf_sparse, name)
    elif name.startswith("Auto"):
        model_class = transformers.AutoModelForCausalLM
    else:
        model_class = dense_model_class(source, config)
    model = model_class.from_pretrained(source, dtype=options.dtype, **known)
    remember_source_(model, Path(source))
    if not needs_tokenizer:
        return model, None
    return model, load_tokenizer(source, options, config)


def load_tokenizer(source: str, options: argparse.Namespace, config: Any = None) -> Any:
    """Load a model's tokenizer, from --tokenizer if that is given.

    Args:
        source: of the model.
        options: of the command.
        config: of the model, if it is known already.

    Raises:
        ValueError: there is no such folder, or the tokenizer is not the model's.
    """
    import transformers

    known = _known_arguments(source, options)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(source, **known)
    if not options.tokenizer and not known and not has_tokenizer(source):
        raise ValueError(f"{source} holds no tokenizer: name one with --tokenizer.")
    given = {"pretrained_model_name_or_path": options.tokenizer or source}
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        **given, **({} if options.tokenizer else known)
    )
    # Without its files a tokenizer of special tokens alone is made, which reads every text the same.
    if len(tokenizer) < 0.5 * config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.tokenizer or source} has {len(tokenizer)} tokens, the model "
            f"{config.vocab_size}: its files are missing. Name the right one with --tokenizer."
        )
    return tokenizer


def _known_arguments(source: str, options: argparse.Namespace) -> dict[str, str]:
    """What a dense model's folder needs beside its name: the GGUF file in it."""
    folder = Path(source)
    if not folder.exists() and (source.startswith((".", "/", "~")) or source.count("/") > 1):
        raise ValueError(f"no such folder: {source}")
    check_is_checkpoint(folder)
    gguf_file = options.gguf_file
    return {"gguf_file": gguf_file} if gguf_file and (folder / gguf_file).exists() else {}


def has_tokenizer(source: str) -> bool:
    """Whether a folder has a tokenizer; a model of the Hub is taken to have one."""
    folder = Path(source)
    return not folder.is_dir() or any((folder / name).exists() for name in _TOKENIZER_FILES)


def windows(tokenizer: Any, documents: Sequence[str], options: argparse.Namespace) -> list[Any]:
    """Calibration data as the options want it."""
    return hf_sparse.calibration_batches(
        tokenizer,
        documents,
        num_samples=options.num_samples,
        window=options.window,
        batch_size=options.batch_size,
    )


def measurement(options: argparse.Namespace) -> Callable[[Any, Any], float]:
    """What is measured of a model and its tokenizer; the texts are read once, before any model."""
    if not options.labels:
        documents = read_documents(options.text)
        return lambda model, tokenizer: hf_sparse.perplexity(
            model,
            tokenizer,
            documents,
            options.window,
            max_windows=options.max_windows,
            batch_size=options.batch_size,
        )
    texts, labels = labelled_texts(options)
    return lambda model, tokenizer: hf_sparse.accuracy(
        model, tokenizer, texts, labels, batch_size=options.batch_size
    )


def labelled_texts(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The texts, or tuples of texts, of --labels, and their labels."""
    fields = options.fields.split(",")
    if len(fields) > 2 or "label" in fields or len(set(fields)) < len(fields):
        raise ValueError(
            f"--fields {options.fields}: wanted the name of a text, or two, by a comma."
        )
    rows = [row for file in options.labels for row in read_rows(Path(file), [*fields, "label"])]
    texts = [row[fields[0]] if len(fields) == 1 else tuple(row[f] for f in fields) for row in rows]
    return texts, [row["label"] for row in rows]
