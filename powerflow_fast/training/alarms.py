"""Alarms for the ways in which a run goes wrong while its loss looks fine: collapse, repetition, stale samples."""

from __future__ import annotations

import logging
from typing import Any

from ..config.options import PowerFlowConfig

logger = logging.getLogger(__name__)

# Recorded steps that the first mean length is taken over, and that every alarm looks back on: single steps are noisy.
_WINDOW = 5

_ADVICE = {
    "length_collapse": "an exponent above 1 shortens completions somewhat; for a collapse look at samples, lower "
    "learning_rate, or give a format_fn that short answers fail",
    "repetition": "look at completions (log_completions=true); lower learning_rate, or bring alpha nearer to 1",
    "clip_fraction": "samples are too stale for the importance ratio: lower learning_rate, num_iterations or "
    "steps_per_generation, or set importance_level=length_normalized",
}


class Alarms:
    """Watches recorded metrics; each alarm warns once per episode and marks every row of it with ``alarm/<name>``.

    An episode lasts while the mean over the last recorded steps is beyond the threshold in ``config``.

    Args:
        warn: False on all processes but one: they watch the same numbers.
    """

    def __init__(self, config: PowerFlowConfig, *, warn: bool = True):
        self._warn = warn
        self._length_share = config.alarm_length_share
        self._most = {"repetition": config.alarm_repetition, "clip_fraction": config.alarm_clip_fraction}
        self._first_lengths: list[float] = []
        self._recent: dict[str, list[float]] = {}
        self._active: list[str] = []

    def check(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        """``{"alarm/<name>": 1.0}`` for the alarms that are on after ``step``."""
        if len(self._first_lengths) < _WINDOW:
            self._first_lengths.append(metrics["length"])
        first = sum(self._first_lengths) / len(self._first_lengths)
        means = {name: self._mean(name, metrics[name]) for name in ("length", *self._most)}
        beyond = {name: means[name] > most for name, most in self._most.items()}
        beyond["length_collapse"] = means["length"] < self._length_share * first
        what = {name: f"{name} is {means[name]:.2f}, over {most:g}" for name, most in self._most.items()}
        what["length_collapse"] = (
            f"mean length is {means['length']:.1f} tokens, under {self._length_share:g} of the first steps' {first:.1f}"
        )
        for name, on in beyond.items():
            if on and name not in self._active and self._warn:
                field = "alarm_length_share" if name == "length_collapse" else f"alarm_{name}"
                logger.warning("step %d: %s (%s): %s", step, what[name], field, _ADVICE[name])
        self._active = [name for name, on in beyond.items() if on]
        return {f"alarm/{name}": 1.0 for name in self._active}

    def _mean(self, name: str, value: float) -> float:
        recent = self._recent.setdefault(name, [])
        recent.append(value)
        del recent[:-_WINDOW]
        return sum(recent) / len(recent)

    def state_dict(self) -> dict[str, Any]:
        """JSON for a checkpoint: a resumed run goes on in the same episodes."""
        return {"first_lengths": self._first_lengths, "recent": self._recent, "active": self._active}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first_lengths, self._recent = (
            list(state["first_lengths"]),
            {k: list(v) for k, v in state["recent"].items()},
        )
        self._active = list(state["active"])
