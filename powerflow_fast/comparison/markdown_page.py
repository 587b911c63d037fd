"""A comparison as Markdown, with its pictures as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ..tools.tables import escaped
from .content import Cell, MeasureRow, Page, interval, number, settings_table, visible
from .figures import Picture
from .html_page import about, facts

_FOLD = 700  # characters of a completion above which it is folded


def render_markdown(page: Page, pictures: Sequence[Picture], files: Sequence[Path]) -> str:
    """The page for GitHub and its like; ``files`` are the pictures, relative to where the text is saved."""
    names = [run.label for run in page.runs]
    lines = [f"# {escaped(page.title)}", "", f"**{escaped(page.headline)}**", ""]
    lines += [page.text.strip(), ""] if page.text.strip() else []
    lines += [escaped(facts(page)), ""]
    if page.rows:
        lines += ["## Measures", "", *_table(["measure (n)", *names], map(_measure, page.rows)), ""]
        lines += [escaped(page.reading), ""]
    for picture, file in zip(pictures, files, strict=True):
        lines += [f"## {escaped(picture.title)}", "", f"![{escaped(picture.title)}]({file.as_posix()})", ""]
        lines += [escaped(picture.caption), ""]
    lines += ["## Cost", ""]
    heads = ["evaluation", "tokens generated", "per completion", "times the reference", "seconds"]
    rows = [
        [cost.label, *map(_optional, (cost.tokens, cost.per_completion, cost.relative, cost.seconds), (0, 1, 2, 1))]
        for cost in page.costs
    ]
    lines += [*_table(heads, ([escaped(cell) for cell in row] for row in rows)), ""]
    lines += ["Tokens that the model had to make, those of rejected proposals too.", ""]
    if page.shown:
        lines += ["## Samples", "", escaped(page.choice), ""]
        for shown in page.shown:
            lines += [f"### Problem {shown.problem + 1} ({escaped(shown.reason)})", "", *_block(shown.prompt), ""]
            for run in page.runs:
                for completion in run.completions.get(shown.problem, [])[: page.shown_samples]:
                    lines += [f"**{escaped(run.label)}**: {about(completion)}", ""]
                    lines += [*_block(visible(completion["completion"])), ""]
    lines += ["## How it was made", "", *(f"{escaped(note)}\n" for note in page.notes)]
    lines += [f"This page: `{page.command}`", ""] if page.command else []
    lines += [f"powerflow_fast {page.version}", ""]
    same, different = settings_table(page.runs)
    if different:
        table = _table(["setting", *names], ([escaped(key), *map(_setting, values)] for key, values in different))
        lines += [*table, ""]
    if same:
        table = _table(["setting", "of all"], ([escaped(key), _setting(value)] for key, value in same))
        lines += ["<details><summary>Settings that all share</summary>", "", *table, "", "</details>", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows) -> list[str]:
    lines = [[escaped(cell) for cell in head], ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _measure(row: MeasureRow) -> list[str]:
    def cell(of: Cell) -> str:
        if of.value is None:
            return "–"
        text = f"{number(of.value.value, row.decimals)} ({interval(of.value, row.decimals)})"
        if of.change is None:
            return text
        change = f"{number(of.change.change, row.decimals, sign=True)} ({interval(of.change, row.decimals)})"
        return f"{text}<br>**{change}**" if row.moved(of) else f"{text}<br>{change}"

    return [f"{escaped(row.info.label)} ({row.prompts})", *map(cell, row.cells)]


def _optional(value: float | None, decimals: int) -> str:
    return "–" if value is None else number(value, decimals)


def _setting(value: str) -> str:
    return escaped(visible(value)) if value else "–"


def _block(text: str) -> list[str]:
    """``text`` as it is in a fence longer than any in it, folded where it is long."""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    block = [f"{fence}text", text or "(empty)", fence]
    if len(text) <= _FOLD:
        return block
    return [f"<details><summary>{len(text):,} characters</summary>", "", *block, "", "</details>"]
