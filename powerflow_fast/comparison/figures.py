"""Pictures of a comparison, as SVG: pass@k, quality against diversity and against cost, curves over training."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import DataError
from ..report.history_plot import running_mean
from .content import DIVERSITY, QUALITY, MeasureRow, Run, costs, first_measured

# Colours of the page by role: on light and on dark paper. A picture is drawn with the first ones.
THEME = {
    "paper": ("#fefefe", "#15181c"),
    "text": ("#222222", "#e6e6e6"),
    "faint": ("#6a6a6a", "#a2a8b0"),
    "grid": ("#e3e3e3", "#30363d"),
    "series-0": ("#1f6fb4", "#5aa9e6"),
    "series-1": ("#d9730d", "#f2994a"),
    "series-2": ("#2b8a5a", "#5cc28f"),
    "series-3": ("#8a4fbf", "#b98ae6"),
    "series-4": ("#c23b4f", "#ef7a8a"),
    "series-5": ("#0f8b9d", "#4cc3d4"),
    "series-6": ("#8c6239", "#c79a6b"),
    "series-7": ("#5f6b7a", "#a3adba"),
}
COLORS = 8
_MARKERS = "osD^vPX*"
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))

# Columns of history.jsonl that are drawn where they were recorded: title, unit.
_CURVES = {
    "length": ("Completion length", "tokens"),
    "entropy": ("Token entropy", "nats"),
    "repetition": ("Repetition", "share of 4-grams"),
    "delta_abs": ("Residual", "mean |δ|, nats/token"),
    "base_logp": ("Log-prob of the samples under the base", "nats/token"),
    "policy_logp": ("Log-prob of the samples under the policy", "nats/token"),
    "log_z": ("Log-partition", "mean log Z′"),
    "reward": ("Reward", "mean"),
    "finished": ("Finished", "share"),
    "format_ok": ("Format kept", "share"),
}


@dataclass(frozen=True)
class Picture:
    """A drawing as a complete SVG file on white paper; :meth:`inline` is the form for a page with its own colours."""

    name: str
    title: str
    caption: str
    svg: str

    def inline(self) -> str:
        """The ``<svg>`` element: colours by the page's variables, ids unlike those of other pictures, no fixed size."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r'\b(id="|url\(#|href="#)', rf"\g<1>{self.name}-", svg)
        for role, (light, _) in THEME.items():
            svg = svg.replace(light, f"var(--{role})")
        head, rest = svg.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)
        return f'{head} role="img" aria-labelledby="{self.name}-caption">{rest}'


def draw_pictures(
    runs: Sequence[Run], rows: Sequence[MeasureRow], histories: Mapping[str, Sequence[Mapping[str, Any]]]
) -> tuple[list[Picture], list[str]]:
    """What can be drawn, and a sentence for each picture that cannot be."""
    drawn: list[Picture] = []
    notes: list[str] = []
    for made in (_pass_at_k(runs), _plane(runs, rows), _cost(runs, rows), *_history(runs, histories)):
        if isinstance(made, Picture):
            drawn.append(made)
        elif made:
            notes.append(made)
    return drawn, notes


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` characters, its middle left out."""
    if len(text) <= width:
        return text
    tail = (width - 1) // 3
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"


def _pass_at_k(runs: Sequence[Run]) -> Picture | str:
    curves = {i: sorted(run.pass_at_k) for i, run in enumerate(runs) if run.pass_at_k}
    if not curves:
        return "No pass@k plot: no evaluation has pass@k, which needs a scorer."
    ks = sorted({k for own in curves.values() for k in own})
    with _figure() as (figure, axes):
        handles = {}
        for i, own in curves.items():
            points = [runs[i].pass_at_k[k] for k in own]
            low, high = [[getattr(p, end) for p in points] for end in ("low", "high")]
            style, dashes = _style(i)
            band = 0.14 if len(curves) <= 4 else 0.06
            axes.fill_between(own, low, high, color=style["color"], alpha=band, linewidth=0)
            values = [p.value for p in points]
            if len(own) == 1:
                axes.errorbar(own, values, _bars(points), color=style["color"], capsize=3, linestyle="none")
            (handles[i],) = axes.plot(own, values, **style, linestyle=dashes, markersize=5)
        axes.set_xscale("log", base=2)
        ticks = [k for k in ks if k & (k - 1) == 0 or k == ks[-1]] if len(ks) > 8 else ks
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -0.02), min(high, 1.02))
        _label(axes, "k, completions drawn", "pass@k")
        _legend(figure, handles, {i: runs[i].label for i in handles})
        svg = _svg(figure, "pass@k")
    percent = f"{100 * runs[0].confidence:g} %"
    caption = f"Chance that one of k completions is right; bands are {percent} bootstrap intervals over prompts."
    if len({tuple(own) for own in curves.values()}) > 1:
        caption += " The curves end at different k."
    absent = [run.label for i, run in enumerate(runs) if i not in curves]
    if absent:
        caption += f" Without pass@k: {', '.join(absent)}."
    return Picture("pass-at-k", "pass@k", caption, svg)


def _plane(runs: Sequence[Run], rows: Sequence[MeasureRow]) -> Picture | str:
    y, x = first_measured(rows, QUALITY), first_measured(rows, DIVERSITY)
    if y is None or x is None:
        what = " and ".join(
            text for text, row in (("accuracy or quality", y), ("a measure of diversity", x)) if row is None
        )
        return f"No plane of quality and diversity: fewer than two evaluations have {what}."
    points = {
        i: (x.cells[i].value, y.cells[i].value)
        for i in range(len(runs))
        if x.cells[i].value is not None and y.cells[i].value is not None
    }
    with _figure() as (figure, axes):
        handles = {}
        for i, (across, up) in points.items():
            handles[i] = _point(axes, i, across.value, up.value, _bars([up]), _bars([across]))
        label = x.info.label
        if x.key == "self_bleu":
            axes.invert_xaxis()
            label += " (reversed: diverse is right)"
        axes.margins(0.15)
        _label(axes, label, y.info.label)
        _legend(figure, handles, {i: runs[i].label for i in handles})
        svg = _svg(figure, "Quality and diversity")
    axis = [f"{row.info.label}: {row.info.meaning}" for row in (y, x)]
    caption = f"Up is better, right is more diverse; bars are intervals over prompts. {'; '.join(axis)}."
    return Picture("plane", "Quality and diversity", caption, svg)


def _cost(runs: Sequence[Run], rows: Sequence[MeasureRow]) -> Picture | None:
    y, rates = first_measured(rows, QUALITY), [cost.per_completion for cost in costs(runs)]
    if y is None:
        return None
    points = {i: rate for i, rate in enumerate(rates) if rate and y.cells[i].value is not None}
    if len(points) < 2:
        return None
    with _figure() as (figure, axes):
        handles = {}
        for i, rate in points.items():
            value = y.cells[i].value
            handles[i] = _point(axes, i, rate, value.value, _bars([value]))
        axes.margins(0.15)
        axes.set_xlim(0, 1.15 * max(points.values()))
        wide = max(points.values()) > 4 * min(points.values())
        if wide:
            from matplotlib.ticker import LogLocator, StrMethodFormatter

            axes.set_xscale("log")
            axes.set_xlim(min(points.values()) / 1.5, 1.5 * max(points.values()))
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
            axes.minorticks_off()
        _label(axes, "tokens generated per completion" + (" (log)" if wide else ""), y.info.label)
        _legend(figure, handles, {i: runs[i].label for i in handles})
        svg = _svg(figure, "Quality and cost")
    caption = "Up and left is better: tokens that the model had to generate for one completion, rejected ones too."
    return Picture("cost", "Quality and cost", caption, svg)


def _history(runs: Sequence[Run], histories: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Picture | str]:
    """A picture for each column that any history recorded; a history has the colour of the evaluation of its name."""
    if not histories:
        return []
    places = {run.label: i for i, run in enumerate(runs)}
    free = iter(range(len(runs), len(runs) + len(histories)))
    styles = {name: places[name] if name in places else next(free) for name in histories}
    own = sorted({key for rows in histories.values() for row in rows for key in row if key.startswith("eval/")})
    pictures: list[Picture | str] = []
    for key, (title, unit) in {**_CURVES, **{key: (key, "") for key in own}}.items():
        series = {name: _points(name, rows, key) for name, rows in histories.items()}
        series = {name: points for name, points in series.items() if points}
        if not series:
            continue
        with _figure(small=True) as (figure, axes):
            handles = {}
            for name, points in series.items():
                i, (steps, values) = styles[name], zip(*points, strict=True)
                style, dashes = _style(i)
                style |= {} if len(points) == 1 or key in own else {"marker": None}
                smooth = running_mean(values, max(1, len(values) // 12)) if key not in own else values
                axes.plot(steps, values, color=style["color"], linewidth=0.9, alpha=0.3)
                (handles[i],) = axes.plot(steps, smooth, **style, linestyle=dashes, markersize=4)
            if key == "length":
                axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
            axes.ticklabel_format(axis="y", useOffset=False)
            _label(axes, "optimizer step", unit)
            _legend(figure, handles, {styles[name]: name for name in series}, width=48)
            name = "history-" + re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-")
            svg = _svg(figure, title)
        caption = (
            "Thin: every recorded step; thick: running mean." if key not in own else "As the run evaluated itself."
        )
        pictures.append(Picture(name, title, caption, svg))
    return pictures or ["No training curves: the histories have none of the known columns."]


def _points(name: str, rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None and "step" in row]
    for step, value in points:
        if not isinstance(step, (int, float)) or not isinstance(value, (int, float)):
            raise DataError(
                f"write_comparison: history {name!r}: 'step' and {key!r} must be numbers, got {step!r} and {value!r}"
            )
    return [(step, float(value)) for step, value in points]


def _style(i: int) -> tuple[dict[str, Any], Any]:
    """Colour and marker of series ``i``, and its line; a second round of colours has hollow markers and dashes."""
    color, paper = THEME[f"series-{i % COLORS}"][0], THEME["paper"][0]
    face = color if i < COLORS else paper
    marker = {"color": color, "marker": _MARKERS[i % len(_MARKERS)], "markerfacecolor": face}
    return marker, _DASHES[i // COLORS % len(_DASHES)]


def _bars(points: Sequence[Any]) -> list[list[float]] | None:
    """Distances to both ends of the intervals, None where there are none."""
    if any(math.isnan(p.low) or math.isnan(p.high) for p in points):
        return None
    return [[max(p.value - p.low, 0) for p in points], [max(p.high - p.value, 0) for p in points]]


def _point(axes: Any, i: int, x: float, y: float, y_bars: Any, x_bars: Any = None) -> Any:
    style, _ = _style(i)
    bars = {"color": style["color"], "elinewidth": 1.1, "capsize": 2.5, "linestyle": "none"}
    axes.errorbar([x], [y], y_bars, x_bars, **bars)
    return axes.plot([x], [y], **style, linestyle="none", markersize=7)[0]


@contextmanager
def _figure(*, small: bool = False) -> Iterator[tuple[Any, Any]]:
    """A figure with one pair of axes. matplotlib's global settings are as before afterwards."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Names are shown as they are (no $maths$), text stays text, and ids in the file don't change from run to run.
    own = {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "comparison", "font.size": 10}
    with matplotlib.rc_context(own):
        paper, text, faint, grid = (THEME[role][0] for role in ("paper", "text", "faint", "grid"))
        figure = Figure(figsize=(4.7, 3.2) if small else (6.2, 4.1), facecolor=paper, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot(facecolor=paper)
        axes.grid(True, color=grid, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9.5, colors=faint, length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(grid)
        axes.xaxis.label.set_color(text)
        axes.yaxis.label.set_color(text)
        yield figure, axes


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def _legend(figure: Any, handles: Mapping[int, Any], labels: Mapping[int, str], *, width: int = 64) -> None:
    """Below the axes, in as many columns as fit, the figure made higher by its rows."""
    shown = [shorten(labels[i], width - 8 if len(handles) < 4 else width // 2 - 6) for i in handles]
    columns = max(1, min(len(shown), width // (max(map(len, shown)) + 6)))
    rows = math.ceil(len(shown) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    # matplotlib leaves out labels that begin with an underscore
    shown = [f"\u200b{label}" if label.startswith("_") else label for label in shown]
    options = {"frameon": False, "fontsize": 9.5, "labelcolor": THEME["text"][0], "loc": "outside lower center"}
    figure.legend(list(handles.values()), shown, ncols=columns, **options)


def _svg(figure: Any, title: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return file.getvalue()
