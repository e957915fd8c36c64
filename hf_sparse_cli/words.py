"""What the package's errors advise, in the flags of the command line.

The package speaks of its calls and their arguments. Whoever typed a command has flags instead. What
no flag does stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_VALUE = r"(?:torch\.)?(?P<quote>['\"]?)(?P<value>[\w.:*{}-]*[\w*}])(?P=quote)"
_START, _END = r"(?<![\w./-])", r"(?![\w/])"
# Arguments of calls that are flags of the same name.
_FLAGS = (
    *("sparsity", "method", "allocation", "refine", "scope", "r", "quantize", "dtype", "format"),
    *("by", "params", "ms", "mb", "bits", "effort"),
)
_LISTS = ("targets", "ignore")
_CONFIG = (
    r"(?:config=)?SparsityConfig\(['\"](?P<pattern>[^'\"]+)['\"]"
    r"(?:, (?:sparsity=)?(?P<sparsity>[\w.{}]+))?\)"
)


def _config_flags(match: re.Match[str]) -> str:
    sparsity = match["sparsity"]
    return f"--pattern {match['pattern']}" + (f" --sparsity {sparsity}" if sparsity else "")


def _list_flag(match: re.Match[str]) -> str:
    names = re.findall(r"['\"]([^'\"]+)['\"]", match["names"])
    return f"--{match['flag']} {' '.join(names) or 'GLOB'}"


# In this order: whole phrases first, then single calls, then arguments.
_PHRASES: list[tuple[str, str | Callable[[re.Match[str]], str]]] = [
    (r", or set HF_TOKEN, or give token=\.", ", or set HF_TOKEN."),
    (r" Give another tolerance= if .*?\.", " In Python, export_onnx takes another tolerance."),
    (r"or prune_ in memory", "or leave --stream out"),
    (r"prune the model in memory with prune_", "leave --stream out"),
    (
        r"Give batches=, for example from hf_sparse\.calibration_batches\(.*?\)",
        "Give --calibration FILE",
    ),
    (r"batches=hf_sparse\.calibration_batches\(\.\.\.\), a list.*?padding", "--calibration FILE"),
    (r"batches are for (.*?); leave them out\.", r"--calibration is for \1; leave it out."),
    (r"Put labels into them \(see hf_sparse\.labelled_batches\)", "Give --labels FILE"),
    (r"give export_onnx quantize=", "give quantize="),
    (r"model\.float\(\)", "--dtype float32"),
    (r"add bits=8 or bits=4", "add --bits 8 or --bits 4"),
    (r"SparsityConfig\(\.\.\., format='dense'\)", "--format dense"),
    (r"SparsityConfig\(\.\.\., targets=\[\.\.\.\]\)", "--targets GLOB"),
    (r"SparsityConfig\(\.\.\., ignore=\[\.\.\.\]\)", "--ignore GLOB"),
    (
        r"is there already\. Give another name, or overwrite=True\.",
        "is there already. Give another name.",
    ),
    (rf", or save with {_CONFIG}\.", "."),
    (
        rf"hf_sparse\.prune_\(model, {_CONFIG}, \.\.\.\)",
        lambda match: f"hf-sparse prune MODEL OUTPUT {_config_flags(match)}",
    ),
    (_CONFIG, _config_flags),
    (r"hf_sparse\.compile makes machine code", "machine code is made"),
    (r"hf_sparse\.prune_checkpoint", "hf-sparse prune --stream"),
    (r"hf_sparse\.prune_", "hf-sparse prune"),
    (r"prune_\(model, config, method, batches\)", "hf-sparse prune"),
    (r"hf_sparse\.recover_", "hf-sparse recover"),
    (r"batches: inputs of .* hf_sparse\.calibration_batches gives them", "--calibration FILE"),
    (r"embedding_bits, or a config with them", "--embedding-bits"),
    (r"hf_sparse\.quantize_", "hf-sparse quantize"),
    (rf"{_START}quantize_{_END}", "hf-sparse quantize"),
    (r"Give smaller batches, or take effort=", "Give more text, or take effort="),
    (r"hf_sparse\.shrink_\(model, uniform=True\)", "hf-sparse shrink --uniform"),
    (r"hf_sparse\.shrink_", "hf-sparse shrink"),
    (r"hf_sparse\.drop_blocks_", "hf-sparse shrink --blocks"),
    (r"^count is(?=.* experts? )", "--experts is"),
    (r"^count is(?=.* hidden features?)", "--hidden is"),
    (r"^count is", "--blocks is"),
    (r"hf_sparse\.export_onnx", "hf-sparse export"),
    (rf"{_START}(?:resume|overwrite|uniform|merge)=True", lambda match: f"--{match[0][:-5]}"),
    (rf"{_START}num_samples{_END}", "--num-samples"),
    (rf"{_START}batch_size{_END}", "--batch-size"),
    (rf"{_START}(?P<flag>{'|'.join(_LISTS)})=\[(?P<names>[^\]]*)\]", _list_flag),
    (rf"{_START}(?P<flag>{'|'.join(_FLAGS)})={_VALUE}", r"--\g<flag> \g<value>"),
]


def in_flags(message: str) -> str:
    """An error of the package, with flags in the place of calls and arguments."""
    for phrase, flags in _PHRASES:
        message = re.sub(phrase, flags, message)
    return message
