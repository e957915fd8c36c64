"""hf_sparse: make Hugging Face language models sparse, store them small, load them with AutoModel.

Importing the package registers the compressed checkpoints with transformers. Everything below is
imported when it is first used, so that the import stays fast and needs no optional package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_sparse import models as models
from hf_sparse.checkpoint import quantizer as quantizer
from hf_sparse.version import __version__ as __version__

if TYPE_CHECKING:
    from hf_sparse.adapters.loading import get_peft_model as get_peft_model
    from hf_sparse.adapters.loading import load_adapter as load_adapter
    from hf_sparse.adapters.merging import merge_adapters as merge_adapters
    from hf_sparse.adapters.merging import merge_adapters_ as merge_adapters_
    from hf_sparse.budget import allocate as allocate
    from hf_sparse.budget import sparsity_for as sparsity_for
    from hf_sparse.byte_budget import BitBudget as BitBudget
    from hf_sparse.byte_budget import bit_budget as bit_budget
    from hf_sparse.calibration.labels import labelled_batches as labelled_batches
    from hf_sparse.calibration.windows import calibration_batches as calibration_batches
    from hf_sparse.checkpoint.inspect import inspect_checkpoint as inspect_checkpoint
    from hf_sparse.checkpoint.legacy import convert_legacy as convert_legacy
    from hf_sparse.compiled_files.files import load_compiled as load_compiled
    from hf_sparse.compiled_files.files import save_compiled as save_compiled
    from hf_sparse.configuration_sparse import SparsityConfig as SparsityConfig
    from hf_sparse.counts import SparsityReport as SparsityReport
    from hf_sparse.counts import measure_sparsity as measure_sparsity
    from hf_sparse.distillation import Distillation as Distillation
    from hf_sparse.dropping.blocks import drop_blocks_ as drop_blocks_
    from hf_sparse.dropping.expert_report import ExpertReport as ExpertReport
    from hf_sparse.dropping.experts import drop_experts_ as drop_experts_
    from hf_sparse.dropping.hidden import HiddenReport as HiddenReport
    from hf_sparse.dropping.hidden import drop_hidden_ as drop_hidden_
    from hf_sparse.dropping.report import DropReport as DropReport
    from hf_sparse.effort.plan import SparsifyPlan as SparsifyPlan
    from hf_sparse.effort.run import plan_sparsify as plan_sparsify
    from hf_sparse.effort.run import sparsify_ as sparsify_
    from hf_sparse.evaluation import accuracy as accuracy
    from hf_sparse.evaluation import perplexity as perplexity
    from hf_sparse.exporters.gguf_export import export_gguf as export_gguf
    from hf_sparse.exporters.onnx_export import export_onnx as export_onnx
    from hf_sparse.formats import FormatError as FormatError
    from hf_sparse.hub import push_to_hub as push_to_hub
    from hf_sparse.optim.groups import sparse_param_groups as sparse_param_groups
    from hf_sparse.optim.keep_zeros import keep_zeros as keep_zeros
    from hf_sparse.optim.keep_zeros import keep_zeros_ as keep_zeros_
    from hf_sparse.optim.keep_zeros_callback import KeepZeros as KeepZeros
    from hf_sparse.optim.schedules import Schedule as Schedule
    from hf_sparse.optim.shrinkage import add_shrinkage as add_shrinkage
    from hf_sparse.optim.shrinkage import add_shrinkage_ as add_shrinkage_
    from hf_sparse.optim.shrinkage import freeze_zeros as freeze_zeros
    from hf_sparse.optim.shrinkage import freeze_zeros_ as freeze_zeros_
    from hf_sparse.optim.sparse_optimizers import SparseAdamW as SparseAdamW
    from hf_sparse.optim.sparse_optimizers import SparseSGD as SparseSGD
    from hf_sparse.optim.sparsifier import Sparsifier as Sparsifier
    from hf_sparse.optim.trainer import SparsityCallback as SparsityCallback
    from hf_sparse.optim.trainer import trainer_optimizer as trainer_optimizer
    from hf_sparse.pages.report import report as report
    from hf_sparse.patterns import Pattern as Pattern
    from hf_sparse.provenance.values import Metric as Metric
    from hf_sparse.pruning.oneshot import prune_ as prune_
    from hf_sparse.pruning.quantize import QuantizationReport as QuantizationReport
    from hf_sparse.pruning.quantize import quantize_ as quantize_
    from hf_sparse.pruning.streaming import prune_checkpoint as prune_checkpoint
    from hf_sparse.quantization import OffGridError as OffGridError
    from hf_sparse.recover import recover_ as recover_
    from hf_sparse.runtime.model.compiled import compile as compile
    from hf_sparse.saving import save_pretrained as save_pretrained
    from hf_sparse.shrinking import ShrinkReport as ShrinkReport
    from hf_sparse.shrinking import shrink as shrink
    from hf_sparse.shrinking import shrink_ as shrink_
    from hf_sparse.slimming.plan import SlimPlan as SlimPlan
    from hf_sparse.slimming.plan import SlimReport as SlimReport
    from hf_sparse.slimming.search import plan_slim as plan_slim
    from hf_sparse.slimming.search import slim_ as slim_
    from hf_sparse.timing import benchmark as benchmark
    from hf_sparse.zeroshot.choices import evaluate_choices as evaluate_choices
    from hf_sparse.zeroshot.report import ChoiceReport as ChoiceReport

_PUBLIC = {
    "ChoiceReport": "hf_sparse.zeroshot.report",
    "BitBudget": "hf_sparse.byte_budget",
    "Distillation": "hf_sparse.distillation",
    "DropReport": "hf_sparse.dropping.report",
    "ExpertReport": "hf_sparse.dropping.expert_report",
    "FormatError": "hf_sparse.formats",
    "HiddenReport": "hf_sparse.dropping.hidden",
    "KeepZeros": "hf_sparse.optim.keep_zeros_callback",
    "Metric": "hf_sparse.provenance.values",
    "OffGridError": "hf_sparse.quantization",
    "Pattern": "hf_sparse.patterns",
    "Schedule": "hf_sparse.optim.schedules",
    "QuantizationReport": "hf_sparse.pruning.quantize",
    "ShrinkReport": "hf_sparse.shrinking",
    "SlimPlan": "hf_sparse.slimming.plan",
    "SlimReport": "hf_sparse.slimming.plan",
    "SparseAdamW": "hf_sparse.optim.sparse_optimizers",
    "SparseSGD": "hf_sparse.optim.sparse_optimizers",
    "Sparsifier": "hf_sparse.optim.sparsifier",
    "SparsifyPlan": "hf_sparse.effort.plan",
    "SparsityCallback": "hf_sparse.optim.trainer",
    "SparsityConfig": "hf_sparse.configuration_sparse",
    "SparsityReport": "hf_sparse.counts",
    "accuracy": "hf_sparse.evaluation",
    "add_shrinkage_": "hf_sparse.optim.shrinkage",
    "allocate": "hf_sparse.budget",
    "benchmark": "hf_sparse.timing",
    "bit_budget": "hf_sparse.byte_budget",
    "calibration_batches": "hf_sparse.calibration.windows",
    "compile": "hf_sparse.runtime.model.compiled",
    "convert_legacy": "hf_sparse.checkpoint.legacy",
    "drop_blocks_": "hf_sparse.dropping.blocks",
    "drop_experts_": "hf_sparse.dropping.experts",
    "drop_hidden_": "hf_sparse.dropping.hidden",
    "evaluate_choices": "hf_sparse.zeroshot.choices",
    "export_gguf": "hf_sparse.exporters.gguf_export",
    "export_onnx": "hf_sparse.exporters.onnx_export",
    "freeze_zeros_": "hf_sparse.optim.shrinkage",
    "get_peft_model": "hf_sparse.adapters.loading",
    "inspect_checkpoint": "hf_sparse.checkpoint.inspect",
    "keep_zeros_": "hf_sparse.optim.keep_zeros",
    "labelled_batches": "hf_sparse.calibration.labels",
    "load_adapter": "hf_sparse.adapters.loading",
    "load_compiled": "hf_sparse.compiled_files.files",
    "measure_sparsity": "hf_sparse.counts",
    "merge_adapters_": "hf_sparse.adapters.merging",
    "perplexity": "hf_sparse.evaluation",
    "plan_slim": "hf_sparse.slimming.search",
    "plan_sparsify": "hf_sparse.effort.run",
    "prune_": "hf_sparse.pruning.oneshot",
    "prune_checkpoint": "hf_sparse.pruning.streaming",
    "push_to_hub": "hf_sparse.hub",
    "quantize_": "hf_sparse.pruning.quantize",
    "recover_": "hf_sparse.recover",
    "report": "hf_sparse.pages.report",
    "save_compiled": "hf_sparse.compiled_files.files",
    "save_pretrained": "hf_sparse.saving",
    "shrink_": "hf_sparse.shrinking",
    "slim_": "hf_sparse.slimming.search",
    "sparse_param_groups": "hf_sparse.optim.groups",
    "sparsify_": "hf_sparse.effort.run",
    "sparsity_for": "hf_sparse.budget",
    "trainer_optimizer": "hf_sparse.optim.trainer",
}
# Deprecated names: what they name changes its argument in place, and the name did not say so.
_DEPRECATED = {
    "add_shrinkage": "hf_sparse.optim.shrinkage",
    "freeze_zeros": "hf_sparse.optim.shrinkage",
    "keep_zeros": "hf_sparse.optim.keep_zeros",
    "merge_adapters": "hf_sparse.adapters.merging",
    "shrink": "hf_sparse.shrinking",
}
_PLACES = {**_PUBLIC, **_DEPRECATED}

__all__ = ["__version__", *_PLACES]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    elif name.startswith("Sparse"):
        value = getattr(importlib.import_module("hf_sparse.models"), name)
    else:
        raise AttributeError(f"module 'hf_sparse' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *dir(importlib.import_module("hf_sparse.models"))])
