"""What an evaluation draws completions with: one interface over temperature, power and verbalized sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

from torch import nn

from .data import PromptRow
from .errors import ConfigError, suggest
from .power_sampling import PowerSampler
from .rollout.engine import RolloutEngine
from .sampler_base import Completion, ModelSampler, check_number
from .tools.random_state import random_stream, stream_seed
from .verbalized import VerbalizedSampler

__all__ = ["Completion", "Sampler", "TemperatureSampler", "resolve_sampler"]


@runtime_checkable
class Sampler(Protocol):
    """Draws completions of prompts.

    What is drawn for a row depends on the seed, the row's prompt, the weights and ``settings``, and not on which other
    rows are in the call. Rows with the same prompt get the same completions.
    """

    name: str
    """As tables show it: ``temperature 1``, ``power sampling α=4``."""
    settings: dict[str, Any]
    """All that the draws depend on beside weights, prompts and seed; JSON-able."""

    def sample(self, rows: Sequence[PromptRow], *, num_samples: int, seed: int) -> list[list[Completion]]:
        """``num_samples`` completions of each row."""
        ...


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
            ``autocast``, see :class:`~powerflow_fast.sampler_base.ModelSampler`.

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


# The words that a sampler's text may begin with, and the type of each option that may follow.
SAMPLERS: dict[str, tuple[type, dict[str, type]]] = {
    "temperature": (TemperatureSampler, {"temperature": float}),
    "power": (PowerSampler, {"alpha": float, "blocks": int, "steps": int, "proposal_temperature": float}),
    "verbalized": (VerbalizedSampler, {"answers": int, "temperature": float, "reply_length": int}),
}


def resolve_sampler(sampler: str | Sampler, model: nn.Module, tokenizer: Any, **common: Any) -> Sampler:
    """The sampler that a text names, or ``sampler`` itself where it already is one.

    ``"temperature=0.5"``, ``"temperature"`` (1), ``"temperature=0"`` or ``"greedy"``;
    ``"power:alpha=4,blocks=16,steps=10"``, ``"verbalized:answers=5"``: a name, and options of its class where they
    shall differ from the defaults. ``common`` are arguments of every sampler, such as ``max_completion_length`` and
    ``batch_size``, and ``engine``, with which only temperature sampling works.

    Raises:
        ConfigError: what is unknown or unreadable, with the nearest that is known.
    """
    if not isinstance(sampler, str):
        if not isinstance(sampler, Sampler):
            raise ConfigError(
                f"sampler must be a text such as 'temperature=1', or have name, settings and sample(), got {sampler!r}"
            )
        return sampler
    text = "temperature=0" if sampler.strip() == "greedy" else sampler.strip()
    if text.startswith("temperature="):
        text = f"temperature:{text}"
    word, _, rest = text.partition(":")
    if word == "greedy":
        raise ConfigError(f"sampler {sampler!r}: greedy has no options, it is 'temperature=0'")
    if word not in SAMPLERS:
        word = word.partition("=")[0]
        names = (*SAMPLERS, "greedy")
        raise ConfigError(f"sampler {sampler!r}: unknown name {word!r}, known are {list(names)}{suggest(word, names)}")
    kind, known = SAMPLERS[word]
    options: dict[str, Any] = {}
    for part in filter(None, (p.strip() for p in rest.split(","))):
        name, equals, value = (p.strip() for p in part.partition("="))
        if name not in known:
            raise ConfigError(
                f"sampler {sampler!r}: unknown option {name!r}, {word} has {list(known)}{suggest(name, known)}"
            )
        if not equals or name in options:
            raise ConfigError(f"sampler {sampler!r}: option {name!r} must be given once, as {name}=value")
        try:
            options[name] = known[name](value)
        except ValueError:
            what = "an integer" if known[name] is int else "a number"
            raise ConfigError(f"sampler {sampler!r}: {name} must be {what}, got {value!r}") from None
    if kind is not TemperatureSampler and common.pop("engine", None) is not None:
        raise ConfigError(f"sampler {sampler!r}: decodes the model itself and works without an engine; leave it out")
    return kind(model, tokenizer, **options, **common)
