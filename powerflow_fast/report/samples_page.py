"""Samples before and after a run, as one page."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..tools.tables import escaped


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
