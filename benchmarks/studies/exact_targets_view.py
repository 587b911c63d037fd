"""Figures and tables of ``exact_targets.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from common import GREY, LOG_Z_LOOKS, LOOKS, Look, Row, mean, only_once, select, table, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOG_Z_NAMES = {
    "group": "of the group",
    "learned": "learned",
    "table": "from a table",
    "one_for_all": "learned, one for all",
    "flows": "learned flows",
    None: "–",
}
LOG_Z_RATE = 0.1
"""The learning rate of a learned log Z' where rates are not compared."""
FLOOR = 1e-4
"""Where the axis of distances ends."""
SAMPLES = 16
"""K where group sizes are not compared."""
SHARED = Look("learned, one for all prompts", GREY, "-.", "", 1.8)


def by_alpha(rows: Iterable[Row]) -> dict[float, list[Row]]:
    found: dict[float, list[Row]] = {}
    for row in rows:
        found.setdefault(row["alpha"], []).append(row)
    return dict(sorted(found.items()))


def curve(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    """Steps and the mean over seeds."""
    return rows[0]["at"], [mean(values) for values in zip(*(row[key] for row in rows), strict=True)]


def level(row: Row) -> float:
    """Total variation to the own target, mean over the checkpoints of the second half of the training."""
    return mean(value for step, value in zip(row["at"], row["tv_own"], strict=True) if 2 * step >= row["steps"])


def default_log_z(rows: Iterable[Row]) -> list[Row]:
    """One variant of each objective: log Z of the group, and SubTB with its flows."""
    rows = [row for row in rows if row["world"] == "ending" and row["log_z"] in ("group", "flows", None)]
    return [row for row in rows if row["objective"] != "subtb" or row["log_z"] == "flows"]


def panels(figure: Figure, rows: list[Row], draw: Callable[[Axes, list[Row]], None], *, label: str) -> None:
    """One panel for each α, with one legend."""
    groups = by_alpha(rows)
    every = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (alpha, of) in zip(every, groups.items(), strict=True):
        draw(axes, of)
        axes.set_title(f"α = {alpha:g}", fontsize=9)
        axes.set_xlabel("step")
        tidy(axes)
    every[0].set_ylabel(label)
    figure.legend(*only_once(every), loc="outside lower center", ncols=7, frameon=False, fontsize=8)


def log_scale(axes: Axes) -> None:
    """A logarithmic axis with labels such as 0.05."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if high / low < 100 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()


def _distances(axes: Axes, rows: list[Row]) -> None:
    for name in LOOKS:
        if of := [row for row in rows if row["objective"] == name and "tv_own" in row]:
            steps, values = curve(of, "tv_own")
            axes.plot(steps, [max(v, FLOOR) for v in values], **LOOKS[name].line(markersize=3))
    log_scale(axes)


def draw_distances(figure: Figure, rows: list[Row]) -> None:
    panels(figure, select(default_log_z(rows), samples=None), _distances, label="total variation to its own target")


def draw_sampled(figure: Figure, rows: list[Row]) -> None:
    panels(figure, select(default_log_z(rows), samples=SAMPLES), _distances, label="total variation to its own target")


def draw_lengths(figure: Figure, rows: list[Row]) -> None:
    def draw(axes: Axes, of: list[Row]) -> None:
        base = mean(row["length_base"] for row in of)
        axes.axhline(base, color=GREY, linestyle=":", linewidth=1.5, label=LOOKS["base"].label)
        for name in ("la_tb", "tb", "token_tb", "rl_token", "subtb"):
            axes.plot(*curve(select(of, objective=name), "length"), **LOOKS[name].line(markersize=3))

    panels(figure, select(default_log_z(rows), samples=None), draw, label="mean length, tokens")


def draw_log_z(figure: Figure, rows: list[Row]) -> None:
    """A row of panels for each K, a column for each α."""
    rows = [
        row
        for row in select(rows, world="ending", objective="la_tb")
        if row["samples"] is not None and row["log_z_rate"] in (None, LOG_Z_RATE)
    ]
    sizes, alphas = sorted({row["samples"] for row in rows}), list(by_alpha(rows))
    grid = figure.subplots(len(sizes), len(alphas), sharex=True, sharey="col", squeeze=False)
    for line, samples in zip(grid, sizes, strict=True):
        for axes, alpha in zip(line, alphas, strict=True):
            for name, look in (LOG_Z_LOOKS | {"one_for_all": SHARED}).items():
                of = select(rows, samples=samples, alpha=alpha, log_z=name)
                axes.plot(*curve(of, "tv_own"), **look.line(marker=""))
            log_scale(axes)
            tidy(axes)
        line[0].set_ylabel(f"K = {samples}\ntotal variation")
    for axes, alpha in zip(grid[0], alphas, strict=True):
        axes.set_title(f"α = {alpha:g}", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    figure.legend(*only_once(grid.flatten()), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


# Tables


def _steps(rows: list[Row], limit: float) -> str:
    """The first checkpoint at which the mean over seeds is within ``limit``."""
    steps, values = curve(rows, "tv_own")
    return next((str(step) for step, value in zip(steps, values, strict=True) if value <= limit), f"> {steps[-1]}")


def _mean_last(rows: list[Row], key: str, spec: str) -> str:
    values = [row[key][-1] for row in rows if row.get(key) is not None and row[key][-1] is not None]
    return f"{mean(values):{spec}}" if values else "–"


def tables(rows: list[Row], near: float) -> str:
    parts = ["## Where each objective ends"]
    parts.append(
        f"Without noise (exact) and from {SAMPLES} samples of each prompt in a step, means over seeds and prompts. TV "
        "is total variation, KL is KL(π‖target) in nats; – is an objective without a target in closed form, or an "
        f"exact form, here. ‘Steps’ is the first checkpoint within {near} of the own target."
    )
    names, kinds = list(LOOKS), list(LOG_Z_NAMES)
    ending = select(rows, world="ending")
    for alpha, of in by_alpha(ending).items():
        exact = select(of, samples=None)
        steps = f"{exact[0]['steps']} steps exact, {select(of, samples=SAMPLES)[0]['steps']} from samples"
        first = select(exact, objective="la_tb", log_z="group")
        reference = [mean(row[key] for row in first) for key in ("length_power", "length_tilted")]
        base = mean(row["length_base"] for row in first)
        parts.append(
            f"### α = {alpha:g}, {steps}\n\nMean length: base model {base:.2f}, p_base^α {reference[0]:.2f}, "
            f"p_base^α · exp(−λ|y|) {reference[1]:.2f}. Total variation to these "
            f"before training: {mean(row['tv_power'][0] for row in first):.3f}, "
            f"{mean(row['tv_tilted'][0] for row in first):.3f}."
        )
        lines = []
        known = {(row["objective"], row["log_z"]) for row in select(of, samples=SAMPLES)}
        for objective, log_z in sorted(known, key=lambda pair: (names.index(pair[0]), kinds.index(pair[1]))):
            same = [r for r in of if (r["objective"], r["log_z"]) == (objective, log_z)]
            same = [r for r in same if r["log_z_rate"] in (None, LOG_Z_RATE)]
            noiseless, sampled = select(same, samples=None), select(same, samples=SAMPLES)
            lines.append(
                [
                    LOOKS[objective].label,
                    LOG_Z_NAMES[log_z],
                    _steps(noiseless, near) if noiseless and "tv_own" in noiseless[0] else "–",
                    *(_mean_last(noiseless, key, ".3f") for key in ("tv_own", "kl_own", "tv_power", "kl_power")),
                    *(_mean_last(noiseless, key, ".3f") for key in ("tv_tilted", "kl_tilted")),
                    _mean_last(noiseless, "length", ".2f"),
                    _mean_last(sampled, "tv_own", ".3f"),
                    _mean_last(sampled, "length", ".2f"),
                ]
            )
        header = ["objective", "log Z", "steps", "TV own", "KL own", "TV p^α", "KL p^α", "TV tilted", "KL tilted"]
        parts.append(table([*header, "length", f"TV own, K = {SAMPLES}", f"length, K = {SAMPLES}"], lines))
    return "\n\n".join(parts)


def log_z_table(rows: list[Row]) -> str:
    """Late distances of LA-TB by where log Z' is from."""
    rows = [row for row in select(rows, world="ending", objective="la_tb") if row["samples"] is not None]
    kinds = dict.fromkeys(
        (row["log_z"], row["log_z_rate"]) for row in sorted(rows, key=lambda r: (r["log_z"], r["log_z_rate"] or 0))
    )
    lines = []
    for samples in sorted({row["samples"] for row in rows}):
        for log_z, rate in kinds:
            of = by_alpha(select(rows, samples=samples, log_z=log_z, log_z_rate=rate))
            name = LOG_Z_NAMES[log_z] + (f", rate {rate:g}" if rate is not None else "")
            lines.append([f"{samples}", name, *(f"{mean(map(level, part)):.4f}" for part in of.values())])
    header = ["K", "log Z'", *(f"α = {alpha:g}" for alpha in by_alpha(rows))]
    return (
        "## log Z' of LA-TB, from samples\n\nTotal variation to the target, mean over the second half of the training, "
        "the seeds and the prompts.\n\n" + table(header, lines)
    )
