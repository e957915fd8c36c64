"""The blocks of a compiled model, as transformers' own code meets them.

The first block runs the whole stack, the others hand its results on, so that the code around them,
which collects hidden states, keeps working.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse.runtime.model.description import Blocks
from hf_sparse.runtime.model.families import seen_by
from hf_sparse.runtime.programs.cache import alone_with
from hf_sparse.runtime.programs.encoded import Encoded
from hf_sparse.runtime.programs.runner import Runner
from hf_sparse.upstream.torch import (
    bytes_of,
    children_of,
    copy_forward_hooks_,
    has_forward_hooks,
    set_children_,
)
from hf_sparse.upstream.transformers.caches import EncoderDecoderCache, cache_in, own_cache
from hf_sparse.upstream.transformers.models import ATTENTION_SETTING, EXPERTS_SETTING

NOT_STORED = (
    "a compiled model has packed weights, which checkpoints, state dicts and pickles cannot hold: save "
    "the model that was compiled, or use hf_sparse.save_compiled."
)
# What transformers reads from the config at each call, and compiled blocks have built in; defaults.
BUILT_IN = {
    "num_hidden_layers": None,
    "sliding_window": None,
    "layer_types": None,
    "is_decoder": False,
    "use_bidirectional_attention": None,
    ATTENTION_SETTING: None,
    EXPERTS_SETTING: None,
}
# The rotations of the call that runs, by kind of attention: of each calling thread.
_ROTATIONS = threading.local()
# Arguments of a call that reach transformers' attention functions, and change what they compute.
NOT_COMPILED = ("position_bias", "softcap", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class CompiledBlocks(nn.ModuleList):
    """The list of blocks. A loop over it meets the first one only, unless someone listens to them.

    The first one runs all, so that calling the others would cost time and do nothing.
    """

    def __init__(self, layers: list[CompiledLayer]) -> None:
        super().__init__(layers)
        self._compiled = layers
        for layer in layers:
            layer.__dict__["all"] = layers  # a plain list: its owner is this module

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledBlocks:
        twin = type(self)([copy.deepcopy(layer, memo) for layer in self._compiled])
        # The same ones, unless they were changed since.
        set_children_(twin, copy.deepcopy(children_of(self), memo))
        return twin.train(self.training)

    def __iter__(self) -> Iterator[nn.Module]:
        layers: list[Any] = list(children_of(self).values())
        return iter(layers if layers[0].is_watched else layers[:1])

    @property
    def is_whole(self) -> bool:
        """Whether it holds the blocks that were compiled, in their order."""
        return list(children_of(self).values()) == self._compiled

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers: list[Any] = list(children_of(self).values())[index]
        return self if len(layers) == len(self) else nn.ModuleList(layers)


def _refuse_state_dict(*_: Any) -> None:
    raise ValueError(NOT_STORED)


class CompiledLayer(nn.Module):
    """One block of a compiled model. Also an instance of the family's own class of blocks."""

    arguments: tuple[str, ...] = ()
    family: Blocks
    all: list[CompiledLayer]

    def __init__(self, runner: Runner, index: int, config: Any) -> None:
        nn.Module.__init__(self)
        self.runner, self.index = runner, index
        self._config, self._built_in = config, _built_in(seen_by(config, self.family))
        if kinds := getattr(config, "layer_types", None):  # some models ask their blocks
            self.attention_type = kinds[min(index, len(kinds) - 1)]
        # A state dict without the blocks would be saved, and no one would miss them.
        self.register_state_dict_pre_hook(_refuse_state_dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledLayer:
        """Packed weights never change, and a runner serves all callers: copies share them."""
        config = copy.deepcopy(self._config, memo)
        twin = type(self)(self.runner, self.index, config).train(self.training)
        twin._built_in = self._built_in
        copy_forward_hooks_(self, twin)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ValueError(NOT_STORED)

    @property
    def is_watched(self) -> bool:
        """Whether someone has hooked a block, or the model collects what each of them gives."""
        collects = getattr(self.runner.results, "collects", False)
        return collects or any(map(has_forward_hooks, self.all))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run all blocks if this is the first one, and give this one's hidden states."""
        found = self._found(hidden_states, args, kwargs)
        outputs = self.family.outputs
        return (found, *[None] * (outputs - 1)) if outputs else found

    def _found(self, hidden_states: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        results = self.runner.results
        if self.index == 0 and getattr(results, "entered", False):
            results.entered = False
            given = dict(zip(self.arguments, args, strict=False)) | kwargs
            self._check_state(hidden_states)
            self._check_arguments(given)
            results.states = self._run(hidden_states, given)
        states: Tensor | None = getattr(results, "states", None)
        if states is None:
            raise ValueError(
                "a block of a compiled model is not run by itself, since the first one runs all: call "
                "the model, and neither its blocks nor the forward of its base model."
            )
        if states.ndim == 3:
            return states
        if self.index and not _same(hidden_states, states[self.index - 1]):
            raise ValueError(
                f"a hook changed what block {self.index} is given: all blocks of a compiled model "
                "are computed at once, so hooks on them can only look, but for the last one's. "
                "Change hidden states in the model that was compiled."
            )
        # A copy: whoever writes into it is noticed by the next block.
        return states[self.index].clone()

    def _check_state(self, hidden: Tensor) -> None:
        """Refuse a call in a mode, or after a change of the config, that was not compiled."""
        if torch.compiler.is_compiling():
            raise ValueError(
                "the model is compiled already: torch.compile has nothing to add to it."
            )
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise ValueError(
                "a compiled model cannot be traced: its blocks would become constants. Trace the model "
                "that was compiled, or export it by hf_sparse.export_onnx."
            )
        for name, value in _built_in(seen_by(self._config, self.family)).items():
            if value != self._built_in[name]:
                raise ValueError(
                    f"config.{name} is {value}, and was {self._built_in[name]} when the model was "
                    "compiled, which is built into its blocks. Change the model that was compiled, "
                    "and compile it again."
                )
        if self.training:
            raise ValueError("a compiled model is for inference: call its eval() first.")
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise ValueError(
                "a compiled model has no gradients: use torch.no_grad(), or train the model that "
                "was compiled."
            )
        if hidden.device.type != "cpu":
            raise ValueError(f"the input is on {hidden.device}; a compiled model runs on the CPU.")

    def _check_arguments(self, given: dict[str, Any]) -> None:
        """Refuse arguments that ask for another attention than was compiled.

        Args:
            given: what the block was called with beside the hidden states, by name.
        """
        if given.get("encoder_hidden_states") is not None and self.family.cross is None:
            raise ValueError("encoder_hidden_states: cross-attention is not compiled.")
        for name in NOT_COMPILED:
            compiled = name == "position_bias" and self.family.biased
            if given.get(name) is not None and not compiled:
                raise ValueError(f"{name}: what it changes in attention is not compiled.")
        causal = self.runner.stack.causal
        asked = given.get("is_causal", getattr(self._config, "is_causal", None))
        if asked is not None and bool(asked) != causal:
            raise ValueError(
                f"config.is_causal is {asked}, or this call has is_causal={asked}, and the blocks were "
                f"compiled for {causal}. Change the model that was compiled, and compile it again."
            )
        for name in ("attention_mask", "encoder_attention_mask"):
            mask = given.get(name)
            if mask is not None and mask.ndim != 2:
                raise ValueError(
                    f"{name} has {mask.ndim} dimensions; a compiled model takes masks of shape "
                    "(batch, tokens) only."
                )
        mask = given.get("attention_mask")
        positions = given.get("position_ids")
        unmasked = causal and mask is None and cache_in(given) is None
        if unmasked and positions is not None and (positions.diff(dim=-1) != 1).any():
            raise ValueError(
                "position_ids start anew within a sequence: packed sequences are not compiled. "
                "Give each text a row of the batch."
            )

    def _run(self, hidden: Tensor, given: dict[str, Any]) -> Tensor:
        """The hidden states behind the last block, or behind all if a block is watched."""
        cache = cache_in(given)
        with alone_with(cache):
            output = self.runner(
                hidden.detach().float(),
                given.get("attention_mask"),
                self._rotations(given),
                own_cache(cache),
                states=self.is_watched,
                bias=by_distance(given.get("position_bias")) if self.family.biased else None,
                encoded=self._encoded(given, cache),
            )
        if hidden.dtype == torch.float16 and self.family.clamped:
            most = torch.finfo(torch.float16).max
            output = output.clamp(-most, most)
        return output.to(hidden.dtype)

    def _encoded(self, given: dict[str, Any], cache: Any) -> Encoded | None:
        """The states of an encoder to which the blocks attend, if there are any."""
        states = given.get("encoder_hidden_states")
        if states is None:
            return None
        mask = given.get("encoder_attention_mask")
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}; with encoder_hidden_states a compiled "
                "model needs an EncoderDecoderCache, transformers' default."
            )
        return Encoded(states, mask, cache)

    def _rotations(self, given: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Cosines and sines of the positions, of each rotation that the blocks have."""
        if not self.family.rotary:
            return []
        kinds = self.family.kinds(self._config)
        rotations = [getattr(_ROTATIONS, "found", {}).get(kind) for kind in kinds[1:]]
        # This is the first block: it was given its own.
        every = [given.get("position_embeddings"), *rotations]
        return [rotation for rotation in every if rotation is not None]


def by_distance(position_bias: Tensor | None) -> Tensor | None:
    """A bias `(batch, heads, tokens, tokens)` of queries and keys as `(heads, 2 * tokens - 1)`.

    In the order of distances: that of the first query to the last key comes first.

    Raises:
        ValueError: pairs of tokens of the same distance, or sequences, have different biases.
    """
    if position_bias is None:  # the runner tells that it is missing
        return None
    first = position_bias[0]
    same = torch.equal(position_bias, first.expand_as(position_bias))
    if not same or not torch.equal(first[:, 1:, 1:], first[:, :-1, :-1]):
        raise ValueError(
            "position_bias differs between tokens of the same distance, or between sequences; wanted "
            "one that depends on the distance alone, as the model computes it."
        )
    return torch.cat([first[:, 0, 1:].flip(-1), first[:, :, 0]], dim=1).detach().float()


def record_rotation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Keep what a model's rotary embedding gives for one kind of attention."""
    kind = kwargs["layer_type"] if "layer_type" in kwargs else args[2]
    _ROTATIONS.found[kind] = output


def _built_in(config: Any) -> dict[str, Any]:
    return {name: copy.copy(getattr(config, name, value)) for name, value in BUILT_IN.items()}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, NaN included."""
    if a is b:
        return True
    alike = a.shape == b.shape and a.dtype == b.dtype
    return alike and torch.equal(bytes_of(a), bytes_of(b))


def enter(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str) -> None:
    """Let the first block run, if the blocks are those that were compiled."""
    blocks = getattr(owner, name)
    if not isinstance(blocks, CompiledBlocks) or not blocks.is_whole:
        raise ValueError(
            f"{name} of this compiled {type(owner).__name__} is not the list that was compiled: "
            "blocks were deleted, added, replaced or reordered, and all compiled ones would run. "
            "Change the model that was compiled, and compile it again."
        )
    results: Any = blocks[0].runner.results
    results.entered, results.states = True, None
    own_loop = blocks[0].family.block_class is not None
    results.collects = own_loop and bool(kwargs.get("output_hidden_states"))
    _ROTATIONS.found = {}


def leave(owner: nn.Module, args: tuple[Any, ...], output: Any, *, name: str) -> None:
    """Forget what the blocks gave, also behind an error."""
    blocks = getattr(owner, name)
    if isinstance(blocks, CompiledBlocks) and blocks.is_whole:
        results: Any = blocks[0].runner.results
        results.entered, results.states, results.collects = False, None, False
        _ROTATIONS.found = {}


def compiled_class(layer_class: type[nn.Module], family: Blocks) -> type[CompiledLayer]:
    """CompiledLayer as a subclass of a family's block, by which transformers finds its outputs."""
    names = tuple(inspect.signature(layer_class.forward).parameters)[2:]
    known = {"arguments": names, "family": family}
    return type(f"Compiled{layer_class.__name__}", (CompiledLayer, layer_class), known)
