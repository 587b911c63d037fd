"""What results/device/*.jsonl say, as Markdown: passes kernel by kernel, tile kernels, and the products themselves.

``render.py`` writes results/DEVICE.md and a part of README.md from here.
"""

from __future__ import annotations

import json
from pathlib import Path

from results import STALE, STALE_NOTE, Row, is_stale

PASSES = {"no_grad": "forward", "frozen": "frozen head", "one pass": "LA-TB loss, one pass"}
PRODUCTS = {"no_grad": 1, "frozen": 2, "full": 3, "one pass": 3}
"""[N, V, H] products that a mode cannot do without."""


def load_device(folder: Path) -> dict[str, list[Row]]:
    """Rows by the name of their file, in the order in which they were measured."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted((folder / "device").glob("*.jsonl"))
    }


def tflops(row: Row) -> float:
    return 2 * row["n"] * row["v"] * row["h"] * PRODUCTS[row["mode"]] / row["ms"] / 1e9


def newest(rows: list[Row]) -> list[Row]:
    """The rows of the last commit that was measured."""
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def readme_part(rows: list[Row]) -> str:
    """One table: each head's passes, beside the bare products of the same run."""
    rows = newest(rows)
    found = {(row["v"], row["h"], row["mode"]): row for row in rows}
    heads = dict.fromkeys((row["v"], row["h"]) for row in rows)
    first = rows[0]
    lines = [
        f"On an {first['device']}, {first['n']} tokens, bf16: milliseconds of a pass, in brackets over those of its "
        "matrix products alone by `torch.mm` in the same run. 1.00: all else is hidden behind them; below, since the "
        "products alone write their logits, and since a GPU's clock follows its load by some 5 %.",
        "",
        f"| V × H | {' | '.join(PASSES.values())} |",
        "| --- " * (len(PASSES) + 1) + "|",
    ]
    for v, h in heads:
        cells = []
        for mode in PASSES:
            row = found[v, h, mode]
            cells.append(f"{row['ms']:.1f} ({row['ms'] / row['products_ms']:.2f}), {tflops(row):.0f} TFLOP/s")
        mark = STALE if any(is_stale(found[v, h, mode]) for mode in PASSES) else ""
        lines.append(f"| {v} × {h}{mark} | {' | '.join(cells)} |")
    where = f"torch {first['torch']}, triton {first['triton']}, commit {first['commit'][:9]}"
    return "\n".join([*lines, "", f"{first['device']}, {where}; [kernel by kernel](benchmarks/results/DEVICE.md)."])


def _passes(rows: list[Row]) -> list[str]:
    commits = dict.fromkeys(row["commit"] for row in rows)
    found = {(row["commit"], row["v"], row["h"], row["mode"]): row for row in rows}
    lines = [
        "## Passes, kernel by kernel",
        "",
        "Seven passes in a row, timed by events; `kernels` is what they sum to in a profiler, in another run of the "
        "process, so that clocks differ by a few per cent. The products are those of the mode, whole.",
        "",
    ]
    for commit in commits:
        tests = next(row.get("tests") for row in rows if row["commit"] == commit)
        lines += [
            f"### Commit {commit[:9]}",
            *(["", f"`tests/gpu`: {tests}."] if tests else []),
            "",
            "| V × H | mode | ms | products | ÷ products | kernels | launches | ",
        ]
        lines[-1] += "TFLOP/s | the largest |"
        lines.append("| --- " * 9 + "|")
        for (c, v, h, mode), row in found.items():
            if c != commit:
                continue
            largest = ", ".join(f"{name} {ms:.2f}" for name, (ms, _) in list(row["kernels"].items())[:3])
            mark = STALE if is_stale(row) else ""
            lines.append(
                f"| {v} × {h} | {mode}{mark} | {row['ms']:.2f} | {row['products_ms']:.2f} | "
                f"{row['ms'] / row['products_ms']:.2f} | {row['kernels_ms']:.2f} | {row['launches']} | "
                f"{tflops(row):.0f} | {largest} |"
            )
        lines.append("")
    return lines


def _tiles(rows: list[Row]) -> list[str]:
    lines = [
        "## Tile kernels",
        "",
        f"`tile_times.py`, {rows[0]['device']}, {rows[0]['n']} tokens, commit {rows[0]['commit'][:9]}: the same result "
        "by the Triton tiles and by Hopper's own (depth of a step x stages / stagger), over `torch.mm` of the product.",
        "",
        "| V × H | use | kernel | ms | ÷ torch.mm | TFLOP/s |",
        "| --- " * 6 + "|",
    ]
    lines += [
        f"| {row['v']} × {row['h']} | {row['kernel']} | {row['variant']} | {row['ms']:.3f} | {row['ratio']:.2f} | "
        f"{row['tflops']:.0f} |"
        for row in rows
    ]
    return [*lines, ""]


def _products(rows: list[Row]) -> list[str]:
    heads = dict.fromkeys((row["v"], row["h"]) for row in rows)
    forms: dict[str, dict] = {}
    for row in rows:
        forms.setdefault(row["form"], {})[row["v"], row["h"]] = row
    lines = [
        "## Bare products",
        "",
        f"`product_rates.py`, {rows[0]['device']}, {rows[0]['n']} tokens: TFLOP/s of each form.",
        "",
        f"| form | {' | '.join(f'{v} × {h}' for v, h in heads)} |",
        "| --- " * (len(heads) + 1) + "|",
    ]
    for form, by_head in forms.items():
        cells = [f"{by_head[head]['tflops']:.0f}" if head in by_head else "–" for head in heads]
        lines.append(f"| {form} | {' | '.join(cells)} |")
    return [*lines, ""]


def device_page(found: dict[str, list[Row]]) -> str:
    parts = [
        "# Inside of a pass, on a GPU",
        "",
        "Written by `benchmarks/render.py` from `device/*.jsonl`; [../README.md](../README.md) says what is measured.",
        STALE_NOTE,
        "",
    ]
    writers = {"kernel-times": _passes, "tile-kernels": _tiles, "product-rates": _products}
    for name, write in writers.items():
        if name in found:
            parts += write(found[name])
    return "\n".join(parts).rstrip() + "\n"
