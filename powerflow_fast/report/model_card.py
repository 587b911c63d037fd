"""README.md of a trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..tools.tables import cell, escaped
from ..version import __version__
from .metrics import METRICS


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
            lines.append(f"| {escaped(METRICS.get(metric, metric))} | {cell(first)} | {cell(last)} |")
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
