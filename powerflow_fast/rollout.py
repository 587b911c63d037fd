"""Sampling completions from the policy: the engine interface, and the engine that runs Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .models.adapters import unwrap_peft
from .models.loading import pad_token_id
from .models.modes import evaluating
from .tools.random_state import seeded


@dataclass
class Rollout:
    """One completion per prompt, in the order of the prompts; without padding."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    """Tokens up to and with the first end-of-sequence token."""
    finished: list[bool]
    """An end-of-sequence token came before the length limit."""
    logps: list[list[float]] | None = None
    """Log-prob in nats of each token under the distribution that the engine drew it from, where asked for."""
    weight_version: int | None = None
    """The version that the engine was last given with ``sync``: of the weights these were drawn from."""

    def __len__(self) -> int:
        return len(self.completion_ids)


class RolloutEngine(Protocol):
    """Draws completions from softmax(logits / temperature) over the whole vocabulary, and from nothing else."""

    name: str
    logps_are_free: bool
    """Log-probs come with the tokens anyway; else they cost memory or time, and are asked for only where needed."""

    def sync(self, version: int) -> None:
        """Sample from the policy's present weights from now on.

        ``version`` is the number of optimiser steps that made them. To be called whenever weights may have changed;
        a version that the engine already has costs nothing.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        max_completion_length: int | None = None,
        return_logps: bool = False,
    ) -> Rollout:
        """One completion for each listed prompt (repeat a prompt to get several).

        The result depends on the weights, the arguments and ``seed`` alone. ``max_completion_length`` overrides the
        engine's own. ``return_logps`` fills ``Rollout.logps``.
        """
        ...


def eos_token_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Every id that ends a completion: of the model's generation config, its config, the tokenizer; may be empty."""
    lm = unwrap_peft(model)
    rows = lm.get_output_embeddings().weight.shape[0]
    found: set[int] = set()
    for source in (getattr(lm, "generation_config", None), lm.config, tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([] if value is None else [value] if isinstance(value, int) else value)
    return sorted(token for token in found if 0 <= token < rows)


def checked_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The prompts as lists; ValueError naming the first one without a token."""
    prompts = [list(prompt) for prompt in prompts]
    if [] in prompts:
        raise ValueError(f"generate: prompts[{prompts.index([])}] is empty; a prompt needs at least one token")
    return prompts


def places_of(prompts: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Where each distinct prompt stands in ``prompts``."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(tuple(prompt), []).append(i)
    return places


def finished_rollout(
    engine: Any, prompts: list[list[int]], completions: list[list[int]], logps: list[list[float]] | None
) -> Rollout:
    """The rollout of an engine; a completion is finished that ends with one of its end-of-sequence tokens."""
    eos = set(engine.eos_ids)
    finished = [bool(ids) and ids[-1] in eos for ids in completions]
    return Rollout(prompts, completions, finished, logps, engine.weight_version)


class ModelEngine:
    """What engines share that sample the trained model itself; the arguments are `HFGenerateEngine`'s."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        temperature: float,
        max_completion_length: int,
        batch_size: int,
        eos_ids: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.model = model
        self.temperature = temperature
        self.max_completion_length = max_completion_length
        self.batch_size = batch_size
        self.eos_ids = eos_token_ids(model, tokenizer) if eos_ids is None else list(eos_ids)
        self.pad_id = pad_token_id(tokenizer, model)
        self.autocast = autocast
        self.weight_version: int | None = None

    def sync(self, version: int) -> None:
        """See :meth:`RolloutEngine.sync`; the model itself is sampled, so there is nothing to send."""
        self.weight_version = version


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


@contextmanager
def cast_once(lm: nn.Module) -> Iterator[None]:
    """Autocast keeps its copies of weights that require gradients alone, and casts the others, those below a LoRA
    adapter, anew for every token. Here it keeps them all: the rollout then takes the memory of one without LoRA. To be
    used without grad."""
    frozen = [p for p in lm.parameters() if p.dtype == torch.float32 and not p.requires_grad]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
