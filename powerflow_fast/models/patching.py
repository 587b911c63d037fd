"""A method ``logprobs`` for any Hugging Face causal LM: log-probs of tokens without the logits.

The model's own ``forward`` runs; only its head, an ``nn.Linear``, computes ``linear_logprobs`` in place of its product
for the length of the call. So everything that surrounds a forward pass (autocast, adapters, FSDP2's gathering of
weights, accelerate's wrappers, checkpointing, hooks) does what it does for logits, and neither ``forward`` nor the
weights nor what is saved changes.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..ops.backends import Backend
from ..ops.checks import require_tensor, values_are_readable
from ..ops.logprobs import linear_logprob_stats, linear_logprobs
from .adapters import unwrap_peft
from .head import Head, find_head, head_replaced

Reduction = Literal["none", "sum", "mean"]
Model = TypeVar("Model", bound=nn.Module)
_IGNORED = -100


class TokenLogprobs(NamedTuple):
    """What ``model.logprobs(..., return_entropy=True)`` returns: two tensors of one shape, fp32, nats."""

    logprobs: Tensor
    """(B, T−1), or (B,) if reduced; differentiable."""
    entropy: Tensor
    """Of the distributions that the labels are drawn from; detached, 0 where a label is ignored."""


def patch_causal_lm(model: Model) -> Model:
    """Give ``model`` a method ``logprobs``, see :class:`LogprobsMethod`, in place; return ``model``.

        model = patch_causal_lm(AutoModelForCausalLM.from_pretrained(name))
        logps = model.logprobs(input_ids, attention_mask=attention_mask)     # (B, T−1)
        logps = model.logprobs(**batch, reduction="sum")                     # (B,), e.g. for DPO

    Args:
        model: a decoder-only causal LM of transformers, or a PEFT model around one. Its head may be tied and have a
            bias; a scale or softcap that ``forward`` applies to the logits is found by measuring it on 10 tokens, here
            and when the head was replaced (``resize_token_embeddings``).

    A model that is patched stays as it is. ``forward``, ``generate``, ``state_dict`` and ``save_pretrained`` don't
    change, and copies and pickles of the model have the method too. Patch before ``fully_shard`` or after it.

    Raises:
        ModelError: log-probs of this model can't be written as ``linear_logprobs`` (an encoder-decoder model, prompt
            tuning, a head that is quantised or adapted, logits changed otherwise), ``model`` is a wrapper such as DDP
            or a compiled module rather than the model in it, or it has an attribute ``logprobs`` of its own.
    """
    if isinstance(vars(model).get("logprobs"), LogprobsMethod):
        return model
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or not hasattr(unwrap_peft(model), "get_output_embeddings"):
        raise ModelError(
            f"patch_causal_lm: model must be a causal LM of transformers or a PEFT model around one, got {name}; "
            "patch the model before it is wrapped or compiled"
        )
    if hasattr(type(model), "logprobs") or "logprobs" in vars(model):
        raise ModelError(f"patch_causal_lm: {name} has an attribute 'logprobs' of its own, which would be hidden")
    model.logprobs = LogprobsMethod(model)
    return model


def unpatch_causal_lm(model: Model) -> Model:
    """Take back what ``patch_causal_lm`` did to ``model``, if it did; return ``model``."""
    if isinstance(vars(model).get("logprobs"), LogprobsMethod):
        del model.logprobs
    return model


class LogprobsMethod:
    """``logprobs`` of a model that :func:`patch_causal_lm` patched.

    It is an object and no bound method so that it doesn't keep its model alive, and can be copied and pickled with it.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._head = find_head(model)

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self._model(), "head": self._head}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._model, self._head = weakref.ref(state["model"]), state["head"]

    def __call__(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "none",
        return_entropy: bool = False,
        backend: Backend = "auto",
        **model_inputs: Any,
    ) -> Tensor | TokenLogprobs:
        """Log-probability of each token given the tokens before it. In plain torch, without padding:

            logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1].float()
            logps = torch.log_softmax(logits / temperature, -1).gather(-1, labels[:, 1:, None])[..., 0]

        but without the (B, T, V) logits. The shift happens here, as in a model's own loss: ``labels`` are aligned with
        ``input_ids``, and ``logps[b, t]`` is the log-prob of ``labels[b, t + 1]`` given ``input_ids[b, : t + 1]``.
        Where a label doesn't count the log-prob is 0, without gradient. These never count:

        * ``-100``, such as the tokens of a prompt;
        * a first token: nothing predicts it;
        * padding, and with padding on the left the first token after it;
        * in a packed row, the first token of each sequence.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) int64, or None: ``input_ids``.
            attention_mask: (B, T), 0 on padding, which may be on either side; None: no padding.
            position_ids: (B, T). Without an attention_mask, a new sequence begins wherever they don't rise by 1, and
                the sequences of a row don't see each other (for models that support it: ``self_check.check_packing``
                tells). With an attention_mask they must not restart: the model would let a sequence see the one before.
            temperature: > 0, of the sampling; the log-probs are those of ``softmax(logits / temperature)``.
            reduction: ``"none"``; or ``"sum"`` or ``"mean"`` of each row's counted tokens (0 if there are none).
            return_entropy: also return the entropies, without gradient, at the cost of one more forward pass of the
                head where gradients are wanted.
            backend: as in ``linear_logprobs``.
            model_inputs: further arguments of the model's ``forward``.

        Returns:
            (B, T−1) fp32 nats, or (B,) if reduced; a :class:`TokenLogprobs` with ``return_entropy``.

        Gradients: all parameters of the model, as through its logits. The model's training mode, autocast, adapters,
        gradient checkpointing and FSDP2 sharding are in effect as in a call of the model. Dropout too: switch it off to
        score a policy. Extra memory: that of ``linear_logprobs`` for B·T rows. A wrapper whose own forward must run, as
        DistributedDataParallel's, needs a module that calls ``logprobs`` in its forward.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype or range. Values are checked on a CPU
                only: on a GPU, a label outside [0, V) gives NaN, and so does a row whose position_ids restart under an
                attention_mask.
            ModelError: the model's forward doesn't pass all (B, T) positions to its head (``logits_to_keep``).
        """
        model = self._model()
        if model is None:
            raise ReferenceError("logprobs: the patched model no longer exists; keep a reference to it")
        if self._head.module is not unwrap_peft(model).get_output_embeddings():
            self._head = find_head(model)
        if reduction not in get_args(Reduction):
            raise ValueError(f"logprobs: reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
        if "use_cache" in model_inputs:
            raise TypeError("logprobs: use_cache is always False; take it out of the arguments")
        targets, broken = _targets(input_ids, labels, attention_mask, position_ids)
        options = {"temperature": temperature, "backend": backend}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        inputs = {name: value for name, value in given.items() if value is not None} | model_inputs
        forward = model.forward

        def scored(**inputs: Any) -> Tensor | TokenLogprobs:
            values = _forward_to_head(forward, self._head, inputs, targets, options, return_entropy)
            if broken is not None:
                values = [v.masked_fill(broken, float("nan")) for v in values]
            values = [_reduced(v[:, :-1], targets[:, :-1], reduction) for v in values]
            return TokenLogprobs(*values) if return_entropy else values[0]

        # As the model's forward, so that hooks around it, such as FSDP2's, see the log-probs as its output.
        with head_replaced(model, scored):
            return model(**inputs)


def _forward_to_head(
    forward: Any, head: Head, inputs: dict[str, Any], targets: Tensor, options: dict[str, Any], need_entropy: bool
) -> list[Tensor]:
    """(B, T) log-probs of ``targets``, and entropies if needed, computed while the head's weight is gathered."""
    found: list[Tensor] = []
    shapes: list[tuple[int, ...]] = []

    def at_head(hidden: Tensor) -> Tensor:
        shapes.append(tuple(hidden.shape[:-1]))
        if shapes != [tuple(targets.shape)]:
            return hidden[..., :1]
        args = hidden.flatten(0, 1), head.weight, targets.flatten()
        more = {**head.options(), **options}
        stats = linear_logprob_stats(*args, **more) if need_entropy else None
        logps = linear_logprobs(*args, **more) if stats is None else stats.logp
        # The head's output, as the hooks on the head see it, has to lie on the way to the log-probs that are returned.
        found.append(logps.view(*targets.shape, 1))
        if stats is not None:
            found.append(stats.entropy.view(*targets.shape, 1))
        return found[0]

    with head_replaced(head.module, at_head):
        forward(**inputs, use_cache=False)
    if not found or len(shapes) != 1:
        raise ModelError(
            "logprobs: the model's forward must call its output head once, on (B, T, H) hidden states with (B, T) = "
            f"{tuple(targets.shape)}; it passed {shapes}"
        )
    return [values[..., 0] for values in found]


def _targets(
    input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(B, T) the label that each position predicts, or −100, and (B, 1) where a row can't be scored, if that is known
    only on the device."""
    integers = (torch.int64, torch.int32)
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.shape[1] == 0:
        got = tuple(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"logprobs: input_ids must be a tensor of shape (B, T) with T >= 1, got {got}")
    shape = tuple(input_ids.shape)
    require_tensor("logprobs", "input_ids", input_ids, shape=shape, symbols="(B, T)", dtypes=integers)
    masks = (torch.bool, *integers, torch.float32, torch.bfloat16, torch.float16)
    for name, tensor, dtypes in (
        ("labels", labels, (torch.int64,)),
        ("attention_mask", attention_mask, masks),
        ("position_ids", position_ids, integers),
    ):
        if tensor is not None:
            require_tensor("logprobs", name, tensor, shape=shape, symbols="(B, T)", dtypes=dtypes)
    following = (input_ids.long() if labels is None else labels)[:, 1:]
    counts, broken = following != _IGNORED, None
    if attention_mask is not None:
        real = attention_mask != 0
        neighbours = real[:, 1:] & real[:, :-1]
        counts = counts & neighbours
        if position_ids is not None:
            broken = (neighbours & (position_ids.diff(dim=1) <= 0)).any(1, keepdim=True)
    elif position_ids is not None:
        counts = counts & (position_ids.diff(dim=1) == 1)
    if broken is not None and values_are_readable(broken):
        if broken.any():
            raise ValueError(
                f"logprobs: position_ids must not restart under an attention_mask, got both in row "
                f"{int(broken.nonzero()[0, 0])}: give a packed batch without attention_mask"
            )
        broken = None
    return nn.functional.pad(following.where(counts, _IGNORED), (0, 1), value=_IGNORED), broken


def _reduced(values: Tensor, targets: Tensor, reduction: Reduction) -> Tensor:
    """Sums over rows in fp64, as ``sequence_logprobs`` has them."""
    if reduction == "none":
        return values
    sums = values.double().sum(1)
    if reduction == "mean":
        sums = sums / (targets != _IGNORED).sum(1).clamp(min=1)
    return sums.to(values.dtype)
