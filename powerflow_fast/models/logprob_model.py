"""A causal LM that returns the log-probs of completions, and the frozen p_base."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..ops.backends import Backend
from ..ops.logprobs import LogprobStats, linear_logprob_stats, linear_logprobs
from .adapters import is_peft
from .batches import Batch
from .head import find_head, head_inputs
from .modes import evaluating

logger = logging.getLogger(__name__)


class ScorerOutput(NamedTuple):
    """What :class:`CausalLMScorer` returns for B sequences with N completion tokens; all but ``logps`` detached."""

    logps: Tensor
    """(N,) fp32 log-prob in nats of each completion token, packed; differentiable."""
    cu_seqlens: Tensor
    """(B + 1,) int32 boundaries of the sequences in ``logps``."""
    stats: LogprobStats | None
    """(N,) fp32 each: entropy, log-sum-exp and mean logit of the distribution that each token was drawn from."""
    pooled_prompt: Tensor | None
    """(B, H) fp32 mean over all prompt tokens of the head's input."""


class CausalLMScorer(nn.Module):
    """Log-probs of completions under a Hugging Face causal LM, without the (tokens, vocabulary) logits.

    Equals, for the token y_t of a row, ``log_softmax(model(ids).logits[t - 1].float() / temperature)[y_t]``. Gradients
    reach every parameter of the model, the head included. Being the root module, it is what DDP and FSDP wrap.
    """

    def __init__(self, model: nn.Module, *, backend: Backend = "auto"):
        super().__init__()
        self.model = model
        self.head = find_head(model)
        self.backend = backend

    def forward(
        self, batch: Batch, *, temperature: float, need_stats: bool = False, pool_prompt: bool = False
    ) -> ScorerOutput:
        """Score ``batch`` at the sampling ``temperature``; see :class:`ScorerOutput`.

        Memory beyond the model's own: the last hidden states (B, T, H), their (N, H) rows, and ``linear_logprobs``.
        A packed batch is for models that :func:`check_packing` passes.
        """
        states = head_inputs(self.model, self.head, batch.model_inputs()).flatten(0, 1)
        hidden = states.index_select(0, batch.positions)
        weight, options = self.head.weight, {**self.head.options(), "temperature": temperature, "backend": self.backend}
        stats = pooled = None
        if need_stats:
            scores = linear_logprob_stats(hidden, weight, batch.labels, **options)
            logps, stats = scores.logp, LogprobStats(scores.logp.detach(), *scores[1:])
        else:
            logps = linear_logprobs(hidden, weight, batch.labels, **options)
        if pool_prompt:
            prompts = states.detach().index_select(0, batch.prompt_positions).float()
            pooled = torch.segment_reduce(prompts, "mean", lengths=batch.prompt_lengths, unsafe=True)
        return ScorerOutput(logps=logps, cu_seqlens=batch.cu_seqlens, stats=stats, pooled_prompt=pooled)


class BaseScorer:
    """Log-probs of completions under the frozen p_base; made by :func:`make_base`."""

    def __init__(
        self,
        scorer: CausalLMScorer,
        *,
        mode: Literal["adapter_off", "copy", "cpu"],
        frozen: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.scorer = scorer
        self.root: nn.Module = scorer
        """What is called for scores: of a policy sharded over processes its root, which gathers the weights."""
        self.mode = mode
        self._frozen = frozen

    def alike(self, scorer: CausalLMScorer) -> list[nn.Module]:
        """The models of ``scorer``, the policy's, and of p_base where it runs on the same device."""
        return [scorer.model] if self.mode == "cpu" else [scorer.model, self.scorer.model]

    @torch.no_grad()
    def score(self, batch: Batch, *, temperature: float) -> Tensor:
        """(N,) fp32 log-probs of the completion tokens in nats, packed, on the device of ``batch``."""
        device = self.scorer.head.weight.device
        with self._frozen(), evaluating(self.scorer.model):
            out = self.root(batch.to(device), temperature=temperature)
        return out.logps.to(batch.input_ids.device)


def make_base(
    model: nn.Module, mode: Literal["auto", "adapter_off", "copy", "cpu"] = "auto", *, backend: Backend = "auto"
) -> BaseScorer:
    """A scorer of p_base, the model as it is now, that later training of ``model`` does not move.

    ``"adapter_off"``: a PEFT model with its adapter switched off; no extra memory, and the base is the model *without*
    the adapter, trained or not. ``"copy"``: a frozen copy on the same device. ``"cpu"``: a frozen copy in CPU memory,
    run there. ``"auto"``: adapter_off for a PEFT model, else copy. ``model`` may be a :class:`CausalLMScorer`.
    """
    model = model.model if isinstance(model, CausalLMScorer) else model
    if mode == "auto":
        mode = "adapter_off" if is_peft(model) else "copy"
    if mode == "adapter_off":
        if not is_peft(model):
            raise ModelError("make_base: base='adapter_off' needs a PEFT model; use base='copy' for full fine-tuning")
        if any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name):
            logger.warning(
                "the model comes with a trained adapter, and p_base is the model without it; base='copy' takes the "
                "model as it is"
            )
        return BaseScorer(CausalLMScorer(model, backend=backend), mode=mode, frozen=model.disable_adapter)
    frozen = _frozen_copy(model, torch.device("cpu") if mode == "cpu" else None)
    return BaseScorer(CausalLMScorer(frozen, backend=backend), mode=mode)


def _frozen_copy(model: nn.Module, device: torch.device | None) -> nn.Module:
    """A deep copy in eval mode whose weights take no gradient, on ``device`` (None: where each weight is).

    Weights are copied first and handed to ``deepcopy``, so that they go straight to ``device``; ties stay ties.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        data = parameter.detach().to(device or parameter.device, copy=True)
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device or buffer.device, copy=True)
    return copy.deepcopy(model, memo).eval()
