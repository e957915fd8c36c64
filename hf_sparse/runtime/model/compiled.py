"""`hf_sparse.compile`: a transformers model whose blocks run as machine code.

The compiled model is of the same class and has the same config, embeddings, heads and `generate`;
only its list of blocks is another one. The first block runs the whole stack, the others hand its
results on, so that transformers' own code around them, which collects hidden states, keeps working.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_sparse.arguments import check_kinds
from hf_sparse.runtime.llvm.jit import DEFAULT_CACHE
from hf_sparse.runtime.llvm.target import Target, named
from hf_sparse.runtime.model.blocks import find_blocks, pack_blocks
from hf_sparse.runtime.model.coded_head import CodedHead
from hf_sparse.runtime.model.coding import coding_of
from hf_sparse.runtime.model.configured import why_not_compiled
from hf_sparse.runtime.model.copying import with_modules
from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.explain import Explanation, explain_layers
from hf_sparse.runtime.model.faithful import check_blocks, check_parents, why_other_attention
from hf_sparse.runtime.model.families import COMPILED, families_in, seen_by
from hf_sparse.runtime.model.generation import generate
from hf_sparse.runtime.model.layer_by_layer import with_compiled_layers
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
    check_parameters,
    check_types,
    why_not_plain,
)
from hf_sparse.runtime.model.single_layers import CompiledHead, CompiledLinear
from hf_sparse.runtime.programs.runner import Runner
from hf_sparse.runtime.weights.linear import Linear
from hf_sparse.runtime.weights.rates import nominal
from hf_sparse.runtime.weights.rounding import Coding
from hf_sparse.runtime.weights.stack import Stack
from hf_sparse.structure.layers import PACKED
from hf_sparse.upstream.torch import forward_hooks
from hf_sparse.upstream.transformers.attention import register_mask
from hf_sparse.upstream.transformers.models import (
    block_class,
    forget_output_hooks_,
    set_attention_,
    tells_outputs,
)

# The name of the attention in the compiled model's config: masks reach the blocks as they were given.
ATTENTION = "hf_sparse"


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
    reason = why_not_whole(model)
    if reason is not None and bits is not None:
        raise ValueError(
            f"bits is {bits}, and {type(model).__name__} is not compiled as a whole: {reason}. Wanted "
            "a model whose blocks are; leave `bits` out."
        )
    if reason is not None:
        layered = with_compiled_layers(model, reason, chosen, folder)
        return _finished(layered, reason, chosen, folder)
    base: Any = model.base_model
    families = families_in(base)
    for family in families:
        check_blocks(model, family)
    found = [find_blocks(base, family) for family in families]
    lists = [getattr(owner, name) for owner, name, _ in found]
    check_parents(model, lists)
    coding, rates = coding_of(model, bits), nominal(chosen)
    stacks = [
        pack_blocks(seen_by(model.config, family), family, modules, family.stack, rates, coding)
        for family, (_, _, modules) in zip(families, found, strict=True)
    ]
    rest = with_modules(model, {blocks: nn.ModuleList() for blocks in lists})
    check_parameters(rest)
    return assemble(rest, stacks, chosen, folder, coding.head)


def why_not_whole(model: PreTrainedModel) -> str | None:
    """Why a model's blocks are not compiled as a whole, or None."""
    reason = why_not_compiled(model.config)
    if reason is not None:
        return reason
    families = families_in(model.base_model)
    if not families:
        return f"a {type(model).__name__} has no encoder and no decoder, but is one of them"
    holders = [_holder(model, family) for family in families]
    configs = [model.config, *(getattr(holder, "config", model.config) for holder in holders)]
    reasons = map(why_other_attention, configs)
    return next((reason for reason in reasons if reason is not None), None)


def assemble(
    model: PreTrainedModel,
    stacks: Sequence[Stack],
    target: Target,
    cache: Path | None,
    head_coding: Coding | None = None,
) -> PreTrainedModel:
    """Put packed stacks into a model that has empty lists of blocks.

    Args:
        model, stacks: which; an encoder's before a decoder's.
        target, cache: as `compile`'s.
        head_coding: how the output head becomes codes; None: not at all.
    """
    set_attention_(model.config, ATTENTION)
    register_mask(ATTENTION, _as_given)
    families = families_in(model.base_model)
    for family, stack in zip(families, stacks, strict=True):
        _place(model, family, stack, Runner(stack, target, cache))
    forget_output_hooks_(model)  # transformers hooked the blocks that are gone, if any
    head = model.get_output_embeddings()
    if any(stack.causal for stack in stacks):
        made: CompiledHead | None = None
        if head_coding is not None:
            made = CodedHead.of(head, target, cache, head_coding)
        if made is None and CompiledHead.suits(head) and why_not_plain(head) is None:
            made = CompiledHead(head, target, cache)
        if made is not None:
            model.set_output_embeddings(made)
    if families[-1].last_norm is not None and head is not None and model.can_generate():
        model.__dict__["generate"] = types.MethodType(generate, model)
    return _finished(model, None, target, cache)


def _place(model: PreTrainedModel, family: Blocks, stack: Stack, runner: Runner) -> None:
    """Put one stack into the module that has its list of blocks."""
    name, owner = family.list_name, _holder(model, family)
    config = getattr(owner, "config", model.config)  # some stacks have a copy of the model's
    set_attention_(config, ATTENTION)
    seen = seen_by(config, family)
    inner = getattr(config, "inner_group_num", 1)
    if seen.num_hidden_layers * inner != len(stack.blocks):
        told = family.names.get("num_hidden_layers", "num_hidden_layers")
        raise ValueError(
            f"config.{told} is {seen.num_hidden_layers}, and the model has "
            f"{len(stack.blocks) // inner}: make them equal, by deleting blocks or in the config."
        )
    layer_class = compiled_class(_block_class(model, owner, family), family)
    layers = [layer_class(runner, index, config) for index in range(len(stack.blocks))]
    setattr(owner, name, CompiledBlocks(layers))
    owner.register_forward_pre_hook(functools.partial(enter, name=name), with_kwargs=True)
    if family.rotary_kinds:
        owner.rotary_emb.register_forward_hook(record_rotation, with_kwargs=True)
    owner.register_forward_hook(functools.partial(leave, name=name), always_call=True)
    for module in {model.base_model, owner}:  # heads call either
        if not any(hook is _refuse_attentions for _, hook in forward_hooks(module)):
            module.register_forward_pre_hook(_refuse_attentions, with_kwargs=True)
    if family is COMPILED["albert"]:  # its loop goes over groups of layers
        owner.config = copy.copy(owner.config)
        owner.config.num_hidden_layers = owner.config.num_hidden_groups = len(layers)


def _holder(model: PreTrainedModel, family: Blocks) -> Any:
    return model.base_model.get_submodule(family.holder)


def _block_class(model: PreTrainedModel, owner: nn.Module, family: Blocks) -> type[nn.Module]:
    """The class of a stack's blocks, which the model tells, or that part of it that has them."""
    teller = owner if tells_outputs(owner) else model.base_model
    return block_class(teller, family.block_class)


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


def stacks_of(model: nn.Module) -> list[Stack]:
    """The packed weights of a model whose blocks are compiled, of an encoder before those of a decoder.

    Raises:
        ValueError: they are not.
    """
    runners = {
        id(module.runner): module.runner
        for module in model.modules()
        if isinstance(module, CompiledLayer)
    }
    if runners:
        return [runner.stack for runner in runners.values()]
    raise ValueError(
        f"the blocks of this {type(model).__name__} are not compiled: hf_sparse.compile(model) first."
    )


def stack_of(model: nn.Module) -> Stack:
    """The only one of `stacks_of`, or the last."""
    return stacks_of(model)[-1]


def linears_of(model: nn.Module) -> list[Linear]:
    """All packed weights of a compiled model, shared ones once."""
    single = [module.packed for module in model.modules() if isinstance(module, CompiledLinear)]
    return single or [linear for stack in stacks_of(model) for linear in stack.linears]


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
