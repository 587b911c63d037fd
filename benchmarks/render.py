"""Turns results/*.jsonl into README.md's table, results/TABLES.md and the plots: ``python benchmarks/render.py``.

Figures come from the rows alone. One whose sources have changed since is marked. ``--check`` writes nothing and fails
where a text differs from what the rows give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from plots import PLOTS, Plot, cases_of, draw, home  # noqa: E402
from render_device import device_page, load_device, readme_part  # noqa: E402
from results import (  # noqa: E402
    STALE,
    STALE_NOTE,
    Providers,
    Row,
    baseline,
    by_case,
    case_of,
    device_of,
    fastest_other,
    floor,
    is_stale,
    load,
    ours,
    over_floor,
    show_memory,
    show_number,
    show_time,
)

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
HEAD = "linear_logprobs"
WHAT = {HEAD: "frozen head", "linear_la_tb_loss": "LA-TB loss", "update": "update"}
WHOLE_MODEL = ("update", "rollout")


def machine(rows: list[Row]) -> str:
    """The device and versions of the rows, which share a device."""
    first = rows[0]
    commits = sorted({(row["commit"] or "unknown")[:9] for row in rows})
    threads = f", {first['threads']} threads" if first["device_type"] == "cpu" else ""
    text = f"{device_of(first)}{threads}, torch {first['torch']}, commit {', '.join(commits)}"
    return text + (", with uncommitted changes" if any(row["dirty"] for row in rows) else "")


def ratio(row: Row, other: Row | None) -> str:
    return f"{row['ms_p50'] / other['ms_p50']:.2f}" if other and other["status"] == "ok" else ""


def floor_ratio(row: Row, providers: Providers) -> str:
    times = over_floor(row, providers)
    return "" if times is None else f"{times:.2f}"


# README.md


def cell(row: Row | None, *, name: bool = False) -> str:
    """Time, memory and error of one provider, or why there is none."""
    if row is None:
        return "none ran"
    label = f"{row['provider']}: " if name else ""
    if row["status"] != "ok":
        return f"{label}{row['status']} ({row['error'].split(':')[0]})"
    parts = [show_time(row["ms_p50"])]
    parts += [show_memory(row["peak_extra_mib"])] if row.get("peak_extra_mib") is not None else []
    parts += [show_number(row.get("sum_err", row.get("loss_rel_err")))]
    return f"{label}{', '.join(part for part in parts if part)}{STALE if is_stale(row) else ''}"


def readme_block(rows: list[Row], passes: list[Row] | None = None) -> str:
    """One small table: a frozen head, the loss with a trained one, a whole update; on a CPU and, if measured, a GPU.
    Before it, ``passes`` of a GPU over their bare products."""
    cases: list[Providers] = []
    for suite in ("gpu", "gpu-loss", "gpu-update", "cpu", "cpu-loss", "cpu-update"):
        of_suite = by_case(r for r in rows if r["suite"] == suite and (r["mode"] == "frozen" or r["op"] != HEAD))
        cases += of_suite[:4]
    cases = [c for c in cases if ours(c) and ours(c)["status"] != "skipped"]
    shown = [row for providers in cases for row in providers.values()]
    parts = [readme_part(passes)] if passes else []
    if cases:
        lines = [
            "Forward and backward of a language-model head over N tokens: median time, peak memory on top of the "
            "inputs, and error (frozen head: of the log-prob summed over the tokens, in nats; LA-TB loss, which trains "
            "the head: of the loss, relative). Below, a whole training update: scores under base and policy, loss, "
            "backward pass, AdamW step. ÷ bare GEMMs: the time of powerflow_fast over that of the matrix products "
            "alone.",
            "",
            "| | N × V × H | dtype | naive PyTorch | fastest other | powerflow_fast | ÷ bare GEMMs |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for providers in cases:
            own = ours(providers)
            device = "CPU" if own["device_type"] == "cpu" else own["device"]
            what = f"{device}, {WHAT[own['op']]}"
            shape = (
                f"{own['model']}, {own['n']} tokens"
                if own["op"] == "update"
                else f"{own['n']} × {own['v']} × {own['h']}"
            )
            cells = [cell(baseline(providers)), cell(fastest_other(providers), name=True), cell(own)]
            cells.append((own["status"] == "ok" and floor_ratio(own, providers)) or "–")
            lines.append(f"| {what} | {shape} | {own['dtype']} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
        devices = dict.fromkeys(map(device_of, shown))
        parts.append("\n".join(f"{machine([r for r in shown if device_of(r) == d])}." for d in devices))
        if any(is_stale(row) for row in [*shown, *(passes or [])]):
            parts.append(STALE_NOTE)
    else:
        parts.append("Not measured yet.")
    parts.append(
        "Every provider, mode and shape, those we lose included: [benchmarks/results](benchmarks/results/TABLES.md); "
        "how it is measured: [benchmarks](benchmarks/README.md)."
    )
    return "\n\n".join(parts)


def plot_block(rows: list[Row]) -> str:
    """One plot for benchmarks/README.md: a GPU's if there is one."""
    candidates = [plot for plot in PLOTS if plot.quantity == "memory" and plot.axis == "n"]
    shown = [plot for plot in reversed(candidates) if cases_of(plot, rows)]
    return image(shown[0], "results/") if shown else "No plot yet: its sweep is still to be measured."


def image(plot: Plot, folder: str = "") -> str:
    return f"![{plot.describe()}]({folder}{plot.file}.svg)"


def fill(document: str, block: str) -> str:
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise SystemExit(f"render: the document needs {BEGIN} and {END} once each")
    head, rest = document.split(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.split(END)[1]}"


# results/TABLES.md

Column = Callable[[Row, Providers], str]


def _error(name: str) -> Column:
    return lambda row, _: show_number(row.get(name))


def _rate(row: Row, _: Providers) -> str:
    if not row.get("useful_flop"):
        return ""
    gflops = row["useful_flop"] / row["ms_p50"] / 1e6
    return f"{gflops / 1e3:.0f} T" if gflops >= 1e4 else f"{gflops:.0f} G"


def _executed(row: Row, _: Providers) -> str:
    return f"{row['executed_flop'] / row['useful_flop']:.2f}" if row.get("executed_flop") else ""


COLUMNS: dict[str, Column] = {
    "release": lambda r, _: r["release"] or "",
    "time p50 (p20–p80)": lambda r, _: f"{show_time(r['ms_p50'])} ({show_time(r['ms_p20'])}–{show_time(r['ms_p80'])})",
    "reps": lambda r, _: str(r["reps"]),
    "÷ baseline": lambda r, c: ratio(r, baseline(c)),
    "÷ bare GEMMs": floor_ratio,
    "useful FLOP/s": _rate,
    "executed ÷ useful": _executed,
    "tokens/s": lambda r, _: f"{r.get('tokens', r['n']) / r['ms_p50'] * 1e3:.0f}" if r["op"] in WHOLE_MODEL else "",
    "generated tokens": lambda r, _: str(r.get("tokens", "")),
    "longest": lambda r, _: str(r.get("longest", "")),
    "extra memory": lambda r, _: "" if r["kind"] == "floor" else show_memory(r["peak_extra_mib"]),
    "max error": _error("logp_max_err"),
    "sum error": _error("sum_err"),
    "loss error": _error("loss_rel_err"),
    "d_logps error": _error("d_logps_rel_err"),
    "d_hidden error": _error("d_hidden_rel_err"),
    "d_weight error": _error("d_weight_rel_err"),
    "d_log_z error": _error("d_log_z_rel_err"),
    "gradient error": _error("grad_rel_err"),
    "same bits": lambda r, _: {True: "yes", False: "no", None: ""}[r.get("repeatable")],
}


def table(providers: Providers, failed_everywhere: set[str]) -> str:
    """One case, the fastest first, without the columns that nobody fills."""
    every = sorted(providers.values(), key=lambda r: r.get("ms_p50", float("inf")))
    lines = [f"### {case_of(every[0]).title()}", ""]
    ran = [row for row in every if row["status"] == "ok"]
    if all(row["status"] == "skipped" for row in every):
        return f"{lines[0]}\n\nSkipped: {every[0]['error']}."
    if ran:
        cells = {name: [column(row, providers) for row in ran] for name, column in COLUMNS.items()}
        cells = {name: values for name, values in cells.items() if any(values)}
        if plain := baseline(providers):
            cells = {name.replace("baseline", plain["provider"]): values for name, values in cells.items()}
        lines += [f"| provider | {' | '.join(cells)} |", "| --- " * (len(cells) + 1) + "|"]
        for i, row in enumerate(ran):
            name = f"**{row['provider']}**" if row["kind"] == "ours" else row["provider"]
            values = " | ".join(values[i] for values in cells.values())
            lines.append(f"| {name}{STALE if is_stale(row) else ''} | {values} |")
        lines.append("")
    lines += [failure(row) for row in every if row["status"] != "ok" and failure(row) not in failed_everywhere]
    return "\n".join(lines).rstrip()


def failure(row: Row) -> str:
    return f"* {row['provider']}: {row['status']}, {row['error']}"


def suite_part(rows: list[Row], all_rows: list[Row]) -> str:
    """Heading, circumstances, who couldn't run at all, tables and plots of one suite on one device."""
    first, cases = rows[0], by_case(rows)
    loads = [row["load_1min"] for row in rows]
    parts = [
        f"## {first['suite']}",
        f"{machine(rows)}. {first['date']}, Python {first['python']}, triton {first['triton']}, CUDA {first['cuda']}, "
        f"driver {first['driver']}, CPU capability {first['cpu_capability']}, load average before {max(loads)}, tests "
        f"{first['tests']}.",
    ]
    failed = [{failure(r) for r in providers.values() if r["status"] == "error"} for providers in cases]
    everywhere = set.intersection(*failed)
    if everywhere:
        parts.append("Cannot run here:\n\n" + "\n".join(sorted(everywhere)))
    parts += [table(providers, everywhere) for providers in cases]
    images = [image(plot) for plot in PLOTS if home(plot, all_rows) == first["suite"]]
    return "\n\n".join([*parts, *images])


def defeats(rows: list[Row]) -> str:
    """The cases in which somebody is faster or needs less memory than ours: who most, by how much, and how many."""
    lines = []
    for providers in by_case(rows):
        own = ours(providers)
        if own is None or own["status"] != "ok":
            continue
        others = [r for r in providers.values() if r["kind"] in ("peer", "baseline") and r["status"] == "ok"]
        cells = []
        for key, show in (("ms_p50", show_time), ("peak_extra_mib", show_memory)):
            known = [r for r in others if r.get(key) is not None and own.get(key) is not None]
            better = sorted((r for r in known if r[key] < own[key]), key=lambda r: r[key])
            more = f", {len(better) - 1} more" if len(better) > 1 else ""
            cells.append(
                f"{better[0]['provider']}: {show(better[0][key])}, ours {show(own[key])}{more}" if better else ""
            )
        if any(cells):
            lines.append(f"| {own['suite']} | {case_of(own).title()} | {' | '.join(cells)} |")
    if lines:
        lines = ["| suite | case | faster | smaller |", "| --- | --- | --- | --- |", *lines]
    else:
        lines = ["Nowhere in what has been measured so far."]
    return "\n".join(["## Where others are faster or smaller", "", *lines])


def tables(rows: list[Row]) -> str:
    parts = [
        "# All measurements\n\nWritten by `benchmarks/render.py`. What the columns mean: [../README.md](../README.md).",
        defeats(rows),
    ]
    for suite, device in dict.fromkeys((row["suite"], device_of(row)) for row in rows):
        parts.append(suite_part([r for r in rows if (r["suite"], device_of(r)) == (suite, device)], rows))
    if any(is_stale(row) for row in rows):
        parts.append(STALE_NOTE)
    return "\n\n".join(parts) + "\n"


def summary(rows: list[Row]) -> str:
    """One line per case for a terminal: milliseconds and extra MiB of ours, naive, the fastest other; the products."""
    lines = []
    for providers in by_case(rows):
        named = {"ours": ours(providers), "naive": baseline(providers)}
        named |= {"best other": fastest_other(providers), "gemm": floor(providers)}
        shown = []
        for label, row in named.items():
            if row is None or row["status"] != "ok":
                shown.append(f"{label} {'-' if row is None else row['status']}")
                continue
            memory = f" {row['peak_extra_mib']:.0f} MiB" if row.get("peak_extra_mib") is not None else ""
            who = f" ({row['provider']})" if label == "best other" else ""
            shown.append(f"{label}{who} {row['ms_p50']:.3g} ms{memory}")
        first = next(iter(providers.values()))
        lines.append(f"{case_of(first).title()}: {'; '.join(shown)}")
    failed = sorted({f"{r['provider']}: {r['status']}, {r['error'][:140]}" for r in rows if r["status"] != "ok"})
    return "\n".join([*lines, *failed])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="the page that shows one plot")
    parser.add_argument("--summary", action="store_true", help="print a short table and write nothing")
    parser.add_argument("--rehearsal", action="store_true", help="take rows of a rehearsal, to look at the output")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the texts differ")
    options = parser.parse_args(argv)
    rows = load(options.results, rehearsal=options.summary or options.rehearsal)
    if options.summary:
        print(summary(rows))
        return 0
    device = load_device(options.results)
    block = readme_block(rows, device.get("kernel-times"))
    wanted = {
        options.readme: fill(options.readme.read_text(encoding="utf-8"), block),
        options.page: fill(options.page.read_text(encoding="utf-8"), plot_block(rows)),
        options.results / "TABLES.md": tables(rows),
    }
    if device:
        wanted[options.results / "DEVICE.md"] = device_page(device)
    if options.check:
        different = [p.name for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
        if different:
            print(f"render: {', '.join(different)} differ from the results: run benchmarks/render.py", file=sys.stderr)
        return bool(different)
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    for plot in PLOTS:
        if draw(plot, rows, options.results / f"{plot.file}.svg"):
            print(f"wrote {plot.file}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
