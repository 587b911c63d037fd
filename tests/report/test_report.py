from __future__ import annotations

import io
import json
import math

import pytest

from powerflow_fast.report.metrics import METRICS
from powerflow_fast.report.model_card import write_model_card
from powerflow_fast.report.samples_page import Sample, format_samples, write_samples
from powerflow_fast.tools import progress
from powerflow_fast.tools.json_lines import HistoryWriter, read_history
from powerflow_fast.tools.progress import ProgressLine
from powerflow_fast.tools.tables import format_table


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Pipe(io.StringIO):
    encoding = "ascii"


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


ROW = {"loss": 0.41234, "delta_abs": 0.5, "log_z": -1.25, "length": 38.24, "tokens_per_second": 91.4}


def test_progress_on_a_terminal_is_one_rewritten_line(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = Terminal()
    with ProgressLine(60, stream=out) as progress:
        for step in (1, 2):
            clock[0] += 10
            progress.update({"step": step, **ROW})
        progress.note("saved checkpoint-2")
    text = out.getvalue()
    expected = "step  2/60 | loss 0.4123 | |δ| 0.500 | log Z -1.250 | length 38.2 | 91 tok/s | ETA 9m40s"
    assert expected.replace("91 tok/s", "tok/s 91") in text
    assert text.count("\n") == 2 and "saved checkpoint-2\n" in text and text.endswith("\n")
    # After the note the live line is back.
    assert text.split("saved checkpoint-2\n")[1].startswith("step  2/60")


def test_progress_fits_a_narrow_terminal(clock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out = Terminal()
    ProgressLine(60, stream=out).update({"step": 1, **ROW})
    line = out.getvalue().split("\x1b[2K")[1]
    assert len(line) == 29 and line.endswith("...")


def test_progress_in_a_log_does_not_flood(clock):
    out = Pipe()
    with ProgressLine(1000, stream=out) as progress:
        for step in range(1, 1001):
            clock[0] += 0.5
            progress.update({"step": step, **ROW})
        progress.note("done")
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step    1/1000") and lines[-2].startswith("step 1000/1000") and lines[-1] == "done"
    assert 20 <= len(lines) <= 25
    assert "|delta| 0.500" in lines[0] and "\x1b" not in out.getvalue()
    assert lines[-2].endswith("8m20s") and "ETA" not in lines[-2]

    out = Pipe()
    progress = ProgressLine(10**6, stream=out)
    for step in range(1, 201):
        clock[0] += 1
        progress.update({"step": step})
    assert len(out.getvalue().splitlines()) == 4  # at least one a minute


def test_progress_of_a_resumed_run_counts_its_own_steps(clock):
    out = Pipe()
    progress = ProgressLine(100, first=90, stream=out)
    clock[0] += 20
    progress.update({"step": 95, "loss": None})
    assert out.getvalue() == "step  95/100 | ETA 20s\n"


def test_history_round_trip(tmp_path):
    path = tmp_path / "history.jsonl"
    with HistoryWriter(path) as writer:
        writer.write({"step": 1, "loss": 0.1 + 0.2, "log_z": math.nan, "x": math.inf})
        assert read_history(path) == [{"step": 1, "loss": 0.1 + 0.2, "log_z": None, "x": None}]
        writer.write({"step": 2, "loss": 1.0})
    HistoryWriter(path).close()
    assert read_history(path) == []


def test_history_drops_steps_that_will_be_done_again(tmp_path):
    path = tmp_path / "history.jsonl"
    with HistoryWriter(path) as writer:
        for step in range(1, 8):
            writer.write({"step": step})
    with open(path, "a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    with HistoryWriter(path, resume_step=4) as writer:
        writer.write({"step": 5, "again": True})
    rows = read_history(path)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5] and rows[-1]["again"]
    HistoryWriter(tmp_path / "new.jsonl", resume_step=4).close()
    path.write_text('{"step"\n{"step": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        read_history(path)


def test_format_table():
    table = format_table([["entropy [nats]", 2.80123, 1.9], ["length", 38, 40.25]], ["", "before", "after"])
    assert table.splitlines() == [
        "                before  after",
        "--------------  ------  -----",
        "entropy [nats]   2.801    1.9",
        "length              38  40.25",
    ]
    assert format_table([], ["a"]).splitlines() == ["a", "-"]


BEFORE = [Sample("What is 2 + 2?", "It is | four\n\n`code` <b> and then a longer line that wraps"), Sample("q", "")]
AFTER = [Sample("What is 2 + 2?", "4\x1b[31m"), Sample("q", "x")]


def test_format_samples():
    lines = format_samples(BEFORE, AFTER, width=43).splitlines()
    assert lines[0] == "> What is 2 + 2?"
    assert lines[2] == f"{'before':20} | after"
    assert lines[4] == f"{'It is | four':20} | 4\\x1b[31m", "control characters must not reach the terminal"
    assert all(len(line) <= 43 for line in lines)
    assert "> q" in lines


def test_write_samples(tmp_path):
    write_samples(tmp_path / "samples.md", BEFORE, AFTER)
    lines = (tmp_path / "samples.md").read_text().splitlines()
    row = next(line for line in lines if "four" in line)
    assert row.startswith(r"| It is \| four<br><br>\`code\` &lt;b&gt; and then")
    assert row.replace(r"\|", "").count("|") == 3
    assert "| (empty) | x |" in lines and lines.count("| before | after |") == 2
    with pytest.raises(ValueError, match="same prompts"):
        write_samples(tmp_path / "samples.md", BEFORE, AFTER[::-1])


def card(tmp_path, **options):
    given = {
        "alpha": 4.0,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "data_description": "p.jsonl (5 prompts)",
        "config": {"alpha": 4.0, "seed": 0, "output_dir": "private/run"},
        "commit": "0123abc",
        "metrics": [("distinct", 2.80123, 1.9), ("delta_abs", 1, 0.5)],
        **options,
    }
    return write_model_card(tmp_path, **given)


def test_model_card(tmp_path):
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(card(tmp_path))
    data = loaded.data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "powerflow" in data["tags"]
    for words in ("α = 4", "sharpened", "p.jsonl (5 prompts)", "commit `0123abc`", "| distinct | 2.801 | 1.9 |"):
        assert words in loaded.text
    assert r"| mean \|delta\|, nats/token | 1 | 0.5 |" in loaded.text
    assert json.loads(loaded.text.split("```json\n")[1].split("```")[0]) == {"alpha": 4.0, "seed": 0}


def test_model_card_of_a_local_model_does_not_show_its_path(tmp_path):
    from huggingface_hub import ModelCard

    (tmp_path / "private" / "my-model").mkdir(parents=True)
    path = card(tmp_path, base_model=str(tmp_path / "private" / "my-model"), alpha=0.5, commit=None, metrics=[])
    loaded = ModelCard.load(path)
    assert "base_model" not in loaded.data.to_dict()
    assert "`my-model`" in loaded.text and "private" not in path.read_text() and "flattened" in loaded.text


def history(steps):
    return [{"step": s, **{name: 1.0 / s for name in METRICS if name != "step"}} for s in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (history(40), {"alpha": 4, "max_completion_length": 32, "title": "t"}),
        (history(1), {"alpha": 0.5}),
        ([{"step": 3, "loss": None}, {"step": 4, "loss": 2}], {}),
        ([], {}),
    ],
)
def test_plot(tmp_path, rows, options):
    import matplotlib
    from PIL import Image

    from powerflow_fast.report.history_plot import plot_history

    def settings():  # read raw: rcParams["backend"] would itself choose a backend
        return {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}

    before = settings()
    path = plot_history(rows, tmp_path / "plot.png", **options)
    assert settings() == before
    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 1200 and len(image.convert("L").getcolors()) > 20


def test_plot_draws_what_was_recorded(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    from powerflow_fast.report.history_plot import plot_history

    drawn, texts = [], []
    plot, text = Axes.plot, Axes.text
    monkeypatch.setattr(Axes, "plot", lambda self, x, y, **k: drawn.append((x, list(y))) or plot(self, x, y, **k))
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: texts.append(s) or text(self, x, y, s, **k))
    rows = [{"step": s, "loss": v, "policy_logp": -v} for s, v in ((1, 3.0), (2, 0.0), (3, 6.0))]
    plot_history(rows, tmp_path / "plot.png", alpha=0.5)
    assert drawn == [
        ((1, 2, 3), [3.0, 0.0, 6.0]),
        ((1, 2, 3), [1.5, 3.0, 3.0]),
        ((1, 2, 3), [-3.0, -0.0, -6.0]),
        ((1, 2, 3), [-1.5, -3.0, -3.0]),
    ]
    assert texts.count("not recorded") == 4
    assert "α < 1: look for a rise" in texts and "α < 1: look for a fall" in texts
