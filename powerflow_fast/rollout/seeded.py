"""Decoding with a random stream per sequence: what one is drawn does not depend on which others share its batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..errors import ConfigError, ModelError, RolloutError
from ..models.adapters import unwrap_peft
from ..models.loading import max_positions
from ..models.modes import evaluating
from .engine import ModelEngine, checked_prompts
from .generate import own_generation_config_aside


@dataclass(frozen=True)
class Draw:
    """One drawn sequence, up to and with its first end-of-sequence token."""

    ids: list[int]
    finished: bool
    logps: list[float]
    """Log-prob in nats of each token under softmax(logits), at temperature 1."""
    proposal_logps: list[float]
    """Log-prob in nats of each token under softmax(logits / temperature), which it was drawn from; 0 where greedy."""


class SeededDecoder(ModelEngine):
    """Decodes with ``transformers``' generate, each token by the random number that its own sequence brings along.

    Token t of a sequence is ``searchsorted(cumsum(softmax(logits / temperature)), uniforms[t])``, to 60 bits. So a
    sequence is a function of the weights, its prompt and its numbers. The other sequences of a batch come in by the
    rounding of the logits alone, since the sizes of the matrix products and the padding are theirs too: of near ties
    in floating point, now and then one may fall the other way. Prompts that are decoded in the same batches give the
    same bits.

    The log-probs at temperature 1 and at the drawing temperature come from the logits that the token is drawn by, so
    that neither a second forward nor a kept (length, vocabulary) array is needed.

    Args:
        temperature: 0 takes the most likely token, the first of equal ones.
        others: as in :class:`powerflow_fast.rollout.HFGenerateEngine`, whose treatment of the model's own generation
            config is the same.
    """

    name = "hf"
    logps_are_free = True

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        max_completion_length: int = 1024,
        batch_size: int = 32,
        eos_ids: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        lm = unwrap_peft(model)
        if getattr(lm.config, "is_encoder_decoder", False):
            raise ModelError(
                f"{type(lm).__name__} is an encoder-decoder model; only decoder-only causal LMs can be drawn from"
            )
        super().__init__(
            model,
            tokenizer,
            temperature=temperature,
            max_completion_length=max_completion_length,
            batch_size=batch_size,
            eos_ids=eos_ids,
            autocast=autocast,
        )
        self.prefilled_tokens = 0
        """Prompt tokens that went through the model so far, padding left out."""
        self.forwards = 0
        """Calls of the model so far, each for a whole batch."""

    @torch.no_grad()
    def draw(self, prompts: Sequence[Sequence[int]], uniforms: Sequence[numpy.ndarray]) -> list[Draw]:
        """One sequence for each prompt, of at most ``len(uniforms[i])`` tokens, with numbers in [0, 1).

        ConfigError where a prompt and its completion exceed the model's positions, RolloutError where the model gives
        logits that are not numbers.
        """
        prompts = checked_prompts(prompts)
        if len(prompts) != len(uniforms):
            raise ValueError(
                f"draw: uniforms must have one array per prompt, {len(prompts)} of them, got {len(uniforms)}"
            )
        lm = unwrap_peft(self.model)
        positions = max_positions(lm)
        longest = max((len(p) + len(u) for p, u in zip(prompts, uniforms, strict=True)), default=0)
        if positions is not None and longest > positions:
            raise ConfigError(
                f"max_completion_length: prompt and completion may be {longest} tokens, but the model has positions "
                f"for {positions}; use a smaller max_completion_length (or reply_length), or shorter prompts"
            )
        drawn: list[Draw] = [Draw([], False, [], []) for _ in prompts]
        # Of like length, so that few rows are padded and few steps are wasted; no dependence on the caller's order.
        order = sorted(
            (i for i in range(len(prompts)) if len(uniforms[i])), key=lambda i: (len(prompts[i]), len(uniforms[i]))
        )
        with evaluating(self.model), own_generation_config_aside(lm), self.autocast():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self._batch(lm, [prompts[i] for i in rows], [uniforms[i] for i in rows])
                for i, one in zip(rows, batch, strict=True):
                    drawn[i] = one
        return drawn

    def _batch(self, lm: nn.Module, prompts: list[list[int]], uniforms: list[numpy.ndarray]) -> list[Draw]:
        from transformers import GenerationConfig

        device = lm.get_input_embeddings().weight.device
        width, limits = max(map(len, prompts)), list(map(len, uniforms))
        numbers = numpy.zeros((len(prompts), max(limits)))
        for row, values in zip(numbers, uniforms, strict=True):
            row[: len(values)] = values
        pick = _Pick(torch.from_numpy(numbers).to(device), self.temperature)
        config = GenerationConfig(
            do_sample=False,  # of what ``pick`` leaves
            max_new_tokens=max(limits),
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
        )
        lm.generate(
            input_ids=torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
            generation_config=config,
            logits_processor=[pick],
            stopping_criteria=[_limits(width, torch.tensor(limits, device=device))],
            synced_gpus=False,  # as in HFGenerateEngine
        )
        self.prefilled_tokens += sum(map(len, prompts))
        self.forwards += len(pick.tokens)
        kept = zip(*(torch.stack(x, 1).tolist() for x in (pick.tokens, pick.logps, pick.proposal)), strict=True)
        draws = []
        for (tokens, logps, proposal_logps), limit in zip(kept, limits, strict=True):
            length = next((t for t, token in enumerate(tokens[:limit], 1) if token in self.eos_ids), limit)
            if not all(map(math.isfinite, proposal_logps[:length])):
                first = list(map(math.isfinite, proposal_logps)).index(False)
                raise RolloutError(f"the model's logits for completion token {first} are not numbers")
            finished = tokens[length - 1] in self.eos_ids
            draws.append(Draw(tokens[:length], finished, logps[:length], proposal_logps[:length]))
        return draws


# Probability 1 in the whole numbers that are summed up; the sum of a whole vocabulary fits into 64 bits.
_ONE = 2.0**60


class _Pick:
    """A logits processor that leaves one token of each row, and keeps what it took."""

    def __init__(self, uniforms: Tensor, temperature: float):
        self.uniforms, self.temperature = uniforms, temperature
        self.tokens: list[Tensor] = []
        self.logps: list[Tensor] = []
        self.proposal: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logps = scores.double().log_softmax(-1)
        if self.temperature == 0:
            tokens = scores.argmax(-1)
            proposal = torch.where(scores.isnan().any(-1), torch.nan, 0.0).double()
        else:
            proposed = logps if self.temperature == 1 else (logps / self.temperature).log_softmax(-1)
            # In whole numbers, whose sums are the same in whatever order a GPU adds them.
            below = (proposed.exp() * _ONE).long().cumsum(-1)
            total = below[:, -1:]
            thresholds = torch.minimum((self.uniforms[:, len(self.tokens), None] * total).long(), total - 1)
            # ``right`` passes over tokens of probability 0.
            tokens = torch.searchsorted(below, thresholds, right=True)[:, 0].clamp_max(scores.shape[-1] - 1)
            proposal = proposed.gather(-1, tokens[:, None])[:, 0]
        self.tokens.append(tokens)
        self.logps.append(logps.gather(-1, tokens[:, None])[:, 0])
        self.proposal.append(proposal)
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)


def _limits(width: int, limits: Tensor) -> Callable[..., Tensor]:
    """A stopping criterion: a row has all the tokens that it may have."""

    def done(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - width >= limits

    return done
