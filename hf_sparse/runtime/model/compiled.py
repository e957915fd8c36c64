"""`hf_sparse.compile`: a transformers model whose blocks run as machine code.

The compiled model is of the same class and has the same config, embeddings, heads and `generate`;
only its list of blocks is another one. The first block runs the whole stack, the others hand its
results on, so that transformers' own code around them, which collects hidden states, keeps working.
"""

from __future__ import annotations

import copy
import functools
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_finite, check_kinds
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import Target, named
from hf_sparse.runtime.model.blocks import find_blocks, pack_blocks
from hf_sparse.runtime.model.coded_head import CodedHead
from hf_sparse.runtime.model.coding import coding_of
from hf_sparse.runtime.model.configured import why_not_compiled
from hf_sparse.runtime.model.copying import with_modules
from hf_sparse.runtime.model.explain import Explanation, explain_layers
from hf_sparse.runtime.model.faithful import check_blocks, check_parents, why_other_attention
from hf_sparse.runtime.model.families import COMPILED
from hf_sparse.runtime.model.generation import generate
from hf_sparse.runtime.model.layers import (
    NOT_STORED,
    CompiledBlocks,
    CompiledLayer,
    compiled_class,
    enter,
    leave,
    record_rotation,
)
from hf_sparse.runtime.model.plain import (
    check_dropout,
    check_in_memory,
    check_no_global_hooks,
    is_plain_matrix,
    why_not_plain,
)
from hf_sparse.runtime.model.single_layers import CompiledHead, CompiledLinear
from hf_sparse.runtime.programs.pool import KEPT_BYTES, Pool
from hf_sparse.runtime.programs.program import Program
from hf_sparse.runtime.programs.runner import Runner
from hf_sparse.runtime.weights.linear import Linear, pack_linear
from hf_sparse.runtime.weights.memory import Shelf
from hf_sparse.runtime.weights.rates import nominal
from hf_sparse.runtime.weights.rounding import Coding
from hf_sparse.runtime.weights.stack import Stack
from hf_sparse.structure.families import base_type
from hf_sparse.structure.layers import PACKED, target_layers
from hf_sparse.upstream.peft_by_name import is_of_peft
from hf_sparse.upstream.transformers.attention import register_mask
from hf_sparse.upstream.transformers.models import block_class, forget_output_hooks_, set_attention_

# The name of the attention in the compiled model's config: masks reach the blocks as they were given.
ATTENTION = "hf_sparse"
COMPUTABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A single layer with fewer zeros is left to torch, with which it shares the layout of activations.
MIN_SPARSITY = 0.4


def _as_given(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    return attention_mask


def compile(
    model: PreTrainedModel,
    *,
    bits: int | None = None,
    target: str | None = None,
    cache: Path | str | None = DEFAULT_CACHE,
) -> PreTrainedModel:
    """Compile a model's blocks for this CPU; zeros in the weights become speed.

    Works on whatever zeros are there, whoever made them; a layer without enough of them is
    computed densely. Sums are taken in float32; weights in bfloat16 or float16 stay as they are. The
    model that was given is not changed, and may be deleted: what is dense (embeddings, heads, layers
    without zeros) is shared with it.

    The blocks of the families in `families.COMPILED` are compiled as a whole. In other models, and
    variants that the kernels cannot do, each sparse Linear of the blocks is replaced by a compiled
    one, and torch does the rest. `compiled.explain()` tells which, and prints per layer the pattern
    that was found, the kernel, bytes, and predicted and measured time.

    With `bits`, the weights of the blocks are kept as codes of 8 or 4 bits, the nearest to what they
    are, with a scale for every 64 or 32 inputs; zeros stay zeros. What they are multiplied with is
    rounded to 8 bits as well, 64 features at a time; for single tokens the output head has 8 bits, too.
    Where the model was quantised already, its own codes are used, whatever `bits` is.

    Args:
        model: a transformers model on the CPU.
        bits: 8 or 4; None leaves weights as they are.
        target: `avx512`, `avx2` or `portable`, on ARM `neon`; what the CPU can do best by default.
        cache: folder that keeps the machine code, or None to keep none.

    Returns:
        A model with the same class, config, `forward` and `generate`, for inference only.

    Raises:
        ImportError: llvmlite is not installed.
        ValueError: the model is not on the CPU, one of its parameters is not finite or of a type
            that torch cannot compute with, or it is not compiled as a whole and no layer of its
            blocks has enough zeros, or `bits` are asked for; or its blocks do something else than
            what transformers makes of its config: modules that were exchanged or changed, hooks,
            adapters.
    """
    check_kinds(compile, locals())
    chosen = named(target)
    folder = None if cache is None else Path(cache)
    if not isinstance(model, PreTrainedModel):
        hint = " Call its merge_and_unload() first." if hasattr(model, "peft_config") else ""
        raise ValueError(f"compile takes a transformers model, not a {type(model).__name__}.{hint}")
    if any(isinstance(module, (CompiledLayer, CompiledLinear)) for module in model.modules()):
        raise ValueError("the model is compiled already.")
    check_in_memory(model)
    check_types(model)
    check_no_global_hooks()
    check_dropout(model)
    reason = why_not_compiled(model.config) or why_other_attention(model.config)
    if reason is not None and bits is not None:
        raise ValueError(
            f"bits is {bits}, and {type(model).__name__} is not compiled as a whole: {reason}. Wanted "
            "a model whose blocks are; leave `bits` out."
        )
    if reason is not None:
        return _compile_layers(model, reason, chosen, folder)
    family = COMPILED[base_type(model.config.model_type)]
    check_blocks(model, family)
    base: Any = model.base_model
    owner, name, modules = find_blocks(base, family)
    blocks = getattr(owner, name)
    check_parents(model, [blocks])
    coding, rates = coding_of(model, bits), nominal(chosen)
    stack = pack_blocks(model.config, family, modules, family.stack, rates, coding)
    rest = with_modules(model, {blocks: nn.ModuleList()})
    check_parameters(rest)
    return assemble(rest, stack, chosen, folder, coding.head)


def assemble(
    model: PreTrainedModel,
    stack: Stack,
    target: Target,
    cache: Path | None,
    head_coding: Coding | None = None,
) -> PreTrainedModel:
    """Put a packed stack into a model that has an empty list of blocks.

    Args:
        model, stack: which.
        target, cache: as `compile`'s.
        head_coding: how the output head becomes codes; None: not at all.
    """
    set_attention_(model.config, ATTENTION)
    register_mask(ATTENTION, _as_given)
    family = COMPILED[base_type(model.config.model_type)]
    inner = getattr(model.config, "inner_group_num", 1)
    if model.config.num_hidden_layers * inner != len(stack.blocks):
        raise ValueError(
            f"config.num_hidden_layers is {model.config.num_hidden_layers}, and the model has "
            f"{len(stack.blocks) // inner}: make them equal, by deleting blocks or in the config."
        )
    path, _, name = family.stack.rpartition(".")
    owner: Any = model.base_model.get_submodule(path)
    layer_class = compiled_class(block_class(model.base_model, family.block_class), family)
    runner = Runner(stack, target, cache)
    layers = [layer_class(runner, index, model.config) for index in range(len(stack.blocks))]
    setattr(owner, name, CompiledBlocks(layers))
    owner.register_forward_pre_hook(functools.partial(enter, name=name), with_kwargs=True)
    if family.rotary_kinds:
        owner.rotary_emb.register_forward_hook(record_rotation, with_kwargs=True)
    owner.register_forward_hook(functools.partial(leave, name=name), always_call=True)
    for module in {model.base_model, owner}:  # heads call either
        module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
    forget_output_hooks_(model)  # transformers hooked the blocks that are gone, if any
    if family is COMPILED["albert"]:  # its loop goes over groups of layers
        owner.config = copy.copy(owner.config)
        owner.config.num_hidden_layers = owner.config.num_hidden_groups = len(layers)
    head = model.get_output_embeddings()
    if stack.causal:
        made: CompiledHead | None = None
        if head_coding is not None:
            made = CodedHead.of(head, target, cache, head_coding)
        if made is None and CompiledHead.suits(head) and why_not_plain(head) is None:
            made = CompiledHead(head, target, cache)
        if made is not None:
            model.set_output_embeddings(made)
    if family.last_norm is not None and head is not None and model.can_generate():
        model.__dict__["generate"] = types.MethodType(generate, model)
    return _finished(model, None, target, cache)


def _compile_layers(
    model: PreTrainedModel, reason: str, target: Target, cache: Path | None
) -> PreTrainedModel:
    """Replace the sparse layers of a model's blocks one by one."""
    shelf, pool = Shelf(), Pool[Program | Tensor](KEPT_BYTES)
    replaced: dict[nn.Module, nn.Module] = {}
    left, adapted = "", _in_adapters(model)
    for layer in target_layers(model):
        weight = layer.weight
        zeros = 1 - int(torch.count_nonzero(weight)) / weight.numel()
        if zeros >= MIN_SPARSITY and layer.module in adapted:
            left = f" {layer.name} is left to torch: it lies in an adapter. Merge that first."
        elif zeros >= MIN_SPARSITY and not is_plain_matrix(layer.module):
            left = f" {layer.name} is left to torch: it is no plain Linear, or it has hooks."
        elif zeros >= MIN_SPARSITY:
            bias: Any = layer.module.bias
            packed = pack_linear(layer.name, weight, bias, shelf=shelf, rates=nominal(target))
            replaced[layer.module] = CompiledLinear(packed, target, cache, pool)
    if not replaced:
        raise ValueError(
            f"{type(model).__name__} is not compiled: {reason}; and no plain layer of its blocks has "
            f"{100 * MIN_SPARSITY:.0f} % zeros, which single layers need.{left or ' Prune it first.'}"
        )
    check_parents(model, list(replaced))
    compiled = with_modules(model, replaced)
    check_parameters(compiled)
    return _finished(compiled, reason, target, cache)


def _in_adapters(model: nn.Module) -> set[nn.Module]:
    """Layers inside modules of PEFT, many of which read the weight and do not call the layer."""
    return {
        child for module in model.modules() if is_of_peft(module) for child in module.children()
    }


def check_types(model: nn.Module) -> None:
    """Raise a ValueError unless torch can compute with the types of all parameters, row by row."""
    for name, parameter in model.named_parameters():
        if parameter.layout != torch.strided:
            raise ValueError(
                f"{name} has the layout {parameter.layout}; wanted {torch.strided}. Store its "
                "to_dense() in its place: compile finds the zeros."
            )
        if parameter.is_floating_point() and parameter.dtype not in COMPUTABLE:
            wanted = ", ".join(map(str, COMPUTABLE))
            raise ValueError(
                f"{name} is {parameter.dtype}; wanted one of {wanted}: model.to(torch.bfloat16) first."
            )


def check_parameters(model: nn.Module) -> None:
    """Raise a ValueError unless the parameters that are not packed are finite."""
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())


def _finished(
    model: PreTrainedModel, reason: str | None, target: Target, cache: Path | None
) -> PreTrainedModel:
    def explain(tokens: int = 128) -> Explanation:
        """Tell what became of each layer; times are for `tokens` tokens on torch's threads."""
        return explain_layers(linears_of(model), reason, model, target, cache, tokens)

    def save_pretrained(*args: Any, **kwargs: Any) -> None:
        """Refuse: a checkpoint without the blocks would load with random ones."""
        raise ValueError(NOT_STORED)

    vars(model)[PACKED] = True
    model.__dict__["explain"] = explain

    def resize_token_embeddings(*args: Any, **kwargs: Any) -> None:
        """Refuse: embeddings are shared with the model that was compiled, and the head is compiled."""
        raise ValueError(
            "the embeddings of a compiled model keep their size: resize those of the model that was "
            "compiled, and compile it again."
        )

    model.__dict__["save_pretrained"] = save_pretrained
    model.__dict__["resize_token_embeddings"] = resize_token_embeddings
    for module in {model, model.base_model}:
        module.register_load_state_dict_pre_hook(_refuse_state)
    model.eval()
    return model


def stack_of(model: nn.Module) -> Stack:
    """The packed weights of a model whose blocks are compiled.

    Raises:
        ValueError: they are not.
    """
    for module in model.modules():
        if isinstance(module, CompiledLayer):
            return module.runner.stack
    raise ValueError(
        f"the blocks of this {type(model).__name__} are not compiled: hf_sparse.compile(model) first."
    )


def linears_of(model: nn.Module) -> list[Linear]:
    """All packed weights of a compiled model, shared ones once."""
    single = [module.packed for module in model.modules() if isinstance(module, CompiledLinear)]
    return single or stack_of(model).linears


def _refuse_attentions(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    config: Any = getattr(base, "config", None)  # the owner of the blocks may have none
    if kwargs.get("output_router_logits", getattr(config, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits: the routers of a compiled model are in its blocks. Ask the model "
            "that was compiled."
        )
    if kwargs.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError(
            "output_attentions: a compiled model never forms the attention weights. Ask the "
            "model that was compiled."
        )


def _refuse_state(model: nn.Module, *args: Any) -> None:
    """Refuse: packed weights would stay, and dense ones change in the other model, too."""
    raise ValueError(
        f"load_state_dict: this {type(model).__name__} is compiled: its packed weights cannot be "
        "replaced, and it shares the others with the model that was compiled. Load the weights into "
        "an uncompiled model, and compile that."
    )
