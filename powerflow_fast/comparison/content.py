"""What a comparison of evaluations says: measures with paired changes, a headline, costs, the prompts to show."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.measures import MEASURES, correct_counts
from ..evaluation.result import describe_statistics
from ..evaluation.statistics import Change, Measure, paired_change, pass_at_k


@dataclass(frozen=True)
class MeasureInfo:
    """How a measure is named and read: ``better`` is 1 where more of it is better, -1 where less is, else 0."""

    label: str
    meaning: str
    better: int = 0


# Names on the page, and which way is better; what each measure is stands in evaluation_measures.MEASURES.
_LABELS = {
    "accuracy": ("accuracy", 1),
    "majority": ("majority vote", 1),
    "quality": ("quality", 1),
    "strategies": ("strategies", 0),
    "semantic_diversity": ("semantic diversity", 0),
    "distinct_answers": ("distinct answers", 0),
    "distinct_1": ("distinct-1", 0),
    "distinct_2": ("distinct-2", 0),
    "self_bleu": ("self-BLEU", 0),
    "entropy": ("token entropy, nats", 0),
    "length": ("length, tokens", 0),
    "finished": ("finished", 1),
    "repetition": ("repetition", -1),
    "logp": ("log-prob, nats/token", 0),
    "base_logp": ("base log-prob, nats/token", 0),
    "inversion_rate": ("inversion rate", -1),
    "alpha": ("fitted α", 0),
    "tilt": ("length tilt λ, nats/token", 0),
}

# Axes of the plane and the measure of the headline: the first that the evaluations have.
QUALITY = ("accuracy", "quality")
DIVERSITY = ("semantic_diversity", "strategies", "distinct_answers", "distinct_2", "self_bleu", "distinct_1", "entropy")

AT_RANDOM = "drawn at random"


@dataclass(frozen=True)
class Run:
    """An evaluation as the comparison reads it; ``label`` is its name, made unique."""

    label: str
    problems: str
    settings: Mapping[str, Any]
    measures: Mapping[str, Measure]
    per_prompt: Mapping[str, Sequence[float]]
    pass_at_k: Mapping[int, Measure]
    completions: Mapping[int, Sequence[Mapping[str, Any]]]
    """By problem, in the order of the samples; empty where the file of completions is missing."""
    tokens_generated: int | None
    seconds: float | None
    statistics: Mapping[str, float] = field(default_factory=dict)
    """What the sampler counted."""
    missing: tuple[str, ...] = ()
    """Files that were not there."""

    @property
    def num_samples(self) -> int | None:
        return self.settings.get("num_samples")

    @property
    def confidence(self) -> float:
        return float(self.settings.get("confidence", 0.95))

    @property
    def prompts(self) -> int:
        """Problems that were sampled: values per measure, else problems with completions."""
        return max((len(values) for values in self.per_prompt.values()), default=len(self.completions))


@dataclass(frozen=True)
class Cell:
    """One evaluation's value of a measure, and its change against the reference where both have it by prompt."""

    value: Measure | None
    change: Change | None = None


@dataclass(frozen=True)
class MeasureRow:
    key: str
    info: MeasureInfo
    cells: list[Cell]
    decimals: int

    @property
    def prompts(self) -> str:
        """n: prompts with a value, as a range where the evaluations differ."""
        counts = {cell.value.prompts for cell in self.cells if cell.value is not None}
        return str(min(counts)) if len(counts) == 1 else f"{min(counts)}–{max(counts)}"

    def moved(self, cell: Cell) -> str:
        """ "better", "worse", "moved" (neither is), or "" where the interval includes no change."""
        if cell.change is None or not cell.change.moved:
            return ""
        sign = self.info.better * math.copysign(1, cell.change.change)
        return {1: "better", -1: "worse"}.get(int(sign), "moved")


def measure_rows(runs: Sequence[Run]) -> list[MeasureRow]:
    """A row for each measure that any of ``runs`` has, in a fixed order, pass@k after the accuracy.

    Of pass@k there are the largest k that all have and, where one has more, its own largest; its change needs the
    scores of the completions.
    """
    keys = dict.fromkeys([*_LABELS, *(key for run in runs for key in run.measures)])
    rows = []
    for key in keys:
        if any(key in run.measures for run in runs):
            values = [run.measures.get(key) for run in runs]
            columns = [run.per_prompt.get(key) for run in runs]
            rows.append(_row(key, _info(key, runs), values, columns, runs))
        if key == "accuracy":
            rows += _pass_at_k_rows(runs)
    return rows


def _info(key: str, runs: Sequence[Run]) -> MeasureInfo:
    label, better = _LABELS.get(key, (key.replace("_", " "), 0))
    short, samples = {"accuracy": "avg", "majority": "maj"}.get(key), runs[0].num_samples
    if short is not None and samples is not None:
        label += f", {short}@{samples}"
    return MeasureInfo(label, MEASURES.get(key, "measure of the user's"), better)


def _pass_at_k_rows(runs: Sequence[Run]) -> list[MeasureRow]:
    curves = [set(run.pass_at_k) for run in runs if run.pass_at_k]
    if not curves:
        return []
    shared = set.intersection(*curves)
    largest = {max(ks) for ks in (shared, set.union(*curves)) if ks} - {1}
    rows = []
    for k in sorted(largest):
        info = MeasureInfo(f"pass@{k}", f"chance that at least one of {k} completions is right, unbiased", 1)
        rows.append(
            _row(f"pass@{k}", info, [run.pass_at_k.get(k) for run in runs], [_solved(run, k) for run in runs], runs)
        )
    return rows


def _solved(run: Run, k: int) -> list[float] | None:
    """pass@k of each problem: a score of 1 or more is right. None where a problem has too few scores."""
    if k not in run.pass_at_k or len(run.completions) != run.prompts:
        return None
    groups = [run.completions.get(i, ()) for i in range(run.prompts)]
    if any(len(records) < k or any(r.get("score") is None for r in records) for records in groups):
        return None
    return pass_at_k(correct_counts(groups), [len(records) for records in groups], k)


def _row(
    key: str,
    info: MeasureInfo,
    values: Sequence[Measure | None],
    columns: Sequence[Sequence[float] | None],
    runs: Sequence[Run],
) -> MeasureRow:
    cells = []
    for value, column in zip(values, columns, strict=True):
        pair = columns[0] is not None and column is not None and column is not columns[0]
        change = paired_change(columns[0], column, confidence=runs[0].confidence) if pair else None
        cells.append(Cell(value, change if change is not None and change.prompts else None))
    sizes = [abs(v) for m in values if m is not None for v in (m.value, m.low, m.high) if not math.isnan(v)]
    largest = max(sizes, default=0)
    return MeasureRow(
        key, info, cells, decimals=3 if largest < 2 else 2 if largest < 20 else 1 if largest < 2000 else 0
    )


def number(value: float, decimals: int, *, sign: bool = False) -> str:
    """``value`` with a true minus sign; a dash for NaN."""
    if math.isnan(value):
        return "–"
    text = f"{value:+,.{decimals}f}" if sign else f"{value:,.{decimals}f}"
    return text.replace("-", "−")


def interval(of: Measure | Change, decimals: int) -> str:
    """``low to high``, signed for a change; "no interval" where there are too few prompts for one."""
    if math.isnan(of.low) or math.isnan(of.high):
        return "no interval"
    sign = isinstance(of, Change)
    return f"{number(of.low, decimals, sign=sign)} to {number(of.high, decimals, sign=sign)}"


def first_measured(rows: Sequence[MeasureRow], keys: Sequence[str]) -> MeasureRow | None:
    """The first of ``keys`` with a value for two evaluations or more."""
    by_key = {row.key: row for row in rows}
    return next((by_key[k] for k in keys if k in by_key and sum(map(_has_value, by_key[k].cells)) > 1), None)


def _has_value(cell: Cell) -> bool:
    return cell.value is not None and not math.isnan(cell.value.value)


def headline(runs: Sequence[Run], rows: Sequence[MeasureRow]) -> str:
    """A sentence or two with numbers: the first measure of quality, and for two evaluations diversity and cost."""
    reference = runs[0].label
    row = _changed(rows, QUALITY) or _changed(rows, [r.key for r in rows])
    if row is None:
        return f"No measure can be compared by prompt with {reference}."
    name, percent = _plain(row), f"{100 * runs[0].confidence:g} %"
    before = number(next(c.change for c in row.cells if c.change).before, row.decimals)
    changed = [(run, cell.change) for run, cell in zip(runs, row.cells, strict=True) if cell.change]
    if len(runs) == 2:
        (run, change), (_, cell) = changed[0], row.cells
        verdict = "" if cell.change.moved else " This is within the uncertainty."
        if math.isnan(change.low):
            verdict = " One prompt cannot say how certain this is."
        text = f"{run.label}: {name} {number(change.after, row.decimals)} against {before} for {reference}: "
        text += f"{_change_text(change, row.decimals, percent)}.{verdict}"
        return " ".join([text, *_other_sentences(runs, rows, row)])
    raised = sorted((p for p in changed if p[1].moved and p[1].change > 0), key=lambda p: -p[1].change)
    lowered = sorted((p for p in changed if p[1].moved and p[1].change < 0), key=lambda p: p[1].change)
    parts = []
    for verb, moved in (("higher", raised), ("lower", lowered)):
        if moved:
            run, change = moved[0]
            most = "" if len(moved) == 1 else "most "
            text = f"{number(change.after, row.decimals)}, {_change_text(change, row.decimals, percent)}"
            parts.append(f"{verb} for {len(moved)} of {len(changed)}, {most}for {run.label} ({text})")
    same = [run.label for run, change in changed if not change.moved]
    if same:
        parts.append(f"within its uncertainty for {', '.join(same)}")
    return f"Against {reference} ({name} {before}), {name} is {'; '.join(parts)}."


def _changed(rows: Sequence[MeasureRow], keys: Sequence[str]) -> MeasureRow | None:
    by_key = {row.key: row for row in rows}
    return next((by_key[k] for k in keys if k in by_key and any(c.change for c in by_key[k].cells)), None)


def _plain(row: MeasureRow) -> str:
    """A measure's name inside a sentence, without its unit."""
    return row.info.label.split(",")[0]


def _change_text(change: Change, decimals: int, percent: str) -> str:
    count = f"{change.prompts} prompt{'s' if change.prompts != 1 else ''}"
    between = interval(change, decimals)
    between = between if between == "no interval" else f"{percent} interval {between}"
    return f"{number(change.change, decimals, sign=True)} ({between}, {count})"


def _other_sentences(runs: Sequence[Run], rows: Sequence[MeasureRow], lead: MeasureRow) -> list[str]:
    texts = []
    diversity = _changed([row for row in rows if row is not lead], DIVERSITY)
    if diversity is not None:
        change = diversity.cells[1].change
        verb = (
            "did not move by more than its uncertainty" if not change.moved else "rose" if change.change > 0 else "fell"
        )
        numbers = f"{number(change.before, diversity.decimals)} to {number(change.after, diversity.decimals)}"
        text = f"Its {_plain(diversity)} {verb}: {numbers}"
        percent = f"{100 * runs[0].confidence:g} %"
        texts.append(f"{text}, {_change_text(change, diversity.decimals, percent)}.")
    cost = costs(runs)[1]
    if cost.relative is not None:
        times = f"{cost.relative:.3g}"
        texts.append("It generated as many tokens." if times == "1" else f"It generated {times} times the tokens.")
    return texts


@dataclass(frozen=True)
class Cost:
    label: str
    tokens: int | None
    per_completion: float | None
    relative: float | None
    """Tokens over the reference's."""
    seconds: float | None


def costs(runs: Sequence[Run]) -> list[Cost]:
    """Tokens that each evaluation made, those of rejected proposals too."""
    first = runs[0].tokens_generated
    rows = []
    for run in runs:
        tokens, count = run.tokens_generated, sum(map(len, run.completions.values()))
        per_completion = tokens / count if tokens is not None and count else None
        relative = tokens / first if tokens is not None and first else None
        rows.append(Cost(run.label, tokens, per_completion, relative, run.seconds))
    return rows


@dataclass(frozen=True)
class Shown:
    """A problem whose completions are shown, and why."""

    problem: int
    reason: str
    prompt: str


def sampler_notes(runs: Sequence[Run]) -> list[str]:
    """What the samplers counted, for those that count: how often a chain moved, how often a reply could not be read."""
    return [
        f"Sampler of {run.label}: {describe_statistics(run.statistics, (run.num_samples or 0) * run.prompts)}."
        for run in runs
        if run.statistics
    ]


def choose_prompts(runs: Sequence[Run], rows: Sequence[MeasureRow], *, count: int, seed: int) -> list[Shown]:
    """Half of ``count`` by the largest change of the headline's measure against the reference, the rest by ``seed``."""
    available = [i for i in range(max(r.prompts for r in runs)) if any(i in run.completions for run in runs)]
    row = _changed(rows, QUALITY) or _changed(rows, [r.key for r in rows])
    columns = [] if row is None else [run.per_prompt.get(row.key) for run in runs]
    chosen: list[Shown] = []
    if columns and columns[0] is not None:
        others = [(run, column) for run, column in zip(runs[1:], columns[1:], strict=True) if column is not None]
        changes = {i: [(column[i] - columns[0][i], run) for run, column in others] for i in available}
        largest = {
            i: max((c for c in found if not math.isnan(c[0])), key=lambda c: abs(c[0]), default=(0.0, None))
            for i, found in changes.items()
        }
        order = sorted((i for i in available if largest[i][0]), key=lambda i: (-abs(largest[i][0]), i))
        for i in order[: (count + 1) // 2]:
            change, run = largest[i]
            text = f"{_plain(row)} {number(change, row.decimals, sign=True)} for {run.label}"
            chosen.append(Shown(i, text, _prompt(runs, i)))
    taken = {shown.problem for shown in chosen}
    rest = [i for i in available if i not in taken]
    for i in sorted(random.Random(seed).sample(rest, min(count - len(chosen), len(rest)))):
        chosen.append(Shown(i, AT_RANDOM, _prompt(runs, i)))
    return chosen


def _prompt(runs: Sequence[Run], i: int) -> str:
    return visible(next(run.completions[i][0]["prompt"] for run in runs if i in run.completions))


def settings_table(runs: Sequence[Run]) -> tuple[list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Settings that all evaluations share, and those that differ; nested ones with dots, an absent one is empty."""
    flat = [dict(_flatten(run.settings)) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    columns = {key: [settings.get(key, "") for settings in flat] for key in keys}
    same = [(key, values[0]) for key, values in columns.items() if len(set(values)) == 1]
    return same, [(key, values) for key, values in columns.items() if len(set(values)) > 1]


def visible(value: str | Sequence[Mapping[str, Any]]) -> str:
    """Text, or the messages of a chat, with control characters as escapes."""
    if not isinstance(value, str):
        value = "\n\n".join(f"{message.get('role', '')}: {message.get('content', '')}" for message in value)
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in value.replace("\r\n", "\n"))


@dataclass(frozen=True)
class Page:
    """Everything that is on the page, before it becomes HTML or Markdown."""

    title: str
    headline: str
    text: str
    runs: list[Run]
    rows: list[MeasureRow]
    notes: list[str]
    """What is missing, and why."""
    costs: list[Cost]
    shown: list[Shown]
    shown_samples: int
    """Completions shown of each problem and evaluation, the first ones."""
    seed: int
    command: str | None
    version: str

    @property
    def percent(self) -> str:
        return f"{100 * self.runs[0].confidence:g} %"

    @property
    def reading(self) -> str:
        """How to read the table."""
        return (
            f"In each cell: the mean over prompts with its {self.percent} interval, below it the change against "
            f"{self.runs[0].label}, paired by prompt, bold where its interval excludes zero. Whole prompts are "
            "resampled; n counts those with a value. Intervals are not corrected for the number of comparisons."
        )

    @property
    def choice(self) -> str:
        """How the shown problems were chosen."""
        largest = sum(shown.reason != AT_RANDOM for shown in self.shown)
        parts = [f"{largest} with the largest change"] if largest else []
        if len(self.shown) > largest:
            parts.append(f"{len(self.shown) - largest} drawn at random (seed {self.seed})")
        return f"Problems: {' and '.join(parts)}. Of each the first {self.shown_samples} completions, not the best."


def _flatten(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            pairs += _flatten(item, f"{prefix}{key}.")
        else:
            text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False, default=str)
            pairs.append((f"{prefix}{key}", text))
    return pairs
