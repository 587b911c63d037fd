"""Rows of results/*.jsonl: reading them, grouping them by case, and the questions every table and plot asks of them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import measure
from operations import OPERATIONS, Case

Row = dict
STALE = "†"
STALE_NOTE = f"{STALE} measured before the last change of these sources."
Providers = dict[str, Row]
"""The rows of one case, by provider, in the order in which they were written."""


def load(folder: Path, *, rehearsal: bool = False) -> list[Row]:
    """All rows of a folder; those of a rehearsal are refused unless they are asked for."""
    rows = []
    for path in sorted(folder.glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rehearsal and any(row["rehearsal"] for row in rows):
        raise SystemExit(f"render: {folder} holds rehearsal rows, which are no measurements")
    return rows


def is_stale(row: Row) -> bool:
    """The sources behind a figure of ours are no longer those it was measured with."""
    if not row.get("sources"):
        return False
    return row["sources"] != measure.source_digest(row["op"], row["backend"], package=measure.ROOT / "powerflow_fast")


def device_of(row: Row) -> str:
    """The device's name. That of a CPU needs family and model, where the row has them, to tell its generation."""
    if row["device_type"] != "cpu" or row.get("cpu_model") is None:
        return row["device"]
    return f"{row['device']} (family {row['cpu_family']}, model {row['cpu_model']})"


def case_of(row: Row) -> Case:
    kind = OPERATIONS[row["op"]].case
    return kind(**{field.name: row[field.name] for field in dataclasses.fields(kind)})


def by_case(rows: Iterable[Row]) -> list[Providers]:
    cases: dict[tuple, Providers] = {}
    for row in rows:
        key = (row["suite"], device_of(row), row["op"], case_of(row))
        cases.setdefault(key, {})[row["provider"]] = row
    return list(cases.values())


def ours(providers: Providers) -> Row | None:
    """The first of ours is the one that a user gets."""
    return next((row for row in providers.values() if row["kind"] == "ours"), None)


def baseline(providers: Providers) -> Row | None:
    return next((row for row in providers.values() if row["kind"] == "baseline"), None)


def floor(providers: Providers) -> Row | None:
    return fastest(row for row in providers.values() if row["kind"] == "floor")


def over_floor(row: Row, providers: Providers) -> float | None:
    """Time over that of the bare products, by the rate that the row carries or else by the floor's row of its case."""
    if row.get("floor_tflops"):
        return row["floor_tflops"] * 1e9 * row["ms_p50"] / row["useful_flop"]
    bare = floor(providers)
    return row["ms_p50"] / bare["ms_p50"] if bare else None


def fastest_other(providers: Providers) -> Row | None:
    """Of peers and baselines, without the plain one, which has a column of its own."""
    plain = baseline(providers)
    return fastest(r for r in providers.values() if r["kind"] in ("peer", "baseline") and r is not plain)


def fastest(rows: Iterable[Row]) -> Row | None:
    return min((row for row in rows if row["status"] == "ok"), key=lambda row: row["ms_p50"], default=None)


def show_time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def show_memory(mib: float | None) -> str:
    if mib is None:
        return "?"
    return f"{mib / 1024:.1f} GiB" if mib >= 10240 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def show_number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}".replace("e-0", "e-")
