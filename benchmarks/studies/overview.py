"""What the studies found, as README.md has it: ``python benchmarks/studies/overview.py`` writes it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from common import HERE, Study, load, mean, table

STUDIES = ("exact_targets", "stability", "baselines", "real_model", "alpha_sweep")
FOLDER = Path("benchmarks/studies")
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- studies:begin -->", "<!-- studies:end -->"


def studies() -> list[Study]:
    """Those that have rows."""
    found = [importlib.import_module(name).STUDY for name in STUDIES]
    return [study for study in found if study.rows_file(HERE).is_file()]


def block() -> str:
    """What alpha does, how the methods compare, and what each study found."""
    parts = []
    for name, part in (("alpha_sweep", picture), ("baselines", methods)):
        study = next((study for study in studies() if study.name == name), None)
        parts += [] if study is None else [part(study)]
    return "\n\n".join([*parts, "\n".join(map(line, studies()))])


def picture(study: Study) -> str:
    file = study.figure_file(FOLDER, "sums").as_posix()
    return f"![{study.figures['sums'].caption}]({file})"


def methods(study: Study) -> str:
    """A line for each method: accuracy with its interval, the best of 16, diversity, cost."""
    import baselines

    from powerflow_fast.evaluation import mean_interval

    rows, lines = load(study.rows_file(HERE)), []
    for method in baselines.methods(rows):
        of_method = baselines.chosen(rows, method)
        accuracy = mean_interval(baselines.per_problem(rows, method, "pass"))
        best = mean(baselines.per_problem(rows, method, "pass", baselines.SAMPLES))
        strategies = mean(baselines.per_problem(rows, method, "strategies"))
        costs = [mean(row[name] for row in of_method) for name in ("training_tokens", "tokens_per_answer")]
        cells = (
            f"{accuracy.value:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})",
            f"{best:.2f}",
            f"{strategies:.1f}",
        )
        lines.append((method, *cells, f"{costs[0]:,.0f}", f"{costs[1]:,.0f}"))
    n = baselines.SAMPLES
    header = ("arithmetic in visible steps, a transformer trained here", f"avg@{n}", f"pass@{n}", f"strategies of {n}")
    remark = (
        "The base's likeliest steps are right by construction, so that greedy decoding can't be beaten here; its "
        f"{n} completions are one."
    )
    return table((*header, "tokens to train", "tokens per answer"), lines) + "\n\n" + remark


def line(study: Study) -> str:
    """The study with the number of claims that did not hold and that held."""
    rows = load(study.rows_file(HERE))
    held = [claim.held for claim in study.claims(rows)]
    counts = f"{held.count(False)} of {len(held)} claims did not hold, {held.count(None)} can't be decided"
    return f"* [{study.title}]({study.page_file(FOLDER).as_posix()}): {counts}"


def with_block(text: str) -> str:
    """The README's text with the block of now."""
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{block()}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    options = parser.parse_args(argv)
    present = README.read_text(encoding="utf-8")
    wanted = with_block(present)
    if options.check:
        return int(present != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
