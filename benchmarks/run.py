"""Runs the benchmark suites: ``python benchmarks/run.py [suite ...]``; one JSONL row per measurement.

Without arguments: on a CPU the suites cpu and la-tb, on a GPU gpu and la-tb. The tests of what is measured run first,
and nothing is measured when they fail. ``benchmarks/README.md`` says what the columns mean; ``render.py`` makes the
tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))
if importlib.util.find_spec("powerflow_fast") is None:
    sys.path.insert(1, str(ROOT))  # a checkout needs no installation; an installed package comes first

import measure  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402
from cases.head import DTYPES  # noqa: E402
from operations import OPERATIONS, Case, Operation  # noqa: E402
from providers import Provider  # noqa: E402
from suites import SUITES  # noqa: E402

from powerflow_fast.ops.backends import resolve_backend  # noqa: E402


def tests_pass(arguments: list[str], device: torch.device) -> bool:
    """One run of pytest in a process of its own: on a CPU they use Triton's interpreter, which must be off here."""
    arguments = ["-q", "-p", "no:cacheprovider", "--no-header", *arguments]
    if device.type == "cpu":
        arguments.append("-x")
    elif importlib.util.find_spec("xdist"):  # most of their time goes into compiling kernels
        arguments += ["-n", str(min(8, os.cpu_count() or 1))]
    # not `python -m pytest`: that puts kernels/ in front of a package of the same name
    code = f"import sys; sys.path.pop(0); import pytest; sys.exit(pytest.main({arguments!r}))"
    print("tests:", *arguments[4:], flush=True)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
    print((done.stdout.strip().splitlines() or ["no output"])[-1], flush=True)
    return done.returncode == 0


def tested_ops(ops: set[str], device: torch.device) -> set[str]:
    """The operations whose tests pass; what several of them need is run once."""
    passed: dict[tuple[str, ...], bool] = {}
    for op in sorted(ops):
        for arguments in OPERATIONS[op].tests[device.type]:
            if tuple(arguments) not in passed:
                passed[tuple(arguments)] = tests_pass(arguments, device)
    return {op for op in ops if all(passed[tuple(arguments)] for arguments in OPERATIONS[op].tests[device.type])}


def reported_ops(ops: set[str], device: torch.device, report: Path) -> set[str]:
    """The operations whose test files ``report``, a JUnit file of a run on this device, has passed: all that it has of
    a file, and something."""
    good: dict[str, bool] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        module = case.get("classname", "")
        if outcomes & {"failure", "error"}:
            good[module] = False
        elif "skipped" not in outcomes:
            good.setdefault(module, True)
    files = {op: [file for run in OPERATIONS[op].tests[device.type] for file in run] for op in ops}
    modules = {op: [file.removesuffix(".py").replace("/", ".") for file in files[op]] for op in ops}
    return {op for op in ops if all(good.get(module, False) for module in modules[op])}


def warm_step(provider: Provider, case: Case, inputs, device: torch.device):
    """The step of a provider, with its code loaded and its threads started; a GPU warms up in whole rounds besides."""
    make = OPERATIONS[case.op].step
    step = make(provider, case, inputs)
    if device.type == "cpu" or OPERATIONS[case.op].whole_model:
        (step if provider.warm_whole else make(provider, case, inputs.first(8)))()
    return step


def warm_rounds(operation: Operation, device: torch.device) -> int:
    """Whole rounds that don't count. Seconds of a whole model are not spent three times over: see `warm_step`."""
    if operation.short:
        return 3
    return 0 if device.type == "cpu" else 1 if operation.whole_model else 3


def probe_memory(case: Case, names: list[str]) -> None:
    """Runs in a process of its own: prints MiB that one step takes on top of its inputs, for each provider.

    Every provider gets a fresh process too, forked once the inputs are there. Until then there is one thread, since a
    fork copies no others.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    inputs = OPERATIONS[case.op].inputs(case, device)
    providers = {p.name: p for p in OPERATIONS[case.op].providers(device, case.dtype)}
    for name in names:
        sys.stdout.flush()
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            torch.set_num_threads(threads)
            step = warm_step(providers[name], case, inputs, device)
            result: dict = {"peak_extra_mib": round(measure.rss_peak_mib(step), 2)}
        except Exception as error:
            result = {"peak_extra_mib": None, "peak_error": measure.describe(error)}
        print(json.dumps({"provider": name, **result}), flush=True)
        os._exit(0)


def cpu_peak_memory(case: Case, names: list[str], options: argparse.Namespace) -> dict[str, dict]:
    """Fields of each provider's row."""
    job = json.dumps({"case": [case.op, dataclasses.asdict(case)], "providers": names})
    command = [sys.executable, str(HERE / "run.py"), "--probe", job]
    command += ["--peers", str(options.peers)] if options.peers else []
    done = subprocess.run(command, capture_output=True, text=True)
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"provider"'):
            row = json.loads(line)
            found[row.pop("provider")] = row
    reason = (done.stderr.strip().splitlines() or ["the process ended without a result"])[-1][:200]
    missing = {"peak_extra_mib": None, "peak_error": reason}
    return {name: found.get(name, missing) | {"peak_method": "VmHWM of one process"} for name in names}


def backend_of(provider: Provider, case: Case, device: torch.device) -> str | None:
    if provider.backend in (None, "compiled"):
        return provider.backend
    return resolve_backend(provider.backend, device, DTYPES[case.dtype])


def identity(provider: Provider, case: Case, device: torch.device) -> dict:
    """Who and what: everything in a row that is known before it is measured."""
    row = {"op": case.op, "provider": provider.name, "kind": provider.kind, "mode": case.mode}
    row |= {**dataclasses.asdict(case), "n": case.n, "dtype": case.dtype, "device_type": device.type}
    row["l2"] = case.l2 if device.type == "cuda" else None
    try:
        row["release"] = importlib.metadata.version(provider.distribution)
    except importlib.metadata.PackageNotFoundError:
        row["release"] = None
    row["useful_flop"] = case.useful_flop()
    row["executed_flop"] = case.executed_flop(provider.passes_of(case, device))
    return row


def outside_limits(row: dict, naive: dict) -> list[str]:
    """What is wrong with a result of ours; ``naive`` is that provider's row, with errors if it ran."""
    if row["kind"] != "ours":
        return []
    operation = OPERATIONS[row["op"]]
    wrong = []
    for key, limit in operation.limits.items():
        limit += 2 * naive.get(key, 0.0) if operation.whole_model else 0.0
        if key in row and not row[key] <= limit:
            wrong.append(f"{key}={row[key]:.1e}")
    if row.get("repeatable") is False and not operation.whole_model:
        wrong.append("bits differ from run to run")
    return wrong


def measure_case(case: Case, options: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row per provider."""
    operation = OPERATIONS[case.op]
    inputs = operation.inputs(case, device)
    exact = operation.reference(inputs)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    providers = operation.providers(device, case.dtype)
    providers = [p for p in providers if p.name in (options.providers or [p.name]) and p.name not in options.without]
    rows: dict[str, dict] = {p.name: identity(p, case, device) for p in providers}
    calls = {}
    for provider in providers:
        row = rows[provider.name]
        try:
            calls[provider.name] = warm_step(provider, case, inputs, device)
            row["backend"] = backend_of(provider, case, device)
            if row["backend"]:
                row["sources"] = measure.source_digest(case.op, row["backend"])
        except Exception as error:
            row |= {"status": "error", "error": measure.describe(error)}
    bits: dict[str, tuple] = {}

    def on_output(name: str, turn: int, outputs: tuple) -> None:
        row = rows[name]
        if not outputs:
            return
        if turn:
            row["repeatable"] = measure.fingerprint(outputs) == bits.pop(name)
            return
        bits[name] = measure.fingerprint(outputs)
        row |= operation.errors(outputs, inputs, exact)

    timings = measure.interleave(
        calls,
        measure.Clock(device, cold=case.l2 == "cold"),
        warmup=warm_rounds(operation, device),
        min_reps=options.min_reps,
        max_reps=options.max_reps,
        budget_s=options.budget,
        slow_s=options.slow,
        on_output=on_output,
    )
    for name, timing in timings.items():
        row = rows[name]
        if timing.error:
            row |= {"status": "error", "error": timing.error}
            continue
        row |= {"status": "ok", **timing.summary()}
        if wrong := outside_limits(row, rows.get("naive", {})):
            row |= {"status": "wrong", "error": "; ".join(wrong)}
    if bare := results.floor(rows):
        tflops = bare["useful_flop"] / bare["ms_p50"] / 1e9
        for row in rows.values():
            row["floor_tflops"] = float(f"{tflops:.4g}")
    own_memory, measured = {p.name: p.own_memory for p in providers}, []
    for name, row in rows.items():
        if row["status"] == "error" or row["kind"] == "floor":
            continue
        if device.type == "cpu" and row["ms_p50"] > options.slow * 1e3:
            row |= {"peak_extra_mib": None, "peak_error": "a step this slow is run once, for its time"}
        elif not own_memory[name]:
            row |= {"peak_extra_mib": None, "peak_error": "its memory is another process's"}
        else:
            measured.append(name)
    if device.type == "cuda":
        for name in measured:
            peak = round(measure.cuda_peak_mib(calls[name], device), 2)
            rows[name] |= {"peak_extra_mib": peak, "peak_method": "allocator of torch.cuda"}
    elif measured:
        for name, fields in cpu_peak_memory(case, measured, options).items():
            rows[name] |= fields
    return list(rows.values())


def show(rows: list[dict]) -> None:
    for row in sorted(rows, key=lambda row: row.get("ms_p50", float("inf"))):
        if row["status"] == "ok":
            memory = row.get("peak_extra_mib")
            error = row.get("sum_err", row.get("loss_rel_err"))
            parts = [f"{row['ms_p50']:>10.2f} ms x{row['reps']}", "" if memory is None else f"{memory:>9.1f} MiB"]
            parts += ["" if error is None else f"err {error:.1e}", "" if row.get("repeatable", True) else "bits vary"]
            parts += [f"first {row['ms_first'] / 1e3:.1f} s"] if row["ms_first"] > max(1e3, 3 * row["ms_p50"]) else []
            print(f"  {row['provider']:<32}", *parts)
        else:
            print(f"  {row['provider']:<32} {row['status']}: {row['error'][:110]}")
    sys.stdout.flush()


def run_suite(name: str, options: argparse.Namespace, device: torch.device, tests: str) -> bool:
    """Writes ``<out>/<suite>.jsonl``; False if a result of ours was wrong."""
    cases = SUITES[name][options.skip :][: options.limit]
    if options.rehearse:
        cases = [case.tiny() for case in cases]
    environment = {"suite": name, **measure.environment(device), "tests": tests, "rehearsal": options.rehearse}
    if options.commit:
        environment["commit"] = options.commit
    right = True
    deadline = time.monotonic() + options.time_limit
    with open(options.out / f"{name}.jsonl", "a" if options.skip else "w", encoding="utf-8") as file:
        for case in cases:
            if time.monotonic() > deadline:
                print(f"{name}: time limit reached before {case.title()}", flush=True)
                reason = {"status": "skipped", "error": "time limit of the suite reached before this case"}
                providers = OPERATIONS[case.op].providers(device, case.dtype)
                rows = [identity(p, case, device) | reason for p in providers]
            else:
                print(f"{name}: {case.title()}", flush=True)
                rows = measure_case(case, options, device)
                show(rows)
            for row in rows:
                right &= row["status"] != "wrong"
                file.write(json.dumps({**row, **environment}) + "\n")
            file.flush()
            if device.type == "cuda":
                try:
                    torch.cuda.empty_cache()
                    torch.cuda.synchronize(device)
                except RuntimeError as error:  # an illegal access by any kernel ends the process's CUDA context
                    print(f"{name}: stopped, {measure.describe(error)}; --without leaves a provider out", flush=True)
                    return False
    return right


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSONL files")
    parser.add_argument("--peers", type=Path, help="folder with peers installed by pip install --no-deps --target")
    parser.add_argument("--providers", nargs="+", help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="leave these out")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, help="seconds for the rounds of a case (default: 40 on a CPU, 8)")
    parser.add_argument("--min-reps", type=int, default=3, help="repetitions whatever the budget (default 3)")
    parser.add_argument("--max-reps", type=int, default=50)
    parser.add_argument("--slow", type=float, default=20.0, help="a step of more seconds is timed once (default 20)")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), help="start no case of a suite after so many seconds"
    )
    parser.add_argument("--commit", help="of a copy that has no .git")
    parser.add_argument("--skip-tests", action="store_true", help="for development; every row says so")
    parser.add_argument(
        "--tests-report",
        type=Path,
        help="JUnit file of a run of the tests, instead of running them: rows of an op that failed say so",
    )
    parser.add_argument("--skip", type=int, default=0, help="not the first so many cases; the rows are added to those")
    parser.add_argument("--limit", type=int, help="only the first so many cases of each suite")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes: tries the machinery, measures nothing")
    parser.add_argument("--probe", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    unknown = [name for name in options.suites if name not in SUITES]
    if unknown:
        parser.error(f"no such suite: {', '.join(unknown)} (of {', '.join(SUITES)})")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.peers:
        sys.path.append(str(options.peers.resolve()))  # last: it must not replace what is installed
    if options.probe:
        job = json.loads(options.probe)
        op, fields = job["case"]
        probe_memory(OPERATIONS[op].case(**fields), job["providers"])
        return 0
    device = torch.device(options.device)
    if options.budget is None:
        options.budget = 40.0 if device.type == "cpu" else 8.0
    suites = options.suites or ["cpu" if device.type == "cpu" else "gpu", "la-tb"]
    options.out.mkdir(parents=True, exist_ok=True)
    ops = {SUITES[name][0].op for name in suites}
    verdicts = dict.fromkeys(ops, "skipped")
    if options.tests_report:  # of a machine that is had for minutes: what it measures is kept, and not published
        passed = reported_ops(ops, device, options.tests_report)
        verdicts = {op: "passed" if op in passed else "failed" for op in ops}
    elif not options.skip_tests:
        verdicts = dict.fromkeys(tested_ops(ops, device), "passed")
    tested = set(verdicts)
    right = True
    for name in suites:
        if SUITES[name][0].op in tested:
            right &= run_suite(name, options, device, verdicts[SUITES[name][0].op])
        else:
            print(f"run.py: the tests of {name} fail; nothing was measured", file=sys.stderr)
    return 2 if tested != ops else 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
