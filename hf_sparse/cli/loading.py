"""What the commands read: models, tokenizers, and texts as the flags want them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import hf_sparse
from hf_sparse.calibration.documents import read_documents, read_rows
from hf_sparse.checkpoint.dense_models import dense_model_class
from hf_sparse.checkpoint.promised import QUANT_METHOD, check_to_load
from hf_sparse.checkpoint.quantizer import SparseCheckpointConfig
from hf_sparse.checkpoint.reading import check_is_checkpoint
from hf_sparse.checkpoint.source import remember_source_
from hf_sparse.checkpoint.writing import is_weight_file
from hf_sparse.upstream.transformers.files import cached_file
from hf_sparse_cli.usage import text_fields

# Any of these makes a tokenizer.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("vocab.json", "vocab.txt"),
)


def skeleton(source: str, options: argparse.Namespace) -> Any:
    """The model that `load` gives, without weights: they are on the meta device.

    Raises:
        ValueError: as `load`.
    """
    model_class, config, _ = _class_and_config(source, options)
    described = getattr(config, "quantization_config", None)
    if isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD:
        config.sparsity_config = SparseCheckpointConfig(**described).sparsity.to_dict()
    make = getattr(model_class, "from_config", model_class)  # of an Auto class
    with torch.device("meta"):
        return make(config)


def load(
    source: str, options: argparse.Namespace, *, needs_tokenizer: bool = True
) -> tuple[Any, Any]:
    """Load a model with the head that it was saved with, and its tokenizer if that is needed.

    Raises:
        ValueError: there is no such folder, the config names no class that transformers or
            hf_sparse has, or the tokenizer is not the model's.
    """
    model_class, config, known = _class_and_config(source, options)
    model = model_class.from_pretrained(source, dtype=options.dtype, **known)
    remember_source_(model, Path(source))
    if not needs_tokenizer:
        return model, None
    return model, load_tokenizer(source, options, config)


def model_config(source: str, options: argparse.Namespace) -> Any:
    """The config of a model that `load` can find: nothing of its weights is read.

    Raises:
        ValueError, OSError: as `load`.
    """
    check_to_load(source)
    return _class_and_config(source, options)[1]


def _class_and_config(source: str, options: argparse.Namespace) -> tuple[Any, Any, dict[str, str]]:
    """The class of a model, its config, and what loading it needs beside its name."""
    known = _known_arguments(source, options)
    try:
        config = transformers.AutoConfig.from_pretrained(source, **known)
    except OSError as error:
        if Path(source).exists():
            raise
        raise OSError(
            f"{source} is no folder here, and the Hub does not give it: {error}"
        ) from error
    name = (config.architectures or ["AutoModelForCausalLM" if known else ""])[0]
    if name.startswith("Sparse") and hasattr(hf_sparse, name):
        return getattr(hf_sparse, name), config, known
    if name.startswith("Auto"):
        return transformers.AutoModelForCausalLM, config, known
    return dense_model_class(source, config), config, known


def weight_bytes(source: str, gguf_file: str | None = None) -> int:
    """The bytes of a model's weight files, as they are on this machine."""
    folder = Path(source)
    if not folder.is_dir():  # a model of the Hub: its snapshot in the cache
        folder = Path(cached_file(source, "config.json") or "").parent
    files = [path for path in folder.iterdir() if is_weight_file(path.name)]
    files = [path for path in files if path.suffix == ".safetensors"] or files
    if gguf_file and (folder / gguf_file).exists():
        files = [folder / gguf_file]
    return sum(file.stat().st_size for file in files)


def load_tokenizer(source: str, options: argparse.Namespace, config: Any = None) -> Any:
    """Load a model's tokenizer, from --tokenizer if that is given.

    Args:
        source: of the model.
        options: of the command.
        config: of the model, if it is known already.

    Raises:
        ValueError: there is no such folder, or the tokenizer is not the model's.
    """
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
    wanted = getattr(config.get_text_config(), "vocab_size", 0)
    if len(tokenizer) < 0.5 * wanted:
        raise ValueError(
            f"the tokenizer of {options.tokenizer or source} has {len(tokenizer)} tokens, the model "
            f"{wanted}: its files are missing. Name the right one with --tokenizer."
        )
    return tokenizer


def optional_tokenizer(options: argparse.Namespace, config: Any, needed: bool) -> Any:
    """The tokenizer of a model, or None if it has none and none is needed."""
    if not needed and not options.tokenizer and not has_tokenizer(options.model):
        return None
    return load_tokenizer(options.model, options, config)


def _known_arguments(source: str, options: argparse.Namespace) -> dict[str, str]:
    """What a dense model's folder needs beside its name: the GGUF file in it."""
    folder = Path(source)
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
            batch_size=options.batch_size or 1,
        )
    texts, labels = labelled_texts(options)
    return lambda model, tokenizer: hf_sparse.accuracy(
        model, tokenizer, texts, labels, batch_size=options.batch_size or 1
    )


def batches_of(options: argparse.Namespace, bones: Any, tokenizer: Any) -> list[Any]:
    """The data that --calibration or --labels name."""
    if not options.labels:
        return windows(tokenizer, read_documents(options.calibration), options)
    texts, labels = (column[: options.num_samples] for column in labelled_texts(options))
    return hf_sparse.labelled_batches(
        bones, tokenizer, texts, labels, window=options.window, batch_size=options.batch_size
    )


def labelled_texts(options: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The texts, or tuples of texts, of --labels, and their labels."""
    fields = text_fields(options)
    rows = [row for file in options.labels for row in read_rows(Path(file), [*fields, "label"])]
    texts = [row[fields[0]] if len(fields) == 1 else tuple(row[f] for f in fields) for row in rows]
    return texts, [row["label"] for row in rows]
