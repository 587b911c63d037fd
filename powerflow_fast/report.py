"""What a run shows and leaves behind as text: progress line, history, samples, tables, model card."""

from __future__ import annotations

import html
import json
import math
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from .version import __version__

__all__ = [
    "METRICS",
    "HistoryWriter",
    "ProgressLine",
    "Sample",
    "escaped",
    "format_samples",
    "format_table",
    "read_history",
    "write_model_card",
    "write_samples",
]

# Columns of history.jsonl with their meaning and unit: those that the progress line and the plots read, and the gap.
METRICS = {
    "step": "optimizer steps made",
    "loss": "the objective; la_tb: mean w * delta^2 over the step's sequences, (nats/token)^2",
    "alpha": "exponent that this step trained to, where alpha='auto:...' looks for it",
    "policy_alpha": "exponent that the policy has come to: slope of log pi(y|q) / |y| over log p_base(y|q) / |y|",
    "delta_abs": "mean |delta|, nats/token",
    "policy_logp": "mean over sequences of log pi(y|q) / |y|, nats/token",
    "base_logp": "mean over sequences of log p_base(y|q) / |y|, nats/token",
    "log_z": "mean log-partition: log Z' in nats/token, or log Z in nats where the objective is of whole sequences",
    "entropy": "mean entropy of the policy's next-token distribution, nats",
    "length": "mean completion length, tokens",
    "rollout_logp_gap_mean": "mean |log-prob by the sampling engine - by our scorer| per token, nats",
    "rollout_logp_gap_max": "largest |log-prob by the sampling engine - by our scorer| of a token, nats",
    "tokens_per_second": "prompt and completion tokens trained on per second of the whole run, over all devices",
    "share/rollout": "share of the time that went into sampling",
    "share/score": "share of the time that went into scores under p_base and the old policy",
    "share/update": "share of the time that went into gradients and the optimizer",
    "mfu": "model FLOP of the update per second of it, over the device's dense bf16 peak",
}


@dataclass(frozen=True)
class Sample:
    """A prompt and one completion, as text."""

    prompt: str
    completion: str


class ProgressLine:
    """Progress of a run on one line of a terminal, rewritten in place; elsewhere at most one line per minute or 5 %."""

    def __init__(self, total: int, *, first: int = 0, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total, self.first = total, first
        self.live = self.stream.isatty()
        self._started = time.monotonic()
        self._printed: tuple[int, float] | None = None  # step and time of the last plain line
        self._shown = ""

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show ``metrics`` (names as in :data:`METRICS`; absent ones are left out)."""
        step, now = metrics["step"], time.monotonic()
        done, left = step - self.first, self.total - step
        eta = _duration((now - self._started) / done * left) if done > 0 else "?"
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        for name, label, spec in (
            ("loss", "loss", ".4g"),
            ("alpha", "α", ".3g"),
            ("delta_abs", "|δ|", ".3f"),
            ("log_z", "log Z", ".3f"),
            ("reward", "reward", ".3f"),
            ("length", "length", ".1f"),
            ("tokens_per_second", "tok/s", ".0f"),
            ("mfu", "MFU", ".0%"),
        ):
            if metrics.get(name) is not None:
                parts.append(f"{label} {metrics[name]:{spec}}")
        if "share/update" in metrics:
            shares = "/".join(f"{100 * metrics[f'share/{name}']:.0f}" for name in ("rollout", "score", "update"))
            parts.append(f"roll/score/upd {shares}%")
        line = " | ".join([*parts, f"ETA {eta}" if left > 0 else _duration(now - self._started)])
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._shown = line if len(line) <= width else line[: width - 3] + "..."
            self._write(f"\r\x1b[2K{self._shown}")
        elif (
            self._printed is None
            or left <= 0
            or step - self._printed[0] >= max(self.total / 20, 1)
            or now - self._printed[1] >= 60
        ):
            self._printed = (step, now)
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the live line."""
        self._write(f"\r\x1b[2K{text}\n{self._shown}" if self.live else text + "\n")

    def close(self) -> None:
        """End the live line, so that what is printed next starts on a fresh one."""
        if self._shown:
            self._write("\n")
            self._shown = ""

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace("δ", "delta").replace("α", "alpha").encode(encoding, "replace").decode(encoding)
        self.stream.write(text)
        self.stream.flush()


class HistoryWriter:
    """Appends one JSON object per step to ``history.jsonl``, on disk after every row.

    With ``resume_step`` the rows after that step are dropped first: that work was lost and is done again.
    Without it the file starts empty. NaN and infinity, which JSON has not, are written as null.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        path = Path(path)
        kept = [] if resume_step is None or not path.exists() else read_history(path)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_json_line(row) for row in kept if row["step"] <= (resume_step or 0))
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the writer's life

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_json_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a history file; a last line cut short by a kill is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for k, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if k < len(lines) - 1:
                raise
    return rows


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A text table: columns two spaces apart, numbers (to 4 digits) to the right, other cells to the left."""
    cells = [[_cell(c) for c in row] for row in rows]
    numeric = [all(isinstance(row[j], (int, float)) for row in rows) and bool(rows) for j in range(len(header))]
    widths = [max(len(row[j]) for row in [list(header), *cells]) for j in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)).rstrip()  # noqa: B905

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def format_samples(before: Sequence[Sample], after: Sequence[Sample], *, width: int | None = None) -> str:
    """Samples before and after training in two columns of a terminal ``width`` characters wide."""
    width = width or min(shutil.get_terminal_size().columns, 140)
    column = (width - 3) // 2
    blocks = []
    for old, new in _pairs(before, after):
        left, right = _wrap(old.completion, column), _wrap(new.completion, column)
        height = max(len(left), len(right))
        left += [""] * (height - len(left))
        right += [""] * (height - len(right))
        rows = [("before", "after"), ("-" * column, "-" * column), *zip(left, right, strict=True)]
        prompt = textwrap.fill(" ".join(old.prompt.split()), width, initial_indent="> ", subsequent_indent="> ")
        blocks.append("\n".join([prompt, "", *(f"{a.ljust(column)} | {b}".rstrip() for a, b in rows)]))
    return "\n\n".join(blocks)


def write_samples(path: str | Path, before: Sequence[Sample], after: Sequence[Sample]) -> None:
    """Samples before and after training side by side, as Markdown tables."""
    lines = ["# Samples before and after training", ""]
    for k, (old, new) in enumerate(_pairs(before, after), start=1):
        lines += [f"## {k}", "", f"**Prompt:** {escaped(old.prompt)}", ""]
        lines += [
            "| before | after |",
            "|---|---|",
            f"| {escaped(old.completion)} | {escaped(new.completion)} |",
            "",
        ]
    Path(path).write_text("\n".join(lines), encoding="utf-8")


def write_model_card(
    folder: str | Path,
    *,
    alpha: float,
    base_model: str,
    data_description: str,
    config: Mapping[str, Any],
    objective: str = "la_tb",
    how: tuple[str, str] | None = None,
    commit: str | None = None,
    alpha_note: str | None = None,
    metrics: Sequence[tuple[str, Any, Any]] = (),
) -> Path:
    """``README.md`` of a trained model, with the YAML header that the Hugging Face hub reads.

    ``objective`` is its name, ``how`` what it minimises and trains to, None for a function of the user's.
    ``alpha_note`` says where alpha is from. ``metrics`` has rows (name, at the first step, at the last step); names in
    :data:`METRICS` are spelt out. A ``base_model`` that is a local folder is named without its path, and ``config`` is
    shown without its paths.
    """
    from huggingface_hub import ModelCardData

    is_hub_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) and not Path(base_model).exists()
    name = base_model if is_hub_name else Path(base_model).name
    data = ModelCardData(
        base_model=base_model if is_hub_name else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["powerflow", *([objective.replace("_", "-")] if how is not None else [])],
    )
    lines = [
        f"---\n{data.to_yaml()}\n---",
        "",
        *_what_it_is(name, alpha, objective, how),
        "",
        f"- α: {alpha:g}" + (f", {alpha_note}" if alpha_note else ""),
        f"- base model: `{name}`",
        f"- prompts: {data_description}",
        f"- powerflow_fast: {__version__}" + (f", commit `{commit}`" if commit else ""),
        "",
    ]
    if metrics:
        lines += ["## First and last recorded step", "", "| | first | last |", "|---|---:|---:|"]
        for metric, first, last in metrics:
            lines.append(f"| {escaped(METRICS.get(metric, metric))} | {_cell(first)} | {_cell(last)} |")
        lines += ["", "Measured by the run itself on the completions sampled for those steps.", ""]
    shown = {k: v for k, v in config.items() if k not in ("output_dir", "resume_from_checkpoint")}
    lines += ["## Configuration", "", "```json", json.dumps(shown, indent=2), "```", ""]
    path = Path(folder) / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _what_it_is(name: str, alpha: float, objective: str, how: tuple[str, str] | None) -> list[str]:
    if objective == "la_tb":
        direction = "sharpened" if alpha > 1 else "flattened" if alpha < 1 else "unchanged"
        return [
            f"# {name}, trained towards p_base^{alpha:g}",
            "",
            f"A {direction} version of `{name}`: trained, without rewards, towards sampling completions in proportion",
            f"to p_base(y|q)^α with α = {alpha:g}, by length-aware trajectory balance (LA-TB, "
            "[arXiv 2603.18363](https://arxiv.org/abs/2603.18363)).",
        ]
    lines = [
        f"# {name}, trained with {objective}",
        "",
        f"`{name}`, trained with the objective `{objective}`, α = {alpha:g}.",
    ]
    if how is not None:
        lines += ["", f"It minimises `{how[0]}`, which trains to: `{how[1]}`."]
    return lines


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


def _json_line(row: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _pairs(before: Sequence[Sample], after: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    pairs = list(zip(before, after, strict=True))
    for old, new in pairs:
        if old.prompt != new.prompt:
            raise ValueError(
                f"samples must be of the same prompts in the same order, got {old.prompt!r}, {new.prompt!r}"
            )
    return pairs


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most ``width`` characters, line breaks kept, control characters shown as escapes."""
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text.expandtabs(4))
    return [part for line in shown.strip().split("\n") for part in (textwrap.wrap(line, width) or [""])]


def escaped(text: str) -> str:
    """``text`` shown as it is inside one table cell."""
    escaped = re.sub(r"([\\`*_#\[\]|~$])", r"\\\1", html.escape(text.strip(), quote=False))
    return re.sub(r"\r?\n", "<br>", escaped) or "(empty)"
