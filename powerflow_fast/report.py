"""What a run shows and leaves behind as text: progress line, history, samples, tables, model card."""

from __future__ import annotations

import json
import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tools.tables import _cell, escaped
from .version import __version__

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
