"""The picture of a run: six panels over optimizer steps, each with what to look for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_BLUE, _ORANGE, _GRID, _TEXT, _FAINT = "#1f6fb4", "#d9730d", "#e4e4e4", "#222222", "#6b6b6b"


def plot_history(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    alpha: float | None = None,
    max_completion_length: int | None = None,
    title: str | None = None,
    objective: str = "la_tb",
) -> Path:
    """Draw the rows of ``history.jsonl`` (names as in ``report.METRICS``) to a PNG.

    Thin lines are the steps, thick ones their running mean. A quantity that was not recorded says so in its panel.
    matplotlib's global state (backend, rcParams, current figure) is left alone.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    sharpens = None if alpha is None or alpha == 1 else alpha > 1
    moves = {None: "its direction depends on α", True: "α > 1: look for a fall", False: "α < 1: look for a rise"}[
        sharpens
    ]
    rise = {None: "their direction depends on α", True: "α > 1: look for a rise", False: "α < 1: look for a fall"}[
        sharpens
    ]
    panels = [
        ("Loss", "look for a fall", "mean w·δ²  [(nats/token)²]", [("loss", None)]),
        ("Residual", "look for a fall: 0 is the target distribution", "mean |δ|  [nats/token]", [("delta_abs", None)]),
        ("log Z′", "look for it to settle", "mean log Z′  [nats/token]", [("log_z", None)]),
        (
            "Log-probability of the samples",
            rise,
            "mean log p / length  [nats/token]",
            [("policy_logp", "policy"), ("base_logp", "base model")],
        ),
        ("Entropy", moves, "next-token entropy  [nats]", [("entropy", None)]),
        (
            "Completion length",
            "a slide to 0 or to the limit is a collapse",
            "mean length  [tokens]",
            [("length", None)],
        ),
    ]
    if objective != "la_tb":
        panels[0] = ("Loss", f"of the objective {objective}", "loss", [("loss", None)])
        panels[2] = ("log Z", "look for it to settle", "mean log Z", [("log_z", None)])
    recorded = {name for row in history for name, value in row.items() if value is not None}
    if "reward" in recorded:
        spare = next((i for i, name in ((1, "delta_abs"), (2, "log_z")) if name not in recorded), 1)
        panels[spare] = ("Reward", "look for a rise", "mean reward", [("reward", None)])
    figure = Figure(figsize=(13, 7.2), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    if title is None:
        title = "Training run" + (f", α = {alpha:g}" if alpha is not None else "")
    figure.suptitle(title, fontsize=15, color=_TEXT, fontweight="bold")
    figure.supxlabel("thin: every recorded step; thick: running mean", fontsize=9, color=_FAINT)
    for axes, (name, look, unit, series) in zip(figure.subplots(2, 3).flat, panels, strict=True):
        axes.set_title(name, loc="left", fontsize=12, color=_TEXT, fontweight="bold", pad=20)
        axes.text(0, 1.025, look, transform=axes.transAxes, fontsize=9.5, color=_FAINT)
        axes.set_xlabel("optimizer step", fontsize=9.5, color=_FAINT)
        axes.set_ylabel(unit, fontsize=9.5, color=_FAINT)
        drawn = False
        for (key, label), color in zip(series, (_BLUE, _ORANGE), strict=False):
            points = [(row["step"], row[key]) for row in history if row.get(key) is not None]
            if not points:
                continue
            drawn = True
            steps, values = zip(*points, strict=True)
            smooth = running_mean(values, max(1, len(values) // 12))
            axes.plot(steps, values, color=color, linewidth=0.9, alpha=0.35)
            axes.plot(steps, smooth, color=color, linewidth=2, label=label, marker="o" if len(points) == 1 else None)
        if not drawn:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=_FAINT)
            axes.set_xticks([])
            axes.set_yticks([])
        elif name == "Completion length":
            if max_completion_length is not None:
                axes.axhline(max_completion_length, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
                where = {"xy": (0.99, max_completion_length), "xycoords": ("axes fraction", "data"), "ha": "right"}
                axes.annotate("limit", **where, xytext=(0, 3), textcoords="offset points", fontsize=9, color=_FAINT)
            axes.set_ylim(0, 1.12 * axes.get_ylim()[1])
        if drawn:
            if len(history) == 1:
                axes.set_xticks([history[0]["step"]])
            else:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            axes.ticklabel_format(axis="y", useOffset=False)
        if len(series) > 1 and drawn:
            axes.legend(frameon=False, fontsize=9.5)
        axes.grid(True, color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9, colors=_FAINT, length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#bbbbbb")
    path = Path(path)
    figure.savefig(path)
    return path


def running_mean(values: Sequence[float], half: int) -> list[float]:
    """Mean of each value with up to ``half`` neighbours on either side."""
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
