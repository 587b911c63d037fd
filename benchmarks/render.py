"""Turns results/*.jsonl into the table of README.md, results/TABLES.md and the plots: ``python benchmarks/render.py``.

Figures come from the rows alone. One whose sources have changed since is marked. ``--check`` writes nothing and fails
where a file differs from what the rows give.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

import measure  # noqa: E402

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STALE = "†"
MODES = {"no_grad": "no gradient", "frozen": "frozen", "full": "trained"}
Row = dict
Case = tuple


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
    return row["sources"] != measure.source_digest(row["op"], row["backend"], package=ROOT / "powerflow_fast")


def case_of(row: Row) -> Case:
    keys = ("suite", "device", "n", "v", "h", "b", "dtype", "mode", "mask_ratio", "l2", "off_policy")
    return tuple(row.get(key) for key in keys)


def by_case(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    cases: dict[Case, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(case_of(row), {})[row["provider"]] = row
    return cases


def show_time(ms: float) -> str:
    return f"{ms / 1e3:.2f} s" if ms >= 1000 else f"{ms:.3g} ms"


def show_memory(mib: float | None) -> str:
    if mib is None:
        return "?"
    return f"{mib / 1024:.1f} GiB" if mib >= 10240 else f"{mib:.0f} MiB" if mib >= 10 else f"{mib:.1f} MiB"


def show_number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}".replace("e-0", "e-")


def cell(row: Row | None, *, name: bool = False) -> str:
    """Time, memory and error of one provider, or why there is none."""
    if row is None:
        return "none ran"
    label = f"{row['provider']}: " if name else ""
    if row["status"] != "ok":
        return f"{label}{row['status']} ({row['error'].split(':')[0]})"
    mark = STALE if is_stale(row) else ""
    return (
        f"{label}{show_time(row['ms_p50'])}, {show_memory(row['peak_extra_mib'])}, {show_number(row['sum_err'])}{mark}"
    )


def fastest_other(providers: dict[str, Row]) -> Row | None:
    others = [r for r in providers.values() if r["kind"] in ("peer", "baseline") and r["provider"] != "naive"]
    return min((r for r in others if r["status"] == "ok"), key=lambda r: r["ms_p50"], default=None)


def machine(rows: list[Row]) -> str:
    """The device and versions of the rows, which share a device."""
    first = rows[0]
    commits = sorted({(row["commit"] or "unknown")[:9] for row in rows})
    name = first["device"] if first["device_type"] == "cuda" else f"{first['device']}, {first['threads']} threads"
    text = f"{name}, torch {first['torch']}, commit {', '.join(commits)}"
    return text + (", with uncommitted changes" if any(row["dirty"] for row in rows) else "")


def readme_block(rows: list[Row]) -> str:
    """The text between the markers of README.md."""
    rows = [r for r in rows if r["op"] == "linear_logprobs" and r["suite"] in ("cpu", "cpu-modes", "gpu")]
    rows = [r for r in rows if r["mode"] != "no_grad"]
    parts = []
    for device in sorted(
        {r["device"] for r in rows}, key=lambda d: all(r["device_type"] != "cuda" for r in rows if r["device"] == d)
    ):
        here = [r for r in rows if r["device"] == device]
        lines = [
            f"One training step of a language-model head ({machine(here)}): median time, peak memory on top of the "
            "inputs, and error in nats of the log-prob summed over the tokens.",
            "",
            "| N × V × H | dtype | head | naive PyTorch | fastest other | powerflow_fast |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for providers in by_case(here).values():
            ours = providers.get("powerflow_fast")
            if ours is None or ours["status"] == "skipped":
                continue
            shape = f"{ours['n']} × {ours['v']} × {ours['h']}"
            cells = [cell(providers.get("naive")), cell(fastest_other(providers), name=True), cell(ours)]
            lines.append(f"| {shape} | {ours['dtype']} | {MODES[ours['mode']]} | {' | '.join(cells)} |")
        if any(is_stale(r) for r in here):
            lines += ["", f"{STALE} measured before the last change of these sources."]
        parts.append("\n".join(lines))
    if not parts:
        parts = ["Not measured yet."]
    parts.append(
        "Every provider, mode and shape, those we lose included: [benchmarks/results](benchmarks/results/TABLES.md); "
        "how it is measured: [benchmarks](benchmarks/README.md)."
    )
    return "\n\n".join(parts)


def fill(readme: str, block: str) -> str:
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise SystemExit(f"render: README.md needs {BEGIN} and {END} once each")
    head, rest = readme.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


HEAD_COLUMNS: dict[str, Callable[[Row, dict[str, Row]], str]] = {
    "release": lambda r, _: r["release"] or "",
    "time p50 (p20–p80)": lambda r, _: f"{show_time(r['ms_p50'])} ({show_time(r['ms_p20'])}–{show_time(r['ms_p80'])})",
    "reps": lambda r, _: str(r["reps"]),
    "÷ naive": lambda r, c: ratio(r, c.get("naive")),
    "÷ bare GEMMs": lambda r, c: ratio(r, floor(c)),
    "useful GFLOP/s": lambda r, _: f"{r['useful_flop'] / r['ms_p50'] / 1e6:.0f}",
    "executed ÷ useful": lambda r, _: f"{r['executed_flop'] / r['useful_flop']:.2f}" if r["executed_flop"] else "",
    "extra memory": lambda r, _: "" if r["kind"] == "floor" else show_memory(r["peak_extra_mib"]),
    "max error": lambda r, _: show_number(r.get("logp_max_err")),
    "sum error": lambda r, _: show_number(r.get("sum_err")),
    "d_hidden error": lambda r, _: show_number(r.get("d_hidden_rel_err")),
    "d_weight error": lambda r, _: show_number(r.get("d_weight_rel_err")),
    "same bits": lambda r, _: {True: "yes", False: "no", None: ""}[r.get("repeatable")],
}
LA_TB_COLUMNS: dict[str, Callable[[Row, dict[str, Row]], str]] = {
    **{name: HEAD_COLUMNS[name] for name in ("release", "time p50 (p20–p80)", "reps")},
    "÷ eager packed": lambda r, c: ratio(r, c.get("eager packed")),
    "loss error": lambda r, _: show_number(r["loss_rel_err"]),
    "d_logps error": lambda r, _: show_number(r["d_logps_rel_err"]),
    "same bits": HEAD_COLUMNS["same bits"],
}


def ratio(row: Row, other: Row | None) -> str:
    return f"{row['ms_p50'] / other['ms_p50']:.2f}" if other and other["status"] == "ok" else ""


def floor(providers: dict[str, Row]) -> Row | None:
    rows = [r for r in providers.values() if r["kind"] == "floor" and r["status"] == "ok"]
    return min(rows, key=lambda r: r["ms_p50"], default=None)


def title(row: Row) -> str:
    if row["op"] == "la_tb_loss":
        return f"LA-TB loss and gradients, N={row['n']}, B={row['b']}, {'off' if row['off_policy'] else 'on'}-policy"
    extra = f", {row['mask_ratio']:.0%} of the rows masked" if row["mask_ratio"] else ""
    extra += ", warm L2" if row["l2"] == "hot" else ""
    head = {"no_grad": "no gradient", "frozen": "frozen head", "full": "trained head"}[row["mode"]]
    return f"{head}, N={row['n']}, V={row['v']}, H={row['h']}, {row['dtype']}{extra}"


def tables(rows: list[Row]) -> str:
    parts = [
        "# All measurements\n\nWritten by `benchmarks/render.py`. What the columns mean: [../README.md](../README.md)."
    ]
    suite = None
    for providers in by_case(rows).values():
        every = sorted(providers.values(), key=lambda r: r.get("ms_p50", float("inf")))
        first = every[0]
        if (first["suite"], first["device"]) != suite:
            suite = (first["suite"], first["device"])
            group = [r for r in rows if (r["suite"], r["device"]) == suite]
            loads = [r["load_1min"] for r in group]
            parts.append(
                f"## {suite[0]}: {machine(group)}\n\n{first['date']}, Python {first['python']}, triton "
                f"{first['triton']}, CUDA {first['cuda']}, driver {first['driver']}, CPU capability "
                f"{first['cpu_capability']}, load average before {max(loads)}, tests {first['tests']}."
            )
        columns = LA_TB_COLUMNS if first["op"] == "la_tb_loss" else HEAD_COLUMNS
        lines = [
            f"### {title(first)}",
            "",
            f"| provider | {' | '.join(columns)} |",
            "| --- " * (len(columns) + 1) + "|",
        ]
        for row in (r for r in every if r["status"] == "ok"):
            cells = [column(row, providers) for column in columns.values()]
            lines.append(f"| {row['provider']}{STALE if is_stale(row) else ''} | {' | '.join(cells)} |")
        lines.append("")
        if all(r["status"] == "skipped" for r in every):
            lines = [*lines[:2], f"Skipped: {first['error']}."]
        else:
            lines += [f"* {r['provider']}: {r['status']}, {r['error']}" for r in every if r["status"] != "ok"]
        parts.append("\n".join(lines).rstrip())
    if any(is_stale(r) for r in rows):
        parts.append(f"{STALE} measured before the last change of these sources.")
    return "\n\n".join(parts) + "\n"


# (file, quantity, x axis, rows that belong to it)
PLOTS = [
    ("cpu-time-vs-n", "ms_p50", "n", {"device_type": "cpu", "v": 49152, "h": 576, "dtype": "fp32"}),
    ("cpu-memory-vs-n", "peak_extra_mib", "n", {"device_type": "cpu", "v": 49152, "h": 576, "dtype": "fp32"}),
    ("gpu-time-vs-n", "ms_p50", "n", {"device_type": "cuda", "v": 151936, "h": 1536, "dtype": "bf16"}),
    ("gpu-memory-vs-n", "peak_extra_mib", "n", {"device_type": "cuda", "v": 151936, "h": 1536, "dtype": "bf16"}),
    ("gpu-time-vs-v", "ms_p50", "v", {"device_type": "cuda", "n": 8192, "h": 2304, "dtype": "bf16"}),
]


def plot_series(rows: list[Row], quantity: str, axis: str, fixed: dict) -> dict[str, list[tuple[float, float]]]:
    """Points of each provider, for frozen heads without masked rows and with a cold cache."""
    fixed = {"op": "linear_logprobs", "mode": "frozen", "mask_ratio": 0.0, "status": "ok", **fixed}
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if all(row.get(k) == value for k, value in fixed.items()) and row["l2"] != "hot" and row.get(quantity):
            series.setdefault(row["provider"], []).append((row[axis], row[quantity]))
    return {name: sorted(points) for name, points in series.items() if len(points) > 1}


def plot(path: Path, rows: list[Row], quantity: str, axis: str, fixed: dict) -> bool:
    """Writes one SVG; False if there is nothing to show."""
    series = plot_series(rows, quantity, axis, fixed)
    if not series:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = {row["provider"]: row["kind"] for row in rows}
    device = next(r["device"] for r in rows if r["device_type"] == fixed["device_type"])
    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
        palette = iter(plt.get_cmap("tab10").colors)
        for name in sorted(series, key=lambda name: -series[name][-1][1]):
            kind = kinds[name]
            style = {"ours": {"color": "black", "linewidth": 2.5}, "floor": {"color": "grey", "linestyle": ":"}}.get(
                kind
            )
            if style is None or name not in ("powerflow_fast", "gemm"):
                style = {"color": next(palette), "linewidth": 1.2}
            axes.plot(*zip(*series[name], strict=True), marker="o", markersize=3.5, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({x for points in series.values() for x, _ in points})
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xlabel({"n": "tokens N", "v": "vocabulary V"}[axis])
        axes.set_ylabel({"ms_p50": "median time, ms", "peak_extra_mib": "peak extra memory, MiB"}[quantity])
        shape = ", ".join(f"{k.upper()}={fixed[k]}" for k in ("n", "v", "h") if k in fixed)
        axes.set_title(f"frozen head, forward and backward, {shape}, {fixed['dtype']}\n{device}", fontsize=10)
        axes.grid(which="major", alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True


def summary(rows: list[Row]) -> str:
    """One line per case for a terminal: milliseconds and extra MiB of ours, naive, the fastest other; the products."""
    lines = []
    for providers in by_case(rows).values():
        first = next(iter(providers.values()))
        if first["op"] == "la_tb_loss":
            named = {"ours": providers.get("powerflow_fast"), "eager": providers.get("eager packed")}
        else:
            named = {"ours": providers.get("powerflow_fast"), "naive": providers.get("naive")}
            named |= {"best other": fastest_other(providers), "gemm": floor(providers)}
        shown = []
        for label, row in named.items():
            if row is None or row["status"] != "ok":
                shown.append(f"{label} {'-' if row is None else row['status']}")
                continue
            memory = f" {row['peak_extra_mib']:.0f} MiB" if row.get("peak_extra_mib") is not None else ""
            who = f" ({row['provider']})" if label == "best other" else ""
            shown.append(f"{label}{who} {row['ms_p50']:.3g} ms{memory}")
        lines.append(f"{title(first)}: {'; '.join(shown)}")
    failed = sorted({f"{r['provider']}: {r['status']}, {r['error'][:140]}" for r in rows if r["status"] != "ok"})
    return "\n".join([*lines, *failed])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--summary", action="store_true", help="print a short table, leave the README alone")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the text files differ")
    options = parser.parse_args(argv)
    rows = load(options.results, rehearsal=options.summary)
    if options.summary:
        print(summary(rows))
        return 0
    wanted = {
        options.readme: fill(options.readme.read_text(encoding="utf-8"), readme_block(rows)),
        options.results / "TABLES.md": tables(rows),
    }
    if options.check:
        different = [p.name for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        if different:
            print(f"render: {', '.join(different)} differ from the results: run benchmarks/render.py", file=sys.stderr)
        return bool(different)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    for file, quantity, axis, fixed in PLOTS:
        if plot(options.results / f"{file}.svg", rows, quantity, axis, fixed):
            print(f"wrote {file}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
