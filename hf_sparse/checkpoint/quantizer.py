"""The loader that transformers calls for compressed checkpoints.

transformers has one hook for weights that are not stored as they are used: quantizers. Ours
restores the weights while they are read and then leaves no trace on the model, so that
`.half()`, `save_pretrained(state_dict=...)` and training work as for a dense model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse.checkpoint.on_grids import OnGrid
from hf_sparse.checkpoint.promised import (
    CONFIG_NAME,
    QUANT_METHOD,
    Promised,
    check_shapes,
    promised_by,
)
from hf_sparse.checkpoint.reading import (
    StoredTensor,
    begin_check_digests,
    is_target,
    read_headers,
    watch,
)
from hf_sparse.checkpoint.source import remember_source_
from hf_sparse.configuration_sparse import SparsityConfig
from hf_sparse.formats import (
    COMPANIONS,
    FORMATS,
    FormatError,
    decompress,
    join,
    locate,
    read_layout,
)
from hf_sparse.patterns import Pattern
from hf_sparse.structure.experts import ENDINGS
from hf_sparse.structure.layers import TargetLayer
from hf_sparse.structure.orientation import is_transposed, oriented
from hf_sparse.upstream.transformers.loading import (
    QuantizationConfigMixin,
    Restorer,
    WeightConverter,
    conversion_from_parts,
    detach_,
    number_of_conversions,
    register_quantization_config,
    register_quantizer,
    without_conversions,
)
from hf_sparse.upstream.transformers.models import dtype_plan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names that the parts of a weight have in a checkpoint, as transformers' patterns, by its own.
_PARTS_OF = {
    name: {re.escape(join(name, part)) + "$": part for part in ("", *COMPANIONS)}
    for name in ("weight", *ENDINGS)
}
_PART_PATTERNS = {key: part for parts in _PARTS_OF.values() for key, part in parts.items()}


@register_quantization_config(QUANT_METHOD)
class SparseCheckpointConfig(QuantizationConfigMixin):
    """`quantization_config` in the `config.json` of a compressed checkpoint."""

    def __init__(self, quant_method: str = QUANT_METHOD, **values: Any) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        self.sparsity = SparsityConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """As stored; the constructor takes the same values."""
        return {"quant_method": self.quant_method, **self.sparsity.to_dict()}


@register_quantizer(QUANT_METHOD)
class SparseHfQuantizer(Restorer):
    """Restores compressed weights while transformers loads a checkpoint."""

    quantization_config: SparseCheckpointConfig

    def __init__(self, quantization_config: SparseCheckpointConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._stored: dict[str, StoredTensor] = {}
        self._dtype_plan: Mapping[str, torch.dtype] = {}
        self._errors: list[FormatError] = []
        self._check_unchanged = watch([])
        self._check_digests: Callable[[], None] = lambda: None
        self._targets: Mapping[str, tuple[TargetLayer, ...]] = {}
        self._grids: Mapping[str, OnGrid] = {}
        self._own_conversions = 0

    @property
    def is_trainable(self) -> bool:
        """Loaded models are plain models."""
        return True

    def is_serializable(self) -> bool:
        """Loaded models are plain models."""
        return True

    def before_loading(
        self, model: PreTrainedModel, files: Sequence[Path], dtype: torch.dtype
    ) -> None:
        """Check the files against what their config.json promises.

        Raises:
            FormatError: they are not what it describes, or of another model than is loaded.
        """
        if other := [file for file in files if file.suffix != ".safetensors"]:
            raise FormatError(f"{other[0]}: compressed checkpoints are stored as safetensors alone")
        self._check_unchanged = watch(files)
        self._stored = {stored.name: stored for stored in read_headers(files)}
        wanted = {name.removeprefix(f"{model.base_model_prefix}.") for name in model.state_dict()}
        stored_names = {name.removeprefix(f"{model.base_model_prefix}.") for name in self._stored}
        if self._stored and not wanted & stored_names:
            raise FormatError(
                f"none of the weights in {files[0]} belongs to {type(model).__name__}. Load the "
                "checkpoint with AutoModel, or the class that its config.json names."
            )
        if self._stored:
            stored = list(self._stored.values())
            promised = promised_by(files[0].parent, stored, model)
            promised.check(stored)
            self._check_digests = begin_check_digests(files)
            self._targets = promised.targets(self.quantization_config.sparsity)
            self._grids = promised.grids(self.quantization_config.sparsity)
            if promised.model is not model:
                _check_blocks(model, stored)
        self._dtype_plan = dtype_plan(model, dtype)
        self._own_conversions = number_of_conversions(model)

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """Leave out the family's own conversions: weights are stored under the model's names."""
        others = without_conversions(weight_conversions, self._own_conversions)
        return others + self.get_weight_conversions()

    def get_weight_conversions(self) -> list[WeightConverter]:
        """One conversion for every weight of a name: those stored in one part pass as they are."""
        return [
            conversion_from_parts(name, list(patterns), self, self.restore)
            for name, patterns in _PARTS_OF.items()
        ]

    def restore(self, name: str, found: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """The weight `name` of `model`, in the type that the model wants, from its parts by pattern."""
        parts = {_PART_PATTERNS[pattern]: tensor for pattern, tensor in found.items()}
        parameter = model.get_parameter_or_buffer(name)
        dtype = parameter.dtype
        for pattern, planned in self._dtype_plan.items():
            if re.search(pattern.replace("*", ".*"), name):
                dtype = planned
        try:
            weight = self._restored(name, parts, model)
        except FormatError as error:
            # transformers turns errors raised here into a table in the log. Ours are raised
            # in `postprocess_model`, before the model is returned.
            self._errors.append(error)
            return torch.zeros(parameter.shape, dtype=dtype)
        return weight.to(dtype) if weight.is_floating_point() else weight

    def _restored(self, name: str, parts: dict[str, Tensor], model: PreTrainedModel) -> Tensor:
        """The weight from its parts; it has the model's shape and follows the promised pattern."""
        local = name.removeprefix(f"{model.base_model_prefix}.")
        stored = self._stored.get(name) or self._stored.get(local)
        config = self.quantization_config.sparsity
        pattern, follows = config.pattern, config.pattern.implied_sparsity is None
        path, _, attribute = name.rpartition(".")
        transposed = is_transposed(model.get_submodule(path), attribute)
        with locate(stored.place if stored else f"tensor {name}"):
            if list(parts) == [""]:
                weight, promised = parts[""], local in self._targets
            else:
                layout = read_layout(parts)
                wanted = tuple(model.get_parameter_or_buffer(name).shape)
                if layout.shape != wanted:
                    raise FormatError(
                        f"shape mismatch: {layout.shape} is stored, the model of config.json wants "
                        f"{wanted}"
                    )
                FORMATS[layout.format].check_direction(layout, transposed)
                weight = decompress(parts, layout)
                coded = layout.coding is not None
                promised = local in self._targets or is_target(
                    stored.name if stored else name, True, config, coded=coded
                )
                if FORMATS[layout.format].proves(pattern):
                    known = pattern.parameters(layout.rows, layout.columns)
                    follows = layout.parameters == known
            if promised and not follows:
                layers = self._targets.get(local)
                matrices = [layer.part(weight) for layer in layers or ()]
                for matrix in matrices or oriented(weight, transposed):
                    _check_promise(matrix, pattern)
            if local in self._grids:
                self._grids[local].check_stored(parts, weight)
        return weight

    def postprocess_model(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Raise what was wrong with the weights, then detach from the model.

        Raises:
            FormatError: a tensor is damaged or changed, or a file was replaced while it was read; no
            model is returned.
        """
        self._check_unchanged()
        self._check_digests()
        if self._errors:
            more = f" ({len(self._errors) - 1} more like it)" if len(self._errors) > 1 else ""
            raise FormatError(f"{self._errors[0]}{more}")
        detach_(self, model)
        if hasattr(model.config, "sparsity_config"):
            model.config.sparsity_config = self.quantization_config.sparsity.to_dict()
        if self._stored:
            remember_source_(model, next(iter(self._stored.values())).file.parent)


def _check_blocks(model: PreTrainedModel, stored: Sequence[StoredTensor]) -> None:
    """Raise a FormatError if the model's blocks have more than is stored, as arguments may ask for.

    Cross-attention is new where an encoder becomes a decoder: transformers initialises it.
    """
    wanted = Promised(model, stored[0].file.parent / CONFIG_NAME, exact=False)
    found = {wanted.local(tensor.name): tensor for tensor in stored}
    found = {name: tensor for name, tensor in found.items() if wanted.in_blocks(name)}
    check_shapes(found, wanted.tensors())
    new = re.compile(r"\.(crossattention|q_attn|ln_cross_attn)\.")
    for name in map(wanted.local, wanted.missing(found)):
        if wanted.in_blocks(name) and not new.search(name):
            raise FormatError(
                f"the model has the weight {name}, but no tensor is stored for it in "
                f"{stored[0].file.parent}. Load it with the class, the number of blocks "
                "and the options of its config.json."
            )


def _check_promise(weight: Tensor, pattern: Pattern) -> None:
    """Raise a FormatError if a weight `(out_features, in_features)` breaks the promised pattern."""
    try:
        broken = pattern.violations(weight)
    except ValueError as error:
        raise FormatError(str(error)) from error
    if broken:
        raise FormatError(
            f"{broken} groups {pattern.violation}, but config.json promises pattern '{pattern}'"
        )
