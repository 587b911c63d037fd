"""Sampling at a temperature, and greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from ..data import PromptRow
from ..errors import ConfigError
from ..rollout.engine import RolloutEngine
from ..tools.random_state import random_stream, stream_seed
from .base import Completion, ModelSampler, check_number


class TemperatureSampler(ModelSampler):
    """Draws each token from softmax(logits / temperature) over the whole vocabulary.

    Below 1 this is not p^(1/temperature) of whole completions: every token is sharpened by itself, whatever it leads
    to. ``temperature=0`` takes the most likely token each time, so that all completions of a row are equal.

    Without an engine, a completion depends on its own random numbers, and on the others of its batch by the rounding of
    the logits alone (:class:`~powerflow_fast.rollout.seeded.SeededDecoder`); sample j of a row is the same whatever
    ``num_samples`` is. An engine is called once for each row, with a seed made of ``seed`` and the row's prompt: to the
    bit, if it keeps the promise of :class:`RolloutEngine`, with batches no larger than ``num_samples``.

    Args:
        temperature: >= 0.
        engine: draws in the place of the model, from the weights that its last ``sync`` gave it. Its ``temperature``,
            where it tells one, must be ``temperature``.
        common: ``max_completion_length``, ``batch_size``, ``use_chat_template``, ``system_prompt``, ``eos_ids`` and
            ``autocast``, see :class:`~powerflow_fast.sampling.base.ModelSampler`.

    Raises:
        ConfigError: an argument out of range, or one that the engine contradicts.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        engine: RolloutEngine | None = None,
        **common: Any,
    ):
        super().__init__(model, tokenizer, temperature=temperature, **common)
        if engine is not None:
            own = getattr(engine, "temperature", temperature)
            if temperature == 0:
                raise ConfigError("TemperatureSampler: temperature=0 needs engine=None; an engine draws at random")
            if own != temperature:
                raise ConfigError(f"TemperatureSampler: temperature is {temperature:g}, but the engine's is {own:g}")
        self.engine = engine
        self.name = f"temperature {temperature:g}" if temperature else "greedy"
        self.settings |= {"sampler": "temperature", "engine": "seeded" if engine is None else engine.name}
        if engine is not None:
            self.settings["eos_ids"] = list(getattr(engine, "eos_ids", []))

    def sample(self, rows: Sequence[PromptRow], *, num_samples: int, seed: int) -> list[list[Completion]]:
        """See :meth:`Sampler.sample`. The cost of a completion is its own tokens; of greedy ones the first bears it."""
        check_number("sample", "num_samples", num_samples, least=1, whole=True)
        prompts = self.encode(rows)
        if self.engine is not None:
            return [self._by_engine(self.engine, prompt, num_samples, seed) for prompt in prompts]
        copies = num_samples if self.settings["temperature"] else 1
        limit = self.decoder.max_completion_length
        draws = self.decoder.draw(
            [prompt for prompt in prompts for _ in range(copies)],
            [random_stream(seed, prompt, j).random(limit) for prompt in prompts for j in range(copies)],
        )
        completions = [self.completion(d.ids, d.finished, len(d.ids)) for d in draws]
        groups = [completions[i * copies : (i + 1) * copies] for i in range(len(rows))]
        if copies == num_samples:
            return groups
        return [[one] + [replace(one, generated_tokens=0)] * (num_samples - 1) for [one] in groups]

    def _by_engine(self, engine: RolloutEngine, prompt: list[int], num_samples: int, seed: int) -> list[Completion]:
        rollout = engine.generate(
            [prompt] * num_samples,
            seed=stream_seed(seed, prompt) % 2**31,  # engines hand it to libraries that take no more
            max_completion_length=self.settings["max_completion_length"],
        )
        pairs = zip(rollout.completion_ids, rollout.finished, strict=True)
        return [self.completion(ids, finished, len(ids)) for ids, finished in pairs]
