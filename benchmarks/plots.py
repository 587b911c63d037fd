"""The plots: one line per provider over a sweep of N or V, and what is left of the machine's speed in each case.

A sweep is found in the rows: the cases that differ in the one size only. Files are the same bytes for the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from peers.head import HEAD_PROVIDERS
from results import Providers, Row, by_case, case_of, device_of, fastest, floor

QUANTITIES: dict[str, tuple[str, Callable[[Row], float | None]]] = {
    "time": ("median time of a step", lambda row: row["ms_p50"]),
    "memory": ("peak extra memory of a step", lambda row: row.get("peak_extra_mib")),
    "rate": ("useful FLOP/s", lambda row: row["useful_flop"] / row["ms_p50"] * 1e3 if row["useful_flop"] else None),
}


@dataclasses.dataclass(frozen=True)
class Plot:
    file: str
    quantity: str
    suites: tuple[str, ...]
    axis: str | None
    """``n`` or ``v`` for a sweep; None for one line of dots per case."""
    mode: str = "frozen"

    def describe(self) -> str:
        label = QUANTITIES[self.quantity][0]
        return f"{label} by case" if self.axis is None else f"{label} against {self.axis.upper()}"


def _sweeps(device: str, suites: tuple[str, ...]) -> list[Plot]:
    wanted = [("time", "n"), ("memory", "n"), ("rate", "n"), ("time", "v"), ("memory", "v")]
    return [Plot(f"{device}-{quantity}-vs-{axis}", quantity, suites, axis) for quantity, axis in wanted]


PLOTS = [
    *_sweeps("cpu", ("cpu-n", "cpu-v")),
    *_sweeps("gpu", ("gpu", "gpu-n")),
    Plot("cpu-rate", "rate", ("cpu",), None),
    Plot("cpu-loss-rate", "rate", ("cpu-loss",), None, mode="full"),
    Plot("gpu-rate", "rate", ("gpu",), None),
    Plot("gpu-loss-rate", "rate", ("gpu-loss",), None, mode="full"),
]


def cases_of(plot: Plot, rows: list[Row]) -> list[Providers]:
    """The cases of a plot, in the order of its axis; none if there is nothing to compare."""
    # bare products have a time, but no memory of their own
    shown = [r for r in rows if r["suite"] in plot.suites and r["status"] == "ok" and r["mode"] == plot.mode]
    shown = [r for r in shown if QUANTITIES[plot.quantity][1](r) is not None]
    if plot.axis is None:
        cases = by_case(shown)
        return cases if len(cases) > 1 else []
    sweeps: dict[tuple, dict[int, Providers]] = {}
    for providers in by_case(shown):
        first = next(iter(providers.values()))
        case = dataclasses.asdict(case_of(first))
        size = case.pop(plot.axis)
        sweeps.setdefault((device_of(first), *case.items()), {})[size] = providers
    longest = max(sweeps.values(), key=len, default={})
    return [longest[size] for size in sorted(longest)] if len(longest) > 1 else []


def home(plot: Plot, rows: list[Row]) -> str | None:
    """The suite under whose tables a plot belongs: the last of those that its rows come from."""
    suites = {row["suite"] for providers in cases_of(plot, rows) for row in providers.values()}
    return max(suites, key=plot.suites.index, default=None)


def series_of(plot: Plot, cases: list[Providers]) -> dict[str, list[tuple[float, float]]]:
    """Points of each provider of a sweep, those that end highest first: the order of the lines in the plot."""
    value = QUANTITIES[plot.quantity][1]
    series: dict[str, list[tuple[float, float]]] = {}
    for providers in cases:
        for name, row in providers.items():
            series.setdefault(name, []).append((row[plot.axis], value(row)))
    return dict(sorted(series.items(), key=lambda item: -item[1][-1][1]))


# The same provider looks the same in every plot. Colours that can be told apart without full colour vision.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
_OTHERS = [p.name for p in HEAD_PROVIDERS if p.kind in ("peer", "baseline") and p.name != "naive"]
_OURS = {
    "powerflow_fast torch": "D",
    "powerflow_fast triton": "D",
    "powerflow_fast one pass torch": "D",
    "powerflow_fast composed": "s",
    "powerflow_fast with entropy": "s",
}


def style(name: str) -> dict[str, object]:
    if name in _OURS:  # not what most users get
        look = {"color": "black", "linewidth": 1.4, "linestyle": "--", "marker": _OURS[name], "markersize": 5}
        return look | {"markerfacecolor": "white", "zorder": 4}
    if name.startswith("powerflow_fast"):
        return {"color": "black", "linewidth": 2.6, "linestyle": "-", "marker": "o", "markersize": 5, "zorder": 5}
    if name.startswith("gemm"):
        line = "-." if name == "gemm blocks" else ":"
        return {"color": "0.5", "linewidth": 1.4, "linestyle": line, "marker": "|", "markersize": 10, "zorder": 1}
    if name == "naive":
        return {"color": "0.45", "linewidth": 1.6, "linestyle": "-", "marker": "X", "markersize": 6, "zorder": 2}
    place = _OTHERS.index(name)
    marker = "os^D"[place // len(_COLOURS)]
    return {"color": _COLOURS[place % len(_COLOURS)], "linewidth": 1.2, "marker": marker, "markersize": 4, "zorder": 3}


def _readable(quantity: str) -> Callable[[float, object], str]:
    def text(value: float, _: object) -> str:
        if quantity == "time":
            return f"{value / 1e3:g} s" if value >= 1e3 else f"{value:g} ms"
        if quantity == "memory":
            return f"{value / 1024:g} GiB" if value >= 1024 else f"{value:g} MiB"
        return f"{value / 1e12:g} T" if value >= 1e12 else f"{value / 1e9:g} G" if value else "0"

    return text


def _labelled(sizes: list[int]) -> list[int]:
    """Without those whose label would lie on the next one's."""
    return [a for a, b in zip(sizes, [*sizes[1:], 2 * sizes[-1]], strict=True) if b / a > 1.5]


def _draw_sweep(axes, plot: Plot, cases: list[Providers]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    series = series_of(plot, cases)
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, **style(name))
    axes.set_xscale("log", base=2)
    ticks = _labelled(sorted({x for points in series.values() for x, _ in points}))
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel({"n": "tokens N", "v": "vocabulary V"}[plot.axis])
    axes.set_ylabel(QUANTITIES[plot.quantity][0])
    if plot.quantity == "rate":
        axes.set_ylim(bottom=0)  # linear: what counts is the share of the bare products
        axes.yaxis.set_major_formatter(FuncFormatter(_readable(plot.quantity)))
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(_readable(plot.quantity)))
    low, high = axes.get_ylim()
    few = high / low > 300
    if plot.quantity == "memory":
        locator = LogLocator(base=4.0 if few else 2.0, numticks=20)
    else:
        locator = LogLocator(base=10.0, subs=(1.0,) if few else (1.0, 2.0, 5.0), numticks=20)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_dots(axes, plot: Plot, cases: list[Providers]) -> None:
    """One line per case: the providers as dots, the bare products as a bar to reach."""
    from matplotlib.ticker import FuncFormatter

    value = QUANTITIES[plot.quantity][1]
    seen = {}
    for height, providers in enumerate(cases):
        if bare := floor(providers):
            axes.barh(height, value(bare), height=0.62, color="0.9", zorder=0, label=None if seen else "bare products")
        for name, row in providers.items():
            if row["kind"] == "floor":
                continue
            look = {key: v for key, v in style(name).items() if key not in ("linestyle", "linewidth")}
            label = None if name in seen else name
            axes.plot(value(row), height, linestyle="", label=label, **look | {"markersize": look["markersize"] + 2})
            seen[name] = True
    axes.set_yticks(range(len(cases)), [_short(next(iter(providers.values()))) for providers in cases])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(_readable(plot.quantity)))
    axes.set_xlabel(QUANTITIES[plot.quantity][0])
    axes.grid(visible=False, axis="y")


def _short(row: Row) -> str:
    return f"{row['n']:,} × {row['v']:,} × {row['h']:,}\n{row['dtype']}"


def title(plot: Plot, cases: list[Providers]) -> str:
    row = fastest(cases[0].values())
    what = {"frozen": "Frozen head, forward and backward", "full": "LA-TB loss from hidden states, trained head"}
    fixed = [f"{key.upper()}={row[key]:,}" for key in ("n", "v", "h") if plot.axis and key != plot.axis]
    fixed += [row["dtype"]] if plot.axis else ["N × V × H"]
    return f"{what[plot.mode]}, {', '.join(fixed)}\n{device_of(row)}, torch {row['torch']}"


def draw(plot: Plot, rows: list[Row], path: Path) -> bool:
    """Writes one file; False if there is nothing to show."""
    cases = cases_of(plot, rows)
    if not cases:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 4.4 if plot.axis else max(3.6, 1.2 + 0.6 * len(cases))
    with plt.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plt.subplots(figsize=(8.4, height), layout="constrained")
        axes.grid(which="major", alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_sweep if plot.axis else _draw_dots)(axes, plot, cases)
        axes.set_title(title(plot, cases), fontsize=10, loc="left")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)
    return True
