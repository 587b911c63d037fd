"""Our log-prob kernels behind verl's ``use_fused_kernels``, for text models on its FSDP engine.

verl chooses the fused forward in one function, which knows the names "torch", "triton" and "liger" and skips any other.
It has no registry, so ``install`` wraps that function, and the engine's ``prepare_model_inputs``, which has to tell the
forward whether the entropy is wanted.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from verl.models.transformers import monkey_patch
from verl.models.transformers.dense_common import CausalLMOutputForPPO, forward_base_model
from verl.utils import tensordict_utils as tu
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from ..errors import ModelError
from ..models.head import find_head
from ..ops.logprobs import linear_logprob_stats, linear_logprobs
from .verl_settings import FUSED_BACKEND

__all__ = ["fused_forward", "install", "use_fused_forward"]

# verl has forwards of its own for these: their text model lies elsewhere, or their positions have more dimensions.
_OTHER_FORWARDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "qwen3_5", "qwen3_5_moe", "kimi_vl")
# what verl's engine and PEFT add; use_cache must reach the decoder: with a cache, packed sequences see each other
_DECODER_INPUTS = (
    "past_key_values",
    "inputs_embeds",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "cache_position",
)


def install() -> None:
    """Teach verl the backend ``powerflow_fast``. A second call changes nothing."""
    if not hasattr(monkey_patch.patch_forward_with_backends, "powerflow_fast"):
        monkey_patch.patch_forward_with_backends = _with_backend(monkey_patch.patch_forward_with_backends)
    if not hasattr(FSDPEngineWithLMHead.prepare_model_inputs, "powerflow_fast"):
        FSDPEngineWithLMHead.prepare_model_inputs = _with_entropy_flag(FSDPEngineWithLMHead.prepare_model_inputs)


def _with_backend(original):
    @functools.wraps(original)
    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        if use_fused_kernels and fused_kernels_backend == FUSED_BACKEND:
            return use_fused_forward(model)
        return original(model, use_fused_kernels=use_fused_kernels, fused_kernels_backend=fused_kernels_backend)

    patch_forward_with_backends.powerflow_fast = True
    return patch_forward_with_backends


def _with_entropy_flag(original):
    @functools.wraps(original)
    def prepare_model_inputs(self, micro_batch):
        inputs, output_args = original(self, micro_batch)
        fused = tu.get_non_tensor_data(data=micro_batch, key="use_fused_kernels", default=False)
        if fused and (self.model_config.fused_kernel_options or {}).get("impl_backend") == FUSED_BACKEND:
            inputs["calculate_entropy"] = tu.get_non_tensor_data(micro_batch, "calculate_entropy", default=False)
        return inputs, output_args

    prepare_model_inputs.powerflow_fast = True
    return prepare_model_inputs


def use_fused_forward(model: nn.Module) -> None:
    """Let ``model``'s class return log-probs and entropy in place of logits, as verl's fused forwards do.

    The model may be on the meta device. Its logit scale (Cohere, Granite) and softcap (Gemma), which verl's own
    backends leave out, are measured and kept.

    Raises ModelError for a model whose log-probs aren't those of a linear head on ``model.model``.
    """
    name = type(model).__name__
    if model.config.model_type in _OTHER_FORWARDS:
        raise ModelError(
            f"fused_kernel_options.impl_backend={FUSED_BACKEND} must be used with a text model, got {name} "
            f"({model.config.model_type}): use verl's 'torch' backend"
        )
    head = getattr(model, "lm_head", None)
    if not isinstance(getattr(model, "model", None), nn.Module) or not isinstance(head, nn.Linear):
        raise ModelError(
            f"fused_kernel_options.impl_backend={FUSED_BACKEND} needs a decoder in {name}.model and an nn.Linear in "
            f"{name}.lm_head, got {type(getattr(model, 'model', None)).__name__} and {type(head).__name__}"
        )
    cls = type(model)
    if cls.forward is not fused_forward:  # it is, if a worker has both actor and reference
        cls._powerflow_fast_own_forward = cls.forward
    found = find_head(_WithoutWeights(model))
    model._powerflow_fast_logits = {"logit_scale": found.logit_scale, "logit_softcap": found.logit_softcap}
    cls.forward = fused_forward
    print(f"Using {FUSED_BACKEND} backend for fused kernels in {name}")


class _WithoutWeights(nn.Module):
    """The model's own forward around a decoder and a head of no size: shows what it does to the logits, at no cost."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.config = model.config
        self.model = _NoDecoder()
        self.lm_head = nn.Linear(1, model.lm_head.out_features, bias=False)
        self.__dict__["original"] = model  # out of sight of nn.Module, which would move and visit it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def get_input_embeddings(self) -> None:
        return None

    def forward(self, **inputs: Any) -> Any:
        return type(self.original)._powerflow_fast_own_forward(self, **inputs)


class _NoDecoder(nn.Module):
    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=torch.zeros(*input_ids.shape, 1))


class _NoEntropyGradient(torch.autograd.Function):
    """Identity on an entropy that was made without a graph; who gives it a weight in a loss gets an error."""

    @staticmethod
    def forward(ctx, entropy: Tensor, anchor: Tensor) -> Tensor:
        return entropy.view_as(entropy)

    @staticmethod
    def backward(ctx, d_entropy: Tensor) -> tuple[None, None]:
        if d_entropy.any():
            raise RuntimeError(
                f"fused_kernel_options.impl_backend={FUSED_BACKEND} gives the entropy without a gradient: "
                "actor_rollout_ref.actor.entropy_coeff must be 0, or the backend 'torch'"
            )
        return None, None


def fused_forward(
    self,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    temperature: float = 1.0,
    shift_labels: Tensor | None = None,
    calculate_entropy: bool | None = None,
    return_dict: bool | None = None,
    **inputs: Any,
) -> CausalLMOutputForPPO:
    """The forward of a causal LM that returns, for each position, the log-prob of the next token and the entropy.

    Equals, with ``logits`` those of the model's own forward in fp32:

        z = logits / temperature
        next_tokens = shift_labels, else labels or input_ids rolled one to the left
        log_probs = log_softmax(z, -1).gather(-1, next_tokens[..., None])[..., 0]
        entropy = -(softmax(z, -1) * log_softmax(z, -1)).sum(-1)

    without the logits. Both are (B, T) fp32, in nats; only ``log_probs`` has a gradient, and a loss that gives the
    entropy one gets a RuntimeError. ``calculate_entropy``: True or False; None makes it where no gradient is recorded,
    in the pass that makes the log-probs. With gradients it costs a pass of its own.
    """
    if not return_dict:
        raise ValueError("fused_forward: return_dict must be True, as verl's engine sets it with use_fused_kernels")
    if unknown := set(inputs) - set(_DECODER_INPUTS):
        known = ", ".join(_DECODER_INPUTS)
        raise TypeError(f"fused_forward: further inputs must be among {known}, got {', '.join(sorted(unknown))}")
    outputs = forward_base_model(
        self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **inputs
    )
    hidden, head = outputs[0], self.lm_head
    if type(head).forward is not nn.Linear.forward or not isinstance(head, nn.Linear):
        raise ModelError(
            f"fused_forward: the head of {type(self).__name__} must be a plain nn.Linear, got {type(head).__name__}: "
            "take lm_head out of the adapter's target_modules"
        )
    if type(head.weight).__name__ == "DTensor":
        raise ModelError(
            f"fused_forward: the head's weight must be gathered when {type(self).__name__} runs, got a sharded DTensor "
            f"(placements {head.weight.placements})"
        )
    if shift_labels is None:
        tokens = labels if labels is not None else input_ids
        if tokens is None:
            raise ValueError("fused_forward: shift_labels, labels or input_ids must be given, got none of them")
        shift_labels = torch.roll(tokens, shifts=-1, dims=-1)
    shape = hidden.shape[:-1]
    operands = (hidden.reshape(-1, hidden.shape[-1]), head.weight, shift_labels.reshape(-1).long())
    options = {"bias": head.bias, "temperature": float(temperature), **self._powerflow_fast_logits}

    entropy = None
    if calculate_entropy or (calculate_entropy is None and not torch.is_grad_enabled()):
        stats = linear_logprob_stats(*operands, **options)
        log_probs, entropy = stats.logp, stats.entropy
        if log_probs.requires_grad:
            entropy = _NoEntropyGradient.apply(entropy, log_probs)
    else:
        log_probs = linear_logprobs(*operands, **options)
    return CausalLMOutputForPPO(
        log_probs=log_probs.view(shape),
        entropy=None if entropy is None else entropy.view(shape),
        past_key_values=outputs.past_key_values,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )
