"""Completions by transformers' generate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..models.adapters import unwrap_peft
from ..models.modes import evaluating
from ..tools.random_state import seeded
from .engine import ModelEngine, Rollout, cast_once, checked_prompts, finished_rollout


class HFGenerateEngine(ModelEngine):
    """Temperature sampling of the full softmax with ``transformers``' generate.

    The model's own generation_config (top-k, penalties, forced or banned tokens, ...) is put aside meanwhile, since
    what is sampled must be what is scored; only its end-of-sequence ids count. Global random state is left as it was.

    Args:
        temperature: > 0, the one that log-probs are scored at.
        max_completion_length: most tokens of a completion, end-of-sequence token included.
        batch_size: sequences decoded at once.
        eos_ids: None finds them with :func:`eos_token_ids`.
        autocast: makes the context that the model runs in, such as ``lambda: torch.autocast("cuda", torch.bfloat16)``.
    """

    name = "hf"
    logps_are_free = False  # they are made from every step's scores, (batch, vocabulary) each

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        max_completion_length: int | None = None,
        return_logps: bool = False,
    ) -> Rollout:
        """See :meth:`RolloutEngine.generate`. Prompts of like length share a batch; results keep the caller's order."""
        prompts = checked_prompts(prompts)
        limit = max_completion_length or self.max_completion_length
        completions: list[list[int]] = [[] for _ in prompts]
        logps: list[list[float]] = [[] for _ in prompts]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        lm = unwrap_peft(self.model)
        device = lm.get_input_embeddings().weight.device
        aside = own_generation_config_aside(lm)
        with evaluating(self.model), aside, cast_once(lm), seeded(seed, device), self.autocast():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                tokens, scores = self._generate_batch(lm, [prompts[i] for i in rows], limit, device, return_logps)
                lengths = self._lengths(tokens)
                for i, row, length in zip(rows, tokens.tolist(), lengths, strict=True):
                    completions[i] = row[:length]
                if scores is not None:
                    for i, row, length in zip(rows, scores.tolist(), lengths, strict=True):
                        logps[i] = row[:length]
        return finished_rollout(self, prompts, completions, logps if return_logps else None)

    def _generate_batch(
        self, lm: nn.Module, prompts: list[list[int]], limit: int, device: torch.device, return_logps: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L) tokens after the prompts, and their log-probs (B, L) when asked for."""
        from transformers import GenerationConfig

        width = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        config = GenerationConfig(
            do_sample=True,
            temperature=float(self.temperature),
            top_k=0,  # transformers' default is 50
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=self.eos_ids or None,
            pad_token_id=self.pad_id,
            use_cache=True,
            return_dict_in_generate=return_logps,
            output_scores=return_logps,
        )
        # Not in step with other processes, which a sharded model would be told to be: its weights are gathered here,
        # and the others may sample more prompts, or none.
        out = lm.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
        if not return_logps:
            return out[:, width:], None
        tokens = out.sequences[:, width:]
        scores = torch.stack(out.scores, dim=1).float().log_softmax(-1)
        return tokens, scores.gather(-1, tokens[..., None])[..., 0]

    def _lengths(self, tokens: Tensor) -> list[int]:
        """Tokens of each row up to and with its first end-of-sequence token; after it there is padding only."""
        is_eos = torch.isin(tokens, torch.tensor(self.eos_ids, dtype=tokens.dtype, device=tokens.device))
        first = is_eos.to(torch.uint8).argmax(1) + 1
        return torch.where(is_eos.any(1), first, tokens.shape[1]).tolist()


@contextmanager
def own_generation_config_aside(lm: nn.Module) -> Iterator[None]:
    """``generate`` fills options that are unset from ``lm.generation_config``: leave it nothing to fill in."""
    from transformers import GenerationConfig

    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
