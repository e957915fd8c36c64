"""Which models can lose whole parts in place: those that are plain modules with values of their own."""

from __future__ import annotations

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hf_sparse.arguments import check_has_values
from hf_sparse.structure.layers import check_has_weights
from hf_sparse.upstream.peft_by_name import has_adapters
from hf_sparse.upstream.torch import is_compiled
from hf_sparse.upstream.transformers.models import has_own_adapters, quantized_by


def check_changeable(model: PreTrainedModel, call: str, verb: str) -> None:
    """Refuse what cannot lose parts of it, before anything is computed.

    Args:
        model: what was given.
        call: the name of the call, for the error.
        verb: what it does, such as "drop blocks".

    Raises:
        ValueError: the model is compiled, has adapters, is on the meta device, quantized or sharded.
    """
    check_has_weights(model)
    start = verb.capitalize()
    if is_compiled(model):
        raise ValueError(f"the model is compiled by torch.compile. {start} first, then compile it.")
    if has_own_adapters(model) or has_adapters(model):
        raise ValueError(
            "the model has adapters, whose places in it would be others. Merge them first "
            "(hf_sparse.merge_adapters_), or remove them."
        )
    check_has_values(model, call)
    if (method := quantized_by(model)) not in (None, "gguf"):
        raise ValueError(
            f"the model is quantized with {method}, and what is left could not be trained. Load it "
            "without quantization, or call model.dequantize() first; quantize it afterwards."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is cut into shards by FSDP. {start} before the model is sharded."
            )
