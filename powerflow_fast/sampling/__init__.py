"""How an evaluation draws completions."""

from .base import Completion, Sampler
from .power import PowerSampler
from .registry import SAMPLERS, resolve_sampler
from .temperature import TemperatureSampler
from .verbalized import VerbalizedSampler

__all__ = [
    "SAMPLERS",
    "Completion",
    "PowerSampler",
    "Sampler",
    "TemperatureSampler",
    "VerbalizedSampler",
    "resolve_sampler",
]
