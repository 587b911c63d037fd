"""What the studies found, as the table in README.md: ``python benchmarks/studies/overview.py`` writes it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from common import HERE, Study, load, table

STUDIES = ("exact_targets", "stability", "baselines", "real_model", "alpha_sweep")
README = HERE.parents[1] / "README.md"
BEGIN, END = "<!-- studies:begin -->", "<!-- studies:end -->"


def studies() -> list[Study]:
    """Those that have rows."""
    found = [importlib.import_module(name).STUDY for name in STUDIES]
    return [study for study in found if study.rows_file(HERE).is_file()]


def block() -> str:
    """A line for each study: claims that did not hold and that held, and how long it ran."""
    lines = []
    for study in studies():
        rows = load(study.rows_file(HERE))
        held = [claim.held for claim in study.claims(rows)]
        minutes = sum(row["seconds"] for row in rows) / 60
        page = study.page_file(Path("benchmarks/studies")).as_posix()
        counts = (str(held.count(value)) for value in (False, None, True))
        lines.append((f"[{study.title}]({page})", *counts, f"{minutes:.0f} min"))
    return table(("study", "claims that did not hold", "undecided", "held", "CPU time"), lines)


def with_block(text: str) -> str:
    """The README's text with the table of now."""
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
