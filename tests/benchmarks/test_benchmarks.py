"""The benchmark suite: its rows say what happened, its documents match them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "run.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import measure  # noqa: E402
import operations  # noqa: E402
import plots  # noqa: E402
import render  # noqa: E402
import results  # noqa: E402
import run  # noqa: E402
from cases.head import HeadCase  # noqa: E402
from peers import head as head_peers  # noqa: E402

CPU = torch.device("cpu")
RESULTS = BENCHMARKS / "results"


def test_interleave_is_fair_and_loses_nobody():
    calls: list[str] = []
    seen = []

    def quick():
        calls.append("quick")
        return (torch.zeros(1),)

    def broken():
        calls.append("broken")
        raise ValueError("no such thing\nsecond line")

    timings = measure.interleave(
        {"quick": quick, "broken": broken, "other": lambda: calls.append("other") or ()},
        measure.Clock(CPU),
        warmup=1,
        min_reps=4,
        max_reps=4,
        budget_s=0,
        slow_s=9,
        on_output=lambda name, turn, outputs: seen.append((name, turn)),
    )
    assert timings["broken"].error == "ValueError: no such thing" and calls.count("broken") == 1
    assert len(timings["quick"].ms) == len(timings["other"].ms) == 4 and calls.count("quick") == 5
    assert all({"quick", "other"} <= set(calls[i : i + 3]) for i in (3, 5, 7))  # everyone in each round
    assert {("quick", 0), ("quick", 1), ("other", 0), ("other", 1)} == set(seen)


def test_a_slow_call_is_timed_once():
    import time

    timings = measure.interleave(
        {"slow": lambda: time.sleep(0.02) or (), "quick": tuple},
        measure.Clock(CPU),
        warmup=0,
        min_reps=3,
        max_reps=3,
        budget_s=0,
        slow_s=0.01,
        on_output=lambda *_: None,
    )
    assert len(timings["slow"].ms) == 1 and timings["slow"].ms[0] >= 20 and len(timings["quick"].ms) == 3


def test_quantiles_and_fingerprints():
    assert [measure.quantile([4.0, 1.0, 2.0, 3.0], q) for q in (0, 0.5, 1)] == [1.0, 2.5, 4.0]
    x = torch.randn(1000)
    y = x.clone()
    assert measure.fingerprint((x,)) == measure.fingerprint((y,))
    y[3], y[900] = x[900], x[3]
    assert measure.fingerprint((x,)) != measure.fingerprint((y,))
    assert measure.fingerprint((x.bfloat16(),)) != measure.fingerprint((x.half(),))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_what_is_freed_again():
    def call():
        torch.ones(96 << 20, dtype=torch.int8)
        return torch.ones(40 << 20, dtype=torch.int8)

    assert measure.rss_peak_mib(call) == pytest.approx(96, abs=2)
    assert measure.rss_peak_mib(lambda: None) < 1


def test_errors_keep_no_paths():
    described = measure.describe(OSError("cannot open '/some/where/libx.so' now\n/some/where"))
    assert described == "OSError: cannot open <path> now"


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """The rows of a run from end to end, on a tiny shape."""
    out = tmp_path_factory.mktemp("results")
    names = ["powerflow_fast", "naive", "F.linear_cross_entropy", "verl triton", "gemm"]
    common = ["--rehearse", "--skip-tests", "--min-reps", "2", "--max-reps", "2", "--out", str(out), "--limit", "1"]
    assert run.main(["cpu", *common, "--device", "cpu", "--providers", *names]) == 0
    return out


def test_rows_say_everything(rehearsal):
    rows = {row["provider"]: row for row in map(json.loads, (rehearsal / "cpu.jsonl").read_text().splitlines())}
    assert rows["verl triton"]["status"] == "error" and rows["verl triton"]["error"]
    for name in ("powerflow_fast", "naive"):
        row = rows[name]
        assert row["status"] == "ok" and row["repeatable"] is True and row["reps"] == 2
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["peak_extra_mib"] is not None, row["peak_error"]
        assert row["logp_max_err"] < 1e-4 and row["d_hidden_rel_err"] < 1e-4
        assert row["tests"] == "skipped" and row["rehearsal"] is True
        assert {"commit", "dirty", "device", "threads", "torch", "triton", "cuda", "driver", "load_1min"} <= set(row)
    n, v, h = (rows["naive"][key] for key in "nvh")
    assert rows["naive"]["useful_flop"] == rows["naive"]["executed_flop"] == 4 * n * v * h
    assert rows["powerflow_fast"]["backend"] == "torch" and rows["powerflow_fast"]["sources"]
    assert "peak_extra_mib" not in rows["gemm"] and rows["gemm"]["ms_p50"] > 0
    rate = rows["gemm"]["useful_flop"] / rows["gemm"]["ms_p50"] / 1e9
    assert [row["floor_tflops"] for row in rows.values()] == pytest.approx([rate] * len(rows), rel=1e-3)


def test_the_fastest_floor_gives_the_rate(tmp_path):
    """Suites with a floor have its rate in every row of the case, that of a provider that failed included."""
    names = ["powerflow_fast composed", "verl triton", "gemm", "gemm fp32"]
    common = ["--rehearse", "--skip-tests", "--min-reps", "2", "--max-reps", "2", "--out", str(tmp_path)]
    assert run.main(["cpu-loss", "la-tb", *common, "--device", "cpu", "--providers", *names]) == 0
    cases = results.by_case(map(json.loads, (tmp_path / "cpu-loss.jsonl").read_text().splitlines()))
    assert any({"verl triton", "gemm", "gemm fp32"} <= set(case) for case in cases)
    for case in cases:
        floors = [row["useful_flop"] / row["ms_p50"] / 1e9 for row in case.values() if row["kind"] == "floor"]
        assert [row["floor_tflops"] for row in case.values()] == pytest.approx([max(floors)] * len(case), rel=1e-3)
    assert "floor_tflops" not in (tmp_path / "la-tb.jsonl").read_text()


def test_rows_tell_the_generation_of_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "CPUINFO", tmp_path / "cpuinfo")
    info = "processor : 0\ncpu family : 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\nprocessor : 1\nmodel : 3\n"
    measure.CPUINFO.write_text(info)
    row = measure.environment(CPU) | {"device_type": "cpu"}
    assert (row["device"], row["cpu"], row["cpu_family"], row["cpu_model"]) == ("AMD EPYC", "AMD EPYC", 26, 2)
    assert results.device_of(row) == "AMD EPYC (family 26, model 2)"
    assert results.device_of(row | {"device": "NVIDIA H100", "device_type": "cuda"}) == "NVIDIA H100"
    measure.CPUINFO.write_text("processor : 0\nCPU part : 0xd40\n")
    row = measure.environment(CPU) | {"device_type": "cpu"}
    assert row["device"] and row["cpu_family"] is row["cpu_model"] is None and results.device_of(row) == row["device"]
    before = {key: value for key, value in row.items() if key not in ("cpu_family", "cpu_model")}
    assert results.device_of(before) == row["device"]


def test_red_tests_stop_the_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_red.py").write_text("def test_red():\n    assert False\n")
    tests = operations.OPERATIONS["linear_logprobs"].tests
    monkeypatch.setitem(tests, "cpu", [[str(tmp_path / "test_red.py")]])
    monkeypatch.setitem(operations.OPERATIONS["la_tb_loss"].tests, "cpu", [["--collect-only", str(tmp_path)]])
    options = ["--rehearse", "--limit", "1", "--max-reps", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert run.main(["cpu", "la-tb", *options]) == 2
    assert "tests of cpu fail; nothing was measured" in capsys.readouterr().err
    assert not (tmp_path / "cpu.jsonl").exists() and (tmp_path / "la-tb.jsonl").exists(), "the other op's tests pass"


def test_a_wrong_result_of_ours_is_not_a_figure(tmp_path, monkeypatch):
    monkeypatch.setattr(
        head_peers,
        "linear_logprobs",
        lambda hidden, weight, labels, **_: head_peers.naive(hidden, weight, labels) + 0.1,
    )
    options = [
        "cpu",
        "--rehearse",
        "--skip-tests",
        "--limit",
        "1",
        "--min-reps",
        "2",
        "--max-reps",
        "2",
        "--device",
        "cpu",
    ]
    assert run.main([*options, "--providers", "powerflow_fast", "--out", str(tmp_path)]) == 1
    row = json.loads((tmp_path / "cpu.jsonl").read_text())
    assert row["status"] == "wrong" and "logp_max_err=1.0e-01" in row["error"]


@pytest.fixture
def published(rehearsal, tmp_path):
    """A results folder and a README as if the rehearsal had been a measurement."""
    rows = [json.loads(line) | {"rehearsal": False} for line in (rehearsal / "cpu.jsonl").read_text().splitlines()]
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "cpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    readme, page = tmp_path / "README.md", tmp_path / "page.md"
    for document in (readme, page):
        document.write_text(f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n")
    return ["--results", str(tmp_path / "results"), "--readme", str(readme), "--page", str(page)], readme


def test_render_round_trip(published):
    arguments, readme = published
    assert render.main([*arguments, "--check"]) == 1
    assert render.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "\nold\n" not in text
    assert "| CPU, frozen head | 16 × 2379 × 128 | fp32 |" in text and "F.linear_cross_entropy: " in text
    rows = {row["provider"]: row for row in results.load(Path(arguments[1]))}
    times = rows["powerflow_fast"]["ms_p50"] / rows["gemm"]["ms_p50"]
    (line,) = (line for line in text.splitlines() if "frozen head | 16" in line)
    assert float(line.split("|")[-2]) == pytest.approx(times, rel=1e-2, abs=1e-2)
    assert f"(family {rows['naive']['cpu_family']}, " in text or rows["naive"]["cpu_family"] is None
    assert render.main([*arguments, "--check"]) == 0
    readme.write_text(text.replace("MiB", "KiB", 1))
    assert render.main([*arguments, "--check"]) == 1
    tables = (Path(arguments[1]) / "TABLES.md").read_text()
    assert "verl triton: error, " in tables and "| gemm |" in tables and "| **powerflow_fast** |" in tables
    assert "d_hidden error" in tables and "d_weight error" not in tables  # nobody has one with a frozen head


def test_figures_of_older_sources_are_marked(published):
    arguments, readme = published
    render.main(arguments)
    assert render.STALE not in readme.read_text()
    file = Path(arguments[1]) / "cpu.jsonl"
    digest = measure.source_digest("linear_logprobs", "torch")
    file.write_text(file.read_text().replace(digest, "0" * 12))
    render.main(arguments)
    text = readme.read_text()
    assert text.count(render.STALE) == 2 and f"{render.STALE} measured before the last change" in text
    assert f"**powerflow_fast**{render.STALE}" in (Path(arguments[1]) / "TABLES.md").read_text()


def test_a_changed_source_changes_the_digest(tmp_path):
    package = tmp_path / "powerflow_fast"
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    shutil.copytree(ROOT / "powerflow_fast", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for backend in ("torch", "triton"):
        same = measure.source_digest("linear_logprobs", backend, package=package)
        assert same == measure.source_digest("linear_logprobs", backend)
    (package / "ops" / "torch_backend.py").write_text("# changed")
    (tmp_path / "kernels" / "launch.py").write_text("# changed")
    for backend in ("torch", "triton"):
        same = measure.source_digest("linear_logprobs", backend, package=package)
        assert same != measure.source_digest("linear_logprobs", backend)


KERNEL = '''"""A kernel and its launcher."""

from __future__ import annotations

import triton
from .tiles import BLOCK

__all__ = ["double"]
ROWS = 128  # a tile's


@triton.jit
def _double_kernel(p_x, N: tl.constexpr):
    """Twice."""
    tl.store(p_x, 2.0 * tl.load(p_x))


def double(x, *, name=None):
    from .launch import grid

    _double_kernel[grid(x, ROWS)](x)
    return f"{name!r}: {x.shape[0]:>8}"
'''
LAUNCHER = KERNEL.index("def double")


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """The digest of a package with the given files, all of which are behind the figure unless entries name others."""

    def digest_of(files: dict[str, str], *entries: str) -> str:
        monkeypatch.setattr(measure, "ROOT", tmp_path)
        for name, text in files.items():
            folder = tmp_path / ("csrc" if name.endswith(".cpp") else "powerflow_fast")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        listed = [f"{'csrc' if name.endswith('.cpp') else 'package'}/{name}" for name in files]
        monkeypatch.setitem(measure.SOURCES, ("op", "torch"), entries or tuple(listed))
        return measure.source_digest("op", "torch", package=tmp_path / "powerflow_fast")

    return digest_of


@pytest.mark.parametrize(
    "files",
    [
        {"other.py": KERNEL},
        {"ops/launch.py": KERNEL[LAUNCHER:], "kernel.py": KERNEL[:LAUNCHER]},
        {"one.py": KERNEL.replace("  # a tile's", "").replace('"""Twice."""', '"""Two times x."""')},
        {"one.py": KERNEL.replace(".launch", "..room.grids").replace("import triton", "import triton\nimport os")},
        {"one.py": KERNEL.replace("__all__", "if TYPE_CHECKING:\n    from torch import Tensor\n__all__")},
        {"one.py": KERNEL.replace('["double"]', "[]"), "two.py": 'ROWS = 128\n"""Rows of a tile."""\n'},
        {"one.py": KERNEL.replace("(p_x, N: tl.constexpr)", "(\n    p_x,\n    N: tl.constexpr,\n)")},
    ],
    ids=["renamed", "split", "docs", "imports", "types", "duplicate", "layout"],
)
def test_a_move_of_code_keeps_the_digest(digest, files):
    assert digest(files) == digest({"one.py": KERNEL})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("128", "64"),
        ("2.0", "2"),
        ("@triton.jit", "@triton.jit(debug=True)"),
        ("@triton.jit", "@triton.autotune\n@triton.jit"),
        ("N: tl.constexpr", "N"),
        ("*, name=None", "*, name"),
        ("(x, ROWS)", "(ROWS, x)"),
        (">8", ">9"),
        ("    _double_kernel[grid(x, ROWS)](x)\n", ""),
    ],
)
def test_a_change_of_code_changes_the_digest(digest, old, new):
    assert KERNEL.count(old) == 1
    assert digest({"one.py": KERNEL.replace(old, new)}) != digest({"one.py": KERNEL})


def test_some_definitions_of_a_file(digest):
    """What an operation uses may lie beside what it doesn't."""
    alone = digest({"one.py": "A: int = 1\ndef f(): return A\nregister(f)"})
    beside = "from x import y\ndef g(): return {}\ndef f(): return A\nA: int = {}\nregister(f)"
    assert digest({"two.py": beside.format(2, 1)}, "package/two.py:f,A") == alone
    assert digest({"two.py": beside.format(3, 1)}, "package/two.py:A,f") == alone
    assert digest({"two.py": beside.format(2, 2)}, "package/two.py:A,f") != alone
    with pytest.raises(ValueError, match=r"package/two\.py does not define h"):
        digest({"two.py": beside}, "package/two.py:f,h")


def test_the_digest_of_c_code(digest):
    code = '#include "a.h"\n// doubles\nvoid f(float* x) {\n  *x *= 2;  /* in\n place */\n  say("// %f", *x);\n}\n'
    same = '#include "b.h"\n\nvoid f(float* x) { *x *= 2;\n say("// %f", *x); }'
    assert digest({"a.cpp": code}) == digest({"b.cpp": same})
    assert digest({"a.cpp": code}) != digest({"a.cpp": code.replace("2", "3")})
    assert digest({"a.cpp": code}) != digest({"a.cpp": code.replace("// %f", "// %g")})


def test_the_digest_is_that_of_any_python(digest):
    """The committed rows are read by all versions, whose syntax trees differ in details."""
    code = KERNEL + "class C(list):\n    x: int = -1\n    y = {**{}, 1: None}[...]\n"
    assert digest({"one.py": code}) == "089e50be4a9d"


def test_rehearsals_are_never_published(rehearsal, published):
    arguments, _ = published
    with pytest.raises(SystemExit, match="no measurements"):
        render.main(["--results", str(rehearsal), *arguments[2:]])


def row_of(case, provider: str, kind: str, ms: float, **more) -> dict:
    row = {"suite": "cpu-n", "device": "x", "device_type": "cpu", "op": case.op, "mode": case.mode, "torch": "2"}
    fields = {**dataclasses.asdict(case), "provider": provider, "kind": kind, "status": "ok", "ms_p50": ms}
    return {**row, **fields, "useful_flop": case.useful_flop(), "peak_extra_mib": ms / 2, **more}


@pytest.fixture
def sweep():
    """Two providers and the floor at two lengths, and what doesn't belong to the sweep."""
    cases = [HeadCase(n, 49152, 576, "fp32") for n in (512, 64)]
    who = (("powerflow_fast", "ours", 1.0), ("naive", "baseline", 2.0), ("gemm", "floor", 0.9))
    rows = [row_of(case, name, kind, case.n * k) for case in cases for name, kind, k in who]
    for row in rows:
        if row["kind"] == "floor":
            del row["peak_extra_mib"]
    other = [HeadCase(128, 49152, 576, "fp32", mode="full"), HeadCase(128, 49152, 576, "fp32", mask_ratio=0.5)]
    rows += [row_of(case, "naive", "baseline", 1.0) for case in (*other, HeadCase(128, 49152, 64, "fp32"))]
    return [*rows, rows[0] | {"provider": "trl chunked", "kind": "peer", "status": "error", "error": "x"}]


def test_plots_show_what_the_rows_hold(sweep, tmp_path):
    plot = next(p for p in plots.PLOTS if p.file == "cpu-time-vs-n")
    series = plots.series_of(plot, plots.cases_of(plot, sweep))
    assert list(series) == ["naive", "powerflow_fast", "gemm"]  # as the lines end, the slowest first
    assert series["naive"] == [(64, 128.0), (512, 1024.0)]
    memory = next(p for p in plots.PLOTS if p.file == "cpu-memory-vs-n")
    assert "gemm" not in plots.series_of(memory, plots.cases_of(memory, sweep))
    rate = next(p for p in plots.PLOTS if p.file == "cpu-rate-vs-n")
    (_, useful), _ = plots.series_of(rate, plots.cases_of(rate, sweep))["gemm"]
    assert useful == pytest.approx(4 * 64 * 49152 * 576 / (0.9 * 64 * 1e-3))
    assert not plots.cases_of(plot, sweep[:3])  # one length is no sweep
    first, second = tmp_path / "a" / "p.svg", tmp_path / "b" / "p.svg"
    for path in (first, second):
        path.parent.mkdir()
        assert plots.draw(plot, sweep, path)
    assert first.read_bytes() == second.read_bytes() and b"powerflow_fast" in first.read_bytes()


def test_every_provider_has_a_look_of_its_own():
    names = [p.name for p in head_peers.HEAD_PROVIDERS if p.kind in ("peer", "baseline")]
    looks = {(plots.style(name)["color"], plots.style(name)["marker"]) for name in names}
    assert len(looks) == len(names)


def test_plots_with_dots_have_a_line_per_case(sweep, tmp_path):
    plot = plots.Plot("cpu-rate", "rate", ("cpu-n",), None)
    assert len(plots.cases_of(plot, sweep)) == 4
    assert plots.draw(plot, sweep, tmp_path / "dots.svg")
    text = (tmp_path / "dots.svg").read_text()
    assert text.count("512 × 49,152 × 576") == 1 and text.count("bare products") == 1


def test_defeats_are_listed(sweep):
    assert "Nowhere" in render.defeats(sweep)
    lost = [row | {"ms_p50": row["ms_p50"] / 4} if row["provider"] == "naive" else row for row in sweep]
    text = render.defeats(lost)
    assert "| naive: 256 ms, ours 512 ms |  |" in text and text.count("\n| cpu-n |") == 2
    smaller = [row | {"peak_extra_mib": 0.5} if row["provider"] == "naive" else row for row in sweep]
    assert "|  | naive: 0.5 MiB, ours 256 MiB |" in render.defeats(smaller)
    both = [row | {"provider": "trl chunked", "kind": "peer"} for row in lost if row["provider"] == "naive"]
    assert "ours 512 ms, 1 more |" in render.defeats(lost + both)


def test_products_give_a_ratio_by_their_rate_or_by_their_row(sweep):
    own, naive, bare = sweep[:3]
    case = {row["provider"]: row for row in (own, naive, bare)}
    assert results.over_floor(naive, case) == pytest.approx(2 / 0.9)
    alone = {"naive": naive}
    assert results.over_floor(naive, alone) is None and render.floor_ratio(naive, alone) == ""
    naive["floor_tflops"] = naive["useful_flop"] / (naive["ms_p50"] / 4) / 1e9
    assert render.floor_ratio(naive, alone) == render.floor_ratio(naive, case) == "4.00"


def test_images_in_the_tables_exist(tmp_path, sweep):
    """A plot is in the text if and only if it was drawn."""
    environment = dict.fromkeys(("date", "python", "triton", "cuda", "driver", "cpu_capability", "release"), "x")
    environment |= {"load_1min": 1.0, "tests": "passed", "commit": "abc", "dirty": False, "threads": 2, "reps": 3}
    environment |= {"rehearsal": False, "ms_p20": 1.0, "ms_p80": 1.0, "executed_flop": None}
    (tmp_path / "cpu-n.jsonl").write_text("".join(json.dumps(row | environment) + "\n" for row in sweep))
    document = tmp_path / "README.md"
    document.write_text(f"{render.BEGIN}\n{render.END}\n")
    assert render.main(["--results", str(tmp_path), "--readme", str(document), "--page", str(document)]) == 0
    named = set(re.findall(r"\]\((\S+)\.svg\)", (tmp_path / "TABLES.md").read_text()))
    assert named == {path.stem for path in tmp_path.glob("*.svg")}
    assert named == {f"cpu-{quantity}-vs-n" for quantity in ("time", "memory", "rate")}
    assert "(results/cpu-memory-vs-n.svg)" in document.read_text()


def test_readme_shows_the_committed_rows():
    """README.md and results/TABLES.md are what render.py makes of results/*.jsonl and of the sources as they are."""
    assert render.main(["--check"]) == 0, "run: python benchmarks/render.py"


def test_committed_rows_are_publishable():
    rows = render.load(RESULTS)
    assert all(row["tests"] == "passed" for row in rows), "rows were measured with --skip-tests"
    text = "".join(path.read_text() for path in sorted(RESULTS.glob("*.jsonl")))
    assert '"wrong"' not in text and "/work/" not in text and "/home/" not in text and "/tmp/" not in text
