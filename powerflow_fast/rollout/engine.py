"""Sampling completions from the policy: what an engine takes and gives, and what engines share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ..models.adapters import unwrap_peft
from ..models.loading import pad_token_id


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
