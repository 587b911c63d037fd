"""What an evaluation draws completions with: one interface over temperature, power and verbalized sampling."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import ConfigError, suggest
from .base import Sampler
from .power import PowerSampler
from .temperature import TemperatureSampler
from .verbalized import VerbalizedSampler

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
