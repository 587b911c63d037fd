"""The output head of a causal LM: its weight and bias, what the model does to the logits after it, and its input.

Nothing here knows a model by name. A head is the ``nn.Linear`` of ``get_output_embeddings()``; the hidden states are
whatever the model's own ``forward`` hands to it; and the scale and softcap are *measured*, by letting ``forward``
process known numbers in place of the head's output. That covers Cohere's and Granite's scales, Gemma's softcap,
Falcon-H1's multiplier and any later model of the form ``cap * tanh(scale * u / cap)``, and it tells when a model does
something else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .adapters import is_peft, unwrap_peft
from .modes import evaluating

# The last number is so large that a softcap shows its cap; the small ones show the scale; the rest check the curve.
_PROBE = (0.0, 0.01, -0.01, 1.0, -1.0, 10.0, -10.0, 1e3, -1e3, 1e30)


@dataclass(frozen=True)
class Head:
    """``u = h @ weight.T + bias``; ``v = logit_scale * u``; ``v = softcap * tanh(v / softcap)`` where there is one.

    ``weight`` (V, H) and ``bias`` (V,) or None are read from the live module at each access.
    """

    module: nn.Linear
    logit_scale: float
    logit_softcap: float | None
    tied: bool
    """The weight is also the input embedding."""

    @property
    def weight(self) -> Tensor:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    def options(self) -> dict[str, Any]:
        """What `linear_logprobs` has to know of the head besides its weight, as keywords."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "logit_softcap": self.logit_softcap}


def find_head(model: nn.Module) -> Head:
    """Find the head of a Hugging Face causal LM (plain or PEFT-wrapped) and measure its scale and softcap.

    Runs the model once, on 10 tokens, without gradients. Raises ModelError where log-probs of this model cannot be
    written as ``linear_logprobs``: encoder-decoder models, prompt tuning, a head that is no plain ``nn.Linear``
    (quantised, adapted by LoRA, absent), or logits changed in another way than by a scale and a softcap.
    """
    lm = unwrap_peft(model)
    name = type(lm).__name__
    if getattr(lm.config, "is_encoder_decoder", False):
        raise ModelError(f"find_head: {name} is an encoder-decoder model; only decoder-only causal LMs are supported")
    if is_peft(model) and model.active_peft_config.is_prompt_learning:
        kind = model.active_peft_config.peft_type.value
        raise ModelError(f"find_head: {kind} puts virtual tokens before the prompt, which is not supported; use LoRA")
    module = lm.get_output_embeddings()
    if not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        where = f"the output head of {name} is {type(module).__module__}.{type(module).__qualname__}, not nn.Linear"
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            remedy = "take the head out of the adapter's target_modules and modules_to_save"
        else:
            remedy = "load the model with a plain head (for a quantised model: keep the head out of the quantisation)"
        raise ModelError(f"find_head: {where}; {remedy}")
    if not module.weight.is_floating_point() or module.weight.ndim != 2:
        raise ModelError(
            f"find_head: the output head of {name} has a weight of dtype {module.weight.dtype} and shape "
            f"{tuple(module.weight.shape)}; keep the head out of the quantisation"
        )
    scale, softcap = _measure(lm, module)
    embedding = lm.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is module.weight
    return Head(module=module, logit_scale=scale, logit_softcap=softcap, tied=tied)


def head_inputs(model: nn.Module, head: Head, inputs: Mapping[str, Tensor]) -> Tensor:
    """(B, T, H) hidden states that the model's forward hands to its head; the head's matrix product is not run.

    They are differentiable, and the only ones kept. ``inputs`` are a batch's ``model_inputs()``: (B, T) ``input_ids``
    with what goes with them. The key-value cache is off.
    """
    seen: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden[..., :1]

    lm = unwrap_peft(model)
    with head_replaced(head.module, keep):
        lm(**inputs, use_cache=False)
    if len(seen) != 1 or seen[0].shape[:-1] != inputs["input_ids"].shape:
        shapes = [tuple(h.shape) for h in seen]
        raise ModelError(
            f"head_inputs: {type(lm).__name__}.forward must call its output head once on (B, T, H) hidden states with "
            f"(B, T) = {tuple(inputs['input_ids'].shape)}; it passed {shapes}"
        )
    return seen[0]


@contextmanager
def head_replaced(module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let ``module`` compute ``forward`` for a while. Its hooks still run, so sharded weights are still gathered."""
    patched = module.__dict__.get("forward")  # such as accelerate's hook, put there on the instance
    module.forward = forward
    try:
        yield
    finally:
        if patched is None:
            del module.forward
        else:
            module.forward = patched


def _measure(lm: nn.Module, module: nn.Linear) -> tuple[float, float | None]:
    """Scale and softcap that ``lm.forward`` applies, from probe values in place of the head's output."""
    device = module.weight.device
    points = torch.tensor(_PROBE, device=device)
    count = len(points)
    # Column j starts at probe j: every vocabulary entry meets every probe value, each at another position.
    index = torch.arange(count, device=device)[:, None] + torch.arange(module.out_features, device=device)
    u = points[index % count][None]
    ids = torch.zeros(1, count, dtype=torch.long, device=device)
    with torch.no_grad(), evaluating(lm), head_replaced(module, lambda hidden: u):
        output = lm(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits = output.logits if hasattr(output, "logits") else output[0]
    name = type(lm).__name__
    if logits.shape != u.shape:
        raise ModelError(
            f"find_head: {name}.forward turned head outputs of shape {tuple(u.shape)} into logits of shape "
            f"{tuple(logits.shape)}; a head whose logits are cut or regrouped is not supported"
        )
    got, u = logits.double(), u.double()
    column = got[0, :, 0]
    largest = float(column[-1])
    softcap = largest if abs(largest) < 1e20 else None
    if softcap is None:
        scale = float(column[3])
        want = scale * u
    else:
        scale = softcap * float(torch.atanh(column[1] / softcap)) / _PROBE[1]
        want = softcap * torch.tanh(scale * u / softcap)
    tolerance = 16 * torch.finfo(logits.dtype).eps
    wrong = ~torch.isclose(got, want, rtol=tolerance, atol=tolerance)  # NaN is never close
    if scale <= 0 or wrong.any():
        at = int(wrong.flatten().to(torch.uint8).argmax())
        pair = f"a head output of {float(u.flatten()[at]):g} became {float(got.flatten()[at]):g}"
        raise ModelError(
            f"find_head: {name}.forward changes the logits after its head in a way that is neither a positive scale "
            f"nor a softcap ({pair} at vocabulary entry {at % module.out_features}); linear_logprobs cannot express it"
        )
    return (1.0 if abs(scale - 1) < 1e-6 else scale), softcap  # 1 exactly, where only the softcap's rounding hides it
