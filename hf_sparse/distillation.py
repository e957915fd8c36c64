"""Distillation: a model in training learns from the outputs of its dense original.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531.

    loss <- (1 - logits) * loss + logits * T^2 KL(teacher / T || student / T) + hidden * mean_l MSE_l

The errors of hidden states may be relative, as in SquareHead (Kurtic et al., "Sparse Fine-tuning for
Inference Acceleration of Large Language Models", https://arxiv.org/abs/2310.06927):

    MSE_l = mean over tokens of |h_student - h_teacher|^2 / |h_teacher|^2

The paper divides by the mean of a layer over its tokens; here each token has its own divisor, because
a few tokens of a language model, the first above all, have states a thousand times as long as others.

For models with one output (regression) the divergence is the mean squared error of the logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_sparse.arguments import check_has_values, check_kinds, check_model
from hf_sparse.provenance.record import announce_teaching_, end_teaching_, note_taught_
from hf_sparse.upstream.peft_by_name import has_adapters
from hf_sparse.upstream.transformers.auto import CAUSAL_LM_NAMES

# Logits whose divergence is computed at once.
_CHUNK = 1 << 18

# The outputs that transformers' heads call logits: question answering has two.
_LOGITS = ("logits", "start_logits", "end_logits")


class Distillation:
    """Adds the teacher's loss to the loss of a model's forward, in training mode.

    It is a pair of forward hooks, so that Trainer, Accelerate and a plain loop see nothing but
    another loss.

    >>> distillation = Distillation(teacher).attach(model)   # doctest: +SKIP
    >>> trainer.train()                                      # doctest: +SKIP
    >>> distillation.remove()                                # doctest: +SKIP

    Args:
        teacher: a model that takes the same inputs, usually the dense original; it is put into
            eval mode and its weights are frozen.
        logits: weight of the logits' divergence, in `[0, 1]`; the task's own loss gets the rest.
        hidden: weight of the hidden states' squared error, embeddings and every block; needs the
            same number and size of blocks.
        temperature: of the softmax, `> 0`.
        relative: each token's squared error of a hidden state is divided by the squared norm of the
            teacher's, so that all blocks count alike.

    With `logits=1` a causal model's own loss is not computed.

    Memory: the teacher, its activations of one batch (without gradients), and one tensor of the
    logits' size, the teacher's, which turns into their gradient; all else goes by a few tokens.

    Raises:
        ValueError: weights outside what is allowed, or both 0.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        logits: float = 0.5,
        hidden: float = 0.0,
        temperature: float = 2.0,
        relative: bool = False,
    ) -> None:
        check_model(teacher, "Distillation")
        check_has_values(teacher, "Distillation")
        check_kinds(Distillation, locals())
        if not 0 <= logits <= 1 or not 0 <= hidden < float("inf") or logits + hidden == 0:
            raise ValueError(
                f"logits is {logits} and hidden {hidden}; wanted 0 <= logits <= 1 and hidden >= 0, "
                "not both 0."
            )
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature is {temperature}; wanted a number > 0.")
        self.teacher = teacher.eval().requires_grad_(False)
        self.logits = logits
        self.hidden = hidden
        self.temperature = temperature
        self.relative = relative
        self._labels: Tensor | None = None  # of this forward pass, if the model does not get them
        self._handles: list[Any] = []
        self._student: nn.Module | None = None

    def __repr__(self) -> str:
        return (
            f"<Distillation from {type(self.teacher).__name__}: logits={self.logits}, "
            f"hidden={self.hidden}, temperature={self.temperature}, "
            f"{'attached' if self._handles else 'not attached'}>"
        )

    def attach(self, model: nn.Module) -> Distillation:
        """Let `model` learn from the teacher until `remove` is called.

        Raises:
            ValueError: the model is the teacher, or this is attached already.
        """
        check_model(model, "Distillation.attach")
        if hasattr(model, "get_base_model"):  # a PeftModel, whose forward hides the inputs' names
            model = model.get_base_model()  # type: ignore[operator]
        taught = {id(parameter) for parameter in self.teacher.parameters()}
        if any(id(parameter) in taught for parameter in model.parameters()):
            raise ValueError(
                "the model is its own teacher, or shares weights with it; wanted another one: "
                "copy.deepcopy(model)."
            )
        configs = getattr(model, "config", None), getattr(self.teacher, "config", None)
        mine, theirs = (getattr(config, "vocab_size", None) for config in configs)
        if mine is not None and theirs is not None and mine > theirs:
            raise ValueError(
                f"the model knows {mine} tokens, its teacher {theirs}. Wanted a teacher with the "
                "same tokenizer."
            )
        if any(getattr(config, "is_encoder_decoder", False) for config in configs):
            raise ValueError(
                "distillation works for encoders and for decoders; this model is both, an "
                "encoder-decoder."
            )
        if self._handles:
            raise ValueError("this Distillation is attached already; make one for each model.")
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._add_loss, with_kwargs=True),
        ]
        self._student = model
        announce_teaching_(model, self.settings)
        return self

    @property
    def settings(self) -> dict[str, Any]:
        """The teacher and the weights of the loss, for the model card."""
        names = ("logits", "hidden", "temperature", *(["relative"] if self.relative else []))
        settings = {name: getattr(self, name) for name in names}
        return {"model": _name_of(self.teacher), **settings}

    def remove(self) -> None:
        """Take the hooks off the model, which remembers for its card that it was taught."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self._student is not None:
            end_teaching_(self._student)
        self._student = None

    def _before(
        self, model: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        """Ask for the hidden states that are compared, and not for a loss that has no weight."""
        if not model.training:
            return None
        asked = {**kwargs, "output_hidden_states": True} if self.hidden else dict(kwargs)
        self._labels = None
        if self.logits == 1 and _is_causal_lm(model) and _is_causal_lm(self.teacher):
            self._labels = asked.pop("labels", None)
        return args, asked

    def _add_loss(self, model: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> Any:
        if not model.training:
            return None
        inputs = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        named = inputs.pop("kwargs", {})
        inputs = {**inputs, **named}
        inputs.pop("return_dict", None)
        own = getattr(outputs, "loss", None)
        if own is None and self._labels is None:
            raise ValueError(
                "the model returned no loss to add the teacher's to. Give it labels, and leave "
                "return_dict at True."
            )
        device = outputs.logits.device if own is None else own.device
        if next(self.teacher.parameters()).device != device:
            self.teacher.to(device)
        counted = inputs.pop("num_items_in_batch", None)
        labels = inputs.pop("labels", self._labels)
        for name in ("start_positions", "end_positions"):
            inputs.pop(name, None)
        with torch.no_grad():
            taught = self.teacher(**inputs, return_dict=True)
        added = torch.zeros((), device=device)
        if self.logits:
            added = self.logits * self._divergence(outputs, taught, inputs, labels)
        if self.hidden:
            added = added + self.hidden * _states_error(outputs, taught, inputs, self.relative)
        if counted is not None and isinstance(labels, Tensor) and _is_causal_lm(self.teacher):
            # transformers divides summed losses by the labels of all accumulated batches: so do we.
            added = added * int((labels[..., 1:] != -100).sum()) / counted
        outputs["loss"] = added if own is None else (1 - self.logits) * own + added
        if torch.is_grad_enabled():
            note_taught_(model, has_adapters)
        return outputs

    def _divergence(
        self, outputs: Mapping[str, Any], taught: Mapping[str, Any], inputs: Any, labels: Any
    ) -> Tensor:
        names = [name for name in _LOGITS if outputs.get(name) is not None]
        for found in (outputs, taught):
            if not names or any(found.get(name) is None for name in names):
                raise ValueError(
                    f"the teacher's outputs are {', '.join(taught)}, the model's "
                    f"{', '.join(outputs)}; wanted the same logits in both: models with the same "
                    "head."
                )
        problem = getattr(getattr(self.teacher, "config", None), "problem_type", None)
        terms = []
        for name in names:
            student, teacher = outputs[name], taught[name]
            if student.shape != teacher.shape:
                raise ValueError(
                    f"{name} are {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}. Wanted "
                    "a teacher with the same head."
                )
            if student.shape[-1] == 1 or problem == "regression":
                terms.append(functional.mse_loss(student.float(), teacher.float()))
                continue
            if problem == "multi_label_classification":
                terms.append(
                    _bernoulli_divergence(student.float(), teacher.float(), self.temperature)
                )
                continue
            counts = torch.ones(student.shape[:-1], dtype=torch.bool, device=student.device)
            if student.ndim == 3:  # tokens: only those that have a label
                counts = _labelled(student, inputs, labels, shifted=_is_causal_lm(self.teacher))
            terms.append(
                _Divergence.apply(
                    student.flatten(0, -2),
                    teacher.flatten(0, -2),
                    counts.flatten(),
                    self.temperature,
                )
            )
        return torch.stack(terms).mean()


class _Divergence(torch.autograd.Function):
    """`T^2 KL(teacher / T || student / T)`, the mean over some tokens, by a few tokens at a time.

    A vocabulary makes logits larger than all else in a small model. Their gradient is computed with
    the loss and written over the teacher's logits, so that nothing more of their size is needed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, student: Tensor, teacher: Tensor, counts: Tensor, temperature: float
    ) -> Tensor:
        # student, teacher: (tokens, classes); counts: (tokens,)
        grad = teacher if teacher.dtype == student.dtype else torch.empty_like(student)
        total = student.new_zeros((), dtype=torch.float32)
        rows = max(1, _CHUNK // student.shape[-1])
        scale = 1 / max(int(counts.sum()), 1)
        parts = (part.split(rows) for part in (student, teacher, grad, counts))
        for mine, theirs, out, chosen in zip(*parts, strict=True):
            log_q = functional.log_softmax(mine.float() / temperature, dim=-1, dtype=torch.float32)
            log_p = functional.log_softmax(
                theirs.float() / temperature, dim=-1, dtype=torch.float32
            )
            p = log_p.exp()
            weight = chosen.float()
            lost = log_p.sub_(log_q).mul_(p).sum(-1)
            total += (lost * weight).sum() * (scale * temperature**2)
            out.copy_(log_q.exp_().sub_(p).mul_(weight[:, None] * (scale * temperature)))
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad] = ctx.saved_tensors
        return (grads[0].to(grad.dtype) * grad), None, None, None


def _bernoulli_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The mean divergence of independent labels, times the squared temperature."""
    chance = (teacher / temperature).sigmoid()
    crossed = functional.binary_cross_entropy_with_logits(student / temperature, chance)
    own = functional.binary_cross_entropy_with_logits(teacher / temperature, chance)
    return (crossed - own) * temperature**2


def _name_of(model: nn.Module) -> str:
    """The name that a model has on the Hub, or else its class and the folder that it is from."""
    name: str = getattr(getattr(model, "config", None), "name_or_path", None) or ""
    kind = type(model).__name__
    if not Path(name).exists() and name.count("/") <= 1:
        return name or kind
    return f"{kind} from the folder {Path(name).resolve().name}"


def _is_causal_lm(model: nn.Module) -> bool:
    """Whether the logits of a token predict the token after it."""
    names = {base.__name__ for base in type(model).__mro__}
    return not names.isdisjoint(CAUSAL_LM_NAMES)


def _labelled(logits: Tensor, inputs: Mapping[str, Any], labels: Any, shifted: bool) -> Tensor:
    """Mark the tokens whose logits count: boolean `(batch, tokens)`.

    Those with a label; if `shifted`, those whose next token has one.
    """
    if isinstance(labels, Tensor) and labels.shape == logits.shape[:2]:
        chosen = labels != -100
        if shifted:
            chosen = functional.pad(chosen[:, 1:], (0, 1), value=False)
        return chosen if bool(chosen.any()) else torch.ones_like(chosen)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:2]:
        return mask.bool()
    return torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)


def _states_error(outputs: Any, taught: Any, inputs: Mapping[str, Any], relative: bool) -> Tensor:
    """Mean error of the hidden states over the tokens that are no padding, and over the blocks."""
    student, teacher = outputs.hidden_states, taught.hidden_states
    if len(student) != len(teacher) or student[0].shape != teacher[0].shape:
        raise ValueError(
            f"the model has {len(student)} hidden states of {tuple(student[0].shape)}, the teacher "
            f"{len(teacher)} of {tuple(teacher[0].shape)}. Wanted the same: from "
            "others learn by the logits alone, with hidden at 0."
        )
    mask = inputs.get("attention_mask")
    flat = [state.flatten(0, -2) for state in (*student, *teacher)]
    if isinstance(mask, Tensor) and mask.numel() == flat[0].shape[0]:
        kept = mask.reshape(-1).bool()
        flat = [state[kept] for state in flat]
    pairs = zip(flat[: len(student)], flat[len(student) :], strict=True)
    error = _relative_error if relative else functional.mse_loss
    return torch.stack([error(a.float(), b.float()) for a, b in pairs]).mean()


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over tokens of the squared error over the teacher's squared norm."""
    wanted = teacher.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
    return ((student - teacher).square().sum(-1) / wanted).mean()
