"""One page that compares evaluations: ``comparison.html``, which needs nothing else, and ``comparison.md``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import DataError, OutputDirError
from ..evaluation.result import Evaluation
from ..evaluation.statistics import Measure
from ..evaluation.store import COMPLETIONS, RESULT, read_result
from ..tools.json_lines import read_history
from ..version import __version__
from .content import Page, Run, choose_prompts, costs, headline, measure_rows, sampler_notes, visible
from .figures import draw_pictures
from .html_page import render_html
from .markdown_page import render_markdown


@dataclass(frozen=True)
class Comparison:
    """Where the two pages lie, and their first sentence."""

    html: Path
    markdown: Path
    headline: str


def write_comparison(
    evaluations: Sequence[Evaluation | str | Path],
    folder: str | Path,
    *,
    title: str = "Comparison",
    histories: Mapping[str, str | Path] | None = None,
    text: str = "",
    problems_shown: int = 6,
    samples_shown: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare evaluations of the same problems, the first being the reference of every change.

    Writes ``comparison.html``, ``comparison.md`` and ``figures/*.svg`` (for the latter) into ``folder``. Changes are
    :func:`estimates.paired_change` over prompts, at the confidence of the evaluations.

    Args:
        evaluations: two or more, as returned by :func:`evaluate` or as folders that it wrote.
        folder: is made where it does not exist; files of an earlier comparison are replaced.
        histories: ``history.jsonl`` of training runs by name; one with an evaluation's name gets its colour.
        text: shown below the headline; Markdown in the one page, plain paragraphs in the other.
        problems_shown: whose completions are shown: half by the largest change, half at random by ``seed``.
        samples_shown: completions of each of them and each evaluation; by default 2, of more than four evaluations 1.

    Raises:
        ValueError: fewer than two evaluations.
        TypeError: one that is neither.
        DataError: evaluations of different problems, numbers of samples or confidence (both are named), a folder
            without ``evaluation.json``, an unreadable file. A missing ``completions.jsonl`` is noted on the page.
        OutputDirError: ``folder`` cannot be written.
    """
    if isinstance(evaluations, (str, Path)) or len(evaluations) < 2:
        raise ValueError(f"write_comparison: evaluations must be a list of two or more, got {evaluations!r}")
    if samples_shown is None:
        samples_shown = 2 if len(evaluations) <= 4 else 1
    for name, value in (("problems_shown", problems_shown), ("samples_shown", samples_shown)):
        if value < 0:
            raise ValueError(f"write_comparison: {name} must be >= 0, got {value}")
    runs = _labelled([_read(evaluation) for evaluation in evaluations])
    for run in runs[1:]:
        _check_comparable(runs[0], run)
    curves = {name: _history(path) for name, path in (histories or {}).items()}
    rows = measure_rows(runs)
    pictures, notes = draw_pictures(runs, rows, curves)
    notes += sampler_notes(runs)
    notes += [f"{run.label} has no {file}: its completions are not shown." for run in runs for file in run.missing]
    if all(isinstance(e, (str, Path)) for e in evaluations):
        command = shlex.join(["powerflow-fast", "compare", *(Path(e).name for e in evaluations)])
    else:
        command = None
    page = Page(
        title=title,
        headline=headline(runs, rows),
        text=text,
        runs=runs,
        rows=rows,
        notes=notes,
        costs=costs(runs),
        shown=choose_prompts(runs, rows, count=problems_shown, seed=seed) if samples_shown else [],
        shown_samples=samples_shown,
        seed=seed,
        command=command,
        version=__version__,
    )
    files = [Path("figures") / f"{picture.name}.svg" for picture in pictures]
    folder = Path(folder)
    written = Comparison(folder / "comparison.html", folder / "comparison.md", page.headline)
    texts = {folder / file: picture.svg for picture, file in zip(pictures, files, strict=True)}
    texts |= {written.html: render_html(page, pictures), written.markdown: render_markdown(page, pictures, files)}
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for path, content in texts.items():
            path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise OutputDirError(f"write_comparison: {folder} cannot be written: {error.strerror or error}") from error
    return written


def _read(source: Any) -> Run:
    missing: tuple[str, ...] = ()
    if not isinstance(source, (str, Path, Evaluation)):
        raise TypeError(f"write_comparison: evaluations must be folders or Evaluations, got {source!r}")
    if isinstance(source, (str, Path)):
        folder = Path(source)
        fields, where = read_result(folder), str(folder / RESULT)
        if (folder / COMPLETIONS).exists():
            fields["completions"] = _read_lines(folder / COMPLETIONS)
        else:
            fields["completions"], missing = [], (COMPLETIONS,)
    else:
        names = ("name", "problems", "settings", "measures", "per_prompt", "pass_at_k", "completions")
        fields = {name: getattr(source, name) for name in (*names, "tokens_generated", "seconds", "statistics")}
        where = f"evaluation {fields['name']!r}"
    completions: dict[int, list[Mapping[str, Any]]] = {}
    try:
        for completion in sorted(fields["completions"], key=lambda c: (c["problem"], c["sample"])):
            _ = completion["prompt"], completion["completion"]  # what the page shows
            completions.setdefault(completion["problem"], []).append(completion)
        run = Run(
            label=" ".join(fields["name"].split()) or "unnamed",
            problems=fields["problems"],
            settings=dict(fields["settings"]),
            measures={key: _measure(value) for key, value in fields["measures"].items()},
            per_prompt={
                key: [float("nan") if v is None else float(v) for v in values]
                for key, values in fields["per_prompt"].items()
            },
            pass_at_k={int(k): _measure(value) for k, value in fields["pass_at_k"].items()},
            completions=completions,
            tokens_generated=fields["tokens_generated"],
            seconds=fields["seconds"],
            statistics=dict(fields.get("statistics", {})),
            missing=missing,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"write_comparison: {where} is not an evaluation: {type(error).__name__}: {error}") from None
    sizes = {key: len(values) for key, values in run.per_prompt.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"write_comparison: {where}: per_prompt must have one value per prompt, got lengths {sizes}")
    return run


def _measure(value: Measure | Mapping[str, Any]) -> Measure:
    return value if isinstance(value, Measure) else Measure.from_dict(value)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        return read_history(path)
    except (OSError, ValueError) as error:
        raise DataError(f"write_comparison: cannot read {path}: {error}") from None


def _history(path: str | Path) -> list[dict[str, Any]]:
    if not Path(path).is_file():
        raise DataError(f"write_comparison: histories must be paths of history.jsonl files; there is no {path}")
    rows = _read_lines(Path(path))
    for i, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"write_comparison: {path}:{i}: not a row of a history, got {type(row).__name__}")
    return rows


def _labelled(runs: list[Run]) -> list[Run]:
    """``runs`` with labels that are unique: the second of a name gets a 2."""
    taken: set[str] = set()
    labelled = []
    for run in runs:
        label, count = run.label, 1
        while label in taken:
            count += 1
            label = f"{run.label} ({count})"
        taken.add(label)
        labelled.append(replace(run, label=label))
    return labelled


def _check_comparable(first: Run, other: Run) -> None:
    """The same problems, sampled as often and summed up at the same confidence."""
    checks = [
        ("of the same problems", first.problems, other.problems),
        (
            "of the same problems: their problems_fingerprint differs",
            *(run.settings.get("problems_fingerprint") for run in (first, other)),
        ),
        ("with the same num_samples", first.num_samples, other.num_samples),
        ("with the same number of prompts", first.prompts, other.prompts),
        ("with the same confidence", first.confidence, other.confidence),
    ]
    for what, wanted, got in checks:
        if wanted != got:
            raise DataError(
                f"write_comparison: evaluations must be {what}, got {wanted!r} ({first.label}) and {got!r} "
                f"({other.label})"
            )
    for i in sorted(first.completions.keys() & other.completions.keys()):
        wanted, got = (run.completions[i][0]["prompt"] for run in (first, other))
        if wanted != got:
            raise DataError(
                f"write_comparison: evaluations must be of the same problems, but problem {i} is {_start(wanted)} "
                f"({first.label}) and {_start(got)} ({other.label})"
            )


def _start(prompt: Any) -> str:
    return repr(visible(prompt)[:60])
