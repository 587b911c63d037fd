"""The result of an evaluation, in memory and in its folder."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from ..tools.json_lines import read_history
from ..tools.tables import format_table
from .measures import MEASURES
from .statistics import Measure
from .store import COMPLETIONS, CompletionStore, read_result, write_result

# Counts of samplers that are a share of another one.
_SHARES = {
    "accepted": "moves",
    "unreadable_replies": "replies",
    "uniform_draws": "replies",
    "direct_answers": "completions",
}


@dataclass
class Evaluation:
    """The result of :func:`evaluate`."""

    name: str
    problems: str
    """Name of the problem set."""
    settings: dict[str, Any]
    """All that the result depends on."""
    measures: dict[str, Measure]
    """Means over prompts, in the order and with the units of ``evaluation_measures.MEASURES``."""
    per_prompt: dict[str, list[float]]
    """The values that the means are of, one per prompt; NaN where a prompt has none."""
    pass_at_k: dict[int, Measure]
    """The chance that one of k completions is right; empty without a scorer."""
    completions: list[dict[str, Any]] = field(repr=False)
    """The lines of ``completions.jsonl``."""
    tokens_generated: int
    """Tokens that the model made, those that a sampler rejected included."""
    seconds: float
    """Time that sampling took."""
    statistics: dict[str, float] = field(default_factory=dict)
    """What the sampler counted over all completions, such as ``moves`` and ``accepted``; empty where it does not."""

    def table(self) -> str:
        """A text table: measure, mean, interval, prompts, and what it is."""
        what = "chance that one of k completions is right"
        curve = [(f"pass@{k}", m, what) for k, m in self.pass_at_k.items()]
        rows = []
        for name, m in self.measures.items():
            rows += [(name, m, MEASURES.get(name, "")), *(curve if name == "accuracy" else [])]
        level = f"{self.settings.get('confidence', 0.95):.0%} interval"
        cells = [
            (name, f"{m.value:.3f}", "" if math.isnan(m.low) else f"{m.low:.3f} to {m.high:.3f}", m.prompts, what)
            for name, m, what in rows
        ]
        return format_table(cells, ("measure", "mean", level, "prompts", "of"))

    def save(self, folder: str | Path) -> Path:
        """Write ``evaluation.json`` and ``completions.jsonl`` into ``folder``, which is made; returns it."""
        folder = Path(folder)
        store = CompletionStore(folder)
        store.records = list(self.completions)
        store.save()
        write_result(folder, self.to_dict())
        return folder

    def to_dict(self) -> dict[str, Any]:
        """What ``evaluation.json`` holds: everything but the completions."""
        return {
            "complete": True,
            "name": self.name,
            "problems": self.problems,
            "measures": {name: m.to_dict() for name, m in self.measures.items()},
            "pass_at_k": {k: m.to_dict() for k, m in self.pass_at_k.items()},
            "tokens_generated": self.tokens_generated,
            "seconds": self.seconds,
            "statistics": self.statistics,
            "settings": self.settings,
            "per_prompt": self.per_prompt,
        }

    @classmethod
    def load(cls, folder: str | Path) -> Evaluation:
        """What :meth:`save` or :func:`evaluate` wrote; DataError where it is missing, unfinished or damaged."""
        folder = Path(folder)
        result = read_result(folder)
        try:
            return cls(
                name=result["name"],
                problems=result["problems"],
                settings=dict(result["settings"]),
                measures={name: Measure.from_dict(m) for name, m in result["measures"].items()},
                per_prompt={
                    name: [math.nan if v is None else float(v) for v in values]
                    for name, values in result["per_prompt"].items()
                },
                pass_at_k={int(k): Measure.from_dict(m) for k, m in result["pass_at_k"].items()},
                completions=read_history(folder / COMPLETIONS),
                tokens_generated=result["tokens_generated"],
                seconds=result["seconds"],
                statistics=dict(result.get("statistics", {})),
            )
        except (KeyError, TypeError, ValueError, OSError, AttributeError) as error:
            raise DataError(f"{folder}: damaged evaluation ({type(error).__name__}: {error})") from error


def summed_statistics(completions: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The sums of what the sampler counted, which the first completion of each chunk holds as "statistics"."""
    total: dict[str, float] = {}
    for completion in completions:
        for key, value in (completion.get("statistics") or {}).items():
            total[key] = total.get(key, 0) + value
    return total


def describe_statistics(statistics: Mapping[str, float], completions: int) -> str:
    """A sampler's counts in a line: ``moves 160, accepted 40 (25 % of moves)``; "" without any."""
    known = {**statistics, "completions": completions}
    parts = []
    for name, value in statistics.items():
        whole = _SHARES.get(name)
        share = f" ({value / known[whole]:.0%} of {whole})".replace("%", " %") if known.get(whole) else ""
        parts.append(f"{name.replace('_', ' ')} {value:,}{share}")
    return ", ".join(parts)
