"""The frame that every study shares: command line, rows, claims, figures, page.

A study is a module of this folder with a :class:`Study` in ``STUDY``:

    def cases(quick, seeds):                 # settings of one run each; JSON values; "seed" is one of them
        return [{"objective": name, "alpha": 4.0, "seed": seed} for name in ("la_tb", "tb") for seed in seeds]

    def run(case):                           # what was measured, one dict or more: they become rows with the settings
        yield {"steps": [0, 100], "length": [8.0, 7.5]}

    def claims(rows):                        # sentences that the rows decide, never typed verdicts
        return [Claim("TB shortens completions at α = 4", held=after < before, numbers=f"{before:.1f} → {after:.1f}")]

    def draw(figure, rows):                  # a matplotlib Figure
        figure.subplots().plot(...)

    STUDY = Study(name="my_study", title=..., about=..., cases=cases, run=run, claims=claims,
                  figures={"length": Picture("Mean length over training.", draw)}, body=lambda rows: markdown)

    if __name__ == "__main__":
        sys.exit(main(STUDY))

``python benchmarks/studies/my_study.py`` then measures into ``results/my_study.jsonl`` and renders ``my_study.md`` and
``figures/my_study-length.svg``; ``render`` only renders, and ``--resume`` goes on with a run that was cut short.
``--quick`` is the short form for CI: its rows cannot be published, and it needs an ``--output`` of its own. A page is a
function of the rows, and a test fails where a committed page differs from what its rows give.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
DIGITS = 6
"""Significant digits of the floating numbers in a row."""
ENVIRONMENT = ("date", "commit", "dirty", "device", "threads", "python", "torch")
"""Of ``measure.environment``, what each row has beside settings, measurements, ``study``, ``quick`` and ``seconds``."""


@dataclass(frozen=True)
class Claim:
    """A sentence, whether the rows bear it out (None: they can't decide), and the numbers that say so."""

    text: str
    held: bool | None
    numbers: str


@dataclass(frozen=True)
class Picture:
    """A figure: what it shows, how it is drawn, and its size in inches."""

    caption: str
    draw: Callable[[Figure, list[Row]], None]
    size: tuple[float, float] = (8.4, 4.4)


@dataclass(frozen=True, kw_only=True)
class Study:
    name: str
    """The module's name, and that of its page and rows."""
    title: str
    about: str
    """What was done, in Markdown."""
    cases: Callable[[bool, Sequence[int]], Iterable[Row]]
    run: Callable[[Row], Iterable[Row]]
    claims: Callable[[list[Row]], list[Claim]]
    figures: Mapping[str, Picture]
    body: Callable[[list[Row]], str] = lambda rows: ""
    """Tables and remarks after the figures, in Markdown."""
    seeds: tuple[int, ...] = (0, 1, 2)
    quick_seeds: tuple[int, ...] = (0,)

    def rows_file(self, folder: Path) -> Path:
        return folder / "results" / f"{self.name}.jsonl"

    def page_file(self, folder: Path) -> Path:
        return folder / f"{self.name}.md"

    def figure_file(self, folder: Path, figure: str) -> Path:
        return folder / "figures" / f"{self.name}-{figure}.svg"


# Looks. One colour and one line per method, the same in every figure of every study. The colours (Okabe and Ito) can be
# told apart without full colour vision; methods with the same target share one and differ in the line.

BLACK, GREY = "#000000", "#7A7A7A"
ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"


STYLE = {"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans", "sans-serif"], "font.size": 9}


@dataclass(frozen=True)
class Look:
    label: str
    color: str
    linestyle: str | tuple[int, tuple[float, ...]] = "-"
    marker: str = "o"
    linewidth: float = 1.5

    def line(self, **changes: Any) -> dict[str, Any]:
        """Keywords of ``axes.plot``."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | {"markersize": 4} | changes

    def dot(self, **changes: Any) -> dict[str, Any]:
        """Keywords of ``axes.plot`` for a point without a line."""
        return self.line(linestyle="", markersize=7) | changes


LOOKS: dict[str, Look] = {
    "base": Look("base model", GREY, ":", "x"),
    # objectives: keys as in objective_registry.OBJECTIVES
    "la_tb": Look("LA-TB (PowerFlow)", BLACK, "-", "o", 2.4),
    "tb": Look("TB", VERMILION, "-", "s"),
    "log_variance_tb": Look("log-variance TB", VERMILION, "--", "D"),
    "rl_trajectory": Look("RL-traj", VERMILION, ":", "^"),
    "token_tb": Look("token-TB", SKY, "-", "v"),
    "rl_token": Look("RL-token", SKY, "--", "<"),
    "subtb": Look("SubTB", GREEN, "-", ">"),
    "relative_tb": Look("relative TB", PURPLE, "-", "p"),
    "flowrl": Look("FlowRL", PURPLE, "--", "h"),
    "grpo": Look("GRPO", ORANGE, "-", "P"),
    # GRPO with an internal reward
    "empo": Look("EMPO", BLUE, "-", "X"),
    "intuitor": Look("Intuitor", BLUE, "--", "d"),
    "ttrl": Look("TTRL", ORANGE, "--", "*"),
    "rent": Look("RENT", BLUE, ":", "H"),
    # at sampling time
    "power_sampling": Look("power sampling", GREEN, "--", "D"),
    "low_temperature": Look("low temperature", GREY, "-", "v"),
    "high_temperature": Look("high temperature", GREY, "--", "^"),
    "verbalized": Look("verbalized sampling", GREEN, ":", "s"),
}

LOG_Z_LOOKS: dict[str, Look] = {
    "learned": Look("log Z' learned", ORANGE, "--", "s", 1.8),
    "group": Look("log Z' of the group", BLUE, "-", "o", 1.8),
    "table": Look("log Z' from the table", GREEN, ":", "D", 1.8),
}


def only_once(axes: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Handles and labels of several axes for one legend of the figure, each label once."""
    found: dict[str, Any] = {}
    for one in axes:
        for handle, label in zip(*one.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)


def tidy(axes: Any) -> None:
    """Grid behind the data, no box."""
    axes.grid(which="major", alpha=0.35, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# Rows


def load(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mean(values: Iterable[float]) -> float:
    values = list(values)
    if not values:
        raise ValueError("mean: needs at least one value")
    return math.fsum(values) / len(values)


def select(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows whose settings are these."""
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown; the columns after the first are right-aligned."""
    rule = "| --- " + "| ---: " * (len(header) - 1) + "|"
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)])


def _short(value: Any) -> Any:
    """Numbers with few digits, NaN and infinity as null: what JSON has."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _short(v) for key, v in value.items()}
    return [_short(v) for v in value] if isinstance(value, (list, tuple)) else value


def _key(case: Row) -> str:
    return json.dumps(_short(case), sort_keys=True)


def measure_rows(study: Study, *, quick: bool, seeds: Sequence[int], done: Iterable[Row] = ()) -> Iterator[list[Row]]:
    """The rows of each case that is not among ``done``, case by case. ``seconds`` of a row is the time spent on it."""
    import torch
    from measure import environment

    machine = environment(torch.device("cpu"))
    common = {"study": study.name, "quick": quick} | {name: machine[name] for name in ENVIRONMENT}
    known = {row["case"] for row in done}
    for case in study.cases(quick, seeds):
        if "seed" not in case:
            raise ValueError(f"measure_rows: every case of {study.name} must have a seed, got {case}")
        name = hashlib.sha256(_key(case).encode()).hexdigest()[:8]
        if name in known:
            continue
        rows, begun = [], time.perf_counter()
        for measured in study.run(case):
            now = time.perf_counter()
            rows.append(_short(common | {"case": name} | case | {"seconds": now - begun} | measured))
            begun = now
        yield rows


def write(study: Study, folder: Path, *, quick: bool, seeds: Sequence[int], resume: bool = False) -> list[Row]:
    """Measure and append to the study's rows, on disk after each case."""
    path = study.rows_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = load(path) if resume and path.is_file() else []
    if any(row["quick"] != quick for row in rows):
        raise SystemExit(f"{study.name}: {path.name} holds rows of the other form (quick), nothing to resume")
    with open(path, "a" if resume else "w", encoding="utf-8") as file:
        for number, of_case in enumerate(measure_rows(study, quick=quick, seeds=seeds, done=rows), 1):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in of_case)
            file.flush()
            rows += of_case
            print(f"{study.name}: {number} cases, {sum(r['seconds'] for r in rows):.0f} s", file=sys.stderr)
    return rows


# Pages


def page(study: Study, rows: list[Row]) -> str:
    """Markdown: what was asked, the claims that did not hold, those that did, the figures, the tables."""
    claims = study.claims(rows)
    parts = [
        f"# {study.title}",
        f"Written by `python benchmarks/studies/{study.name}.py render` from `results/{study.name}.jsonl`.",
        study.about.strip(),
        circumstances(study, rows),
    ]
    for heading, held in (("did not hold", False), ("can't be decided from these rows", None), ("held", True)):
        said = [claim for claim in claims if claim.held is held]
        lines = [f"* **{claim.text}** {claim.numbers}" for claim in said] or ["None."]
        if said or held is not None:
            parts += [f"## Claims that {heading} at this scale", "\n".join(lines)]
    for name, picture in study.figures.items():
        file = study.figure_file(Path(), name).as_posix()
        parts += [f"![{picture.caption}]({file})", picture.caption]
    return "\n\n".join(part for part in [*parts, study.body(rows).strip()] if part) + "\n"


def circumstances(study: Study, rows: list[Row]) -> str:
    """The command, its time, and the machine."""

    def every(name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows}))

    seeds = " ".join(map(str, sorted({row["seed"] for row in rows})))
    machine = f"{every('device')} (threads: {every('threads')})"
    minutes = sum(row["seconds"] for row in rows) / 60
    commits = ", ".join(sorted({(row["commit"] or "unknown")[:9] for row in rows}))
    dirty = ", with uncommitted changes" if any(row["dirty"] for row in rows) else ""
    command = f"python benchmarks/studies/{study.name}.py{' --quick' if rows[0]['quick'] else ''} --seeds {seeds}"
    return (
        f"`{command}`: {minutes:.1f} minutes on {machine}, torch {every('torch')}, "
        f"{every('date')}, commit {commits}{dirty}."
    )


def digest(rows: list[Row]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def render(study: Study, folder: Path, *, png: bool = False) -> None:
    """Page and figures from the rows in ``folder``. A figure's file names the digest of the rows it was drawn from."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rows = load(study.rows_file(folder))
    for name, picture in study.figures.items():
        path = study.figure_file(folder, name)
        path.parent.mkdir(exist_ok=True)
        with rc_context(STYLE | {"svg.hashsalt": path.stem}):
            figure = Figure(figsize=picture.size, layout="constrained")
            picture.draw(figure, rows)
            figure.savefig(path, metadata={"Date": None, "Source": f"rows {digest(rows)}"})
            if png:
                figure.savefig(path.with_suffix(".png"), dpi=110)
        # half of the file is indentation and digits that no screen shows
        text = re.sub(r"\n\s+", "\n", path.read_text(encoding="utf-8"))
        path.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", text), encoding="utf-8")
    study.page_file(folder).write_text(page(study, rows), encoding="utf-8")


def differences(study: Study, folder: Path) -> list[str]:
    """What in ``folder`` is not what its rows give: file names, empty if all is."""
    rows = load(study.rows_file(folder))
    stamp = f"rows {digest(rows)}"
    found = study.page_file(folder)
    wrong = [] if found.is_file() and found.read_text(encoding="utf-8") == page(study, rows) else [found.name]
    for name in study.figures:
        path = study.figure_file(folder, name)
        if not path.is_file() or stamp not in path.read_text(encoding="utf-8"):
            wrong.append(path.name)
    wanted = {study.figure_file(folder, name) for name in study.figures}
    return wrong + [path.name for path in (folder / "figures").glob(f"{study.name}-*.svg") if path not in wanted]


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=study.title)
    parser.add_argument("action", nargs="?", choices=("measure", "render"), default="measure")
    parser.add_argument("--quick", action="store_true", help="a short form, to see that it works; needs --output")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"default: {' '.join(map(str, study.seeds))}")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of page, results/ and figures/")
    parser.add_argument("--resume", action="store_true", help="keep the rows there are and measure what is missing")
    parser.add_argument("--check", action="store_true", help="with render: write nothing, fail where files differ")
    parser.add_argument("--png", action="store_true", help="also write the figures as PNG, to look at")
    options = parser.parse_args(argv)
    if options.quick and options.output.resolve() == HERE:
        parser.error("--quick needs an --output of its own: its rows cannot be published")
    if options.action == "measure":
        seeds = options.seeds or (study.quick_seeds if options.quick else study.seeds)
        write(study, options.output, quick=options.quick, seeds=seeds, resume=options.resume)
    if options.check:
        if wrong := differences(study, options.output):
            print(f"{study.name}: {', '.join(wrong)} differ from what the rows give: run render", file=sys.stderr)
        return bool(wrong)
    render(study, options.output, png=options.png)
    return 0
