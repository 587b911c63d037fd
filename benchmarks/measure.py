"""How it is measured: the machine and the code behind a figure, time, peak memory, bits.

CPU times are wall clock, GPU times lie between two CUDA events after a synchronisation. Peak memory is what a step
needs on top of its inputs, results included: on a GPU the allocator's own peak, on a CPU the rise of the resident set's
high-water mark in a process that runs that one step.
"""

from __future__ import annotations

import ast
import contextlib
import ctypes
import datetime
import functools
import gc
import hashlib
import importlib.metadata
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import powerflow_fast

ROOT = Path(__file__).resolve().parents[1]
CPUINFO = Path("/proc/cpuinfo")
Outputs = tuple[Tensor, ...]

# The code whose change makes a figure of ours out of date, by (op, backend). Figures of others depend on a release.
# "file" is all of a file, "file:name,name" these definitions of it and what runs at its import. Code that moves changes
# this table, not the digests.
_TYPES = ("kernels/interface.py",)
_HEAD = ("package/ops/logprobs.py", "package/ops/logprobs_autograd.py", *_TYPES)
_HEAD_TORCH = (*_HEAD, "package/ops/torch_backend.py", "package/ops/torch_products.py", "csrc/head_cpu.cpp")
_HEAD_TRITON = (
    *_HEAD,
    "kernels/launch.py",
    "kernels/tiles.py",
    "kernels/hopper_choice.py",
    "kernels/linear_logprob_fwd.py",
    "kernels/linear_logprob_exps.py",
    "kernels/linear_logprob_bwd.py",
    "kernels/hopper_pipeline.py",
    "kernels/hopper_tiles.py",
    "kernels/active_tiles.py",
)
_LOSS_FUNCTIONS = "LATBOutput,la_tb_loss,la_tb,check_la_tb,_la_tb_torch,_warned,_has_kernel,_check_tensors"
_LOSS_FUNCTIONS += ",_LATBFunction,_setup_context,_save,_backward"
_LOSS = (
    "csrc/la_tb.h",
    "csrc/la_tb_tensors.h",
    "csrc/la_tb_cpu.cpp",
    "csrc/la_tb_cuda.cu",
    f"package/ops/la_tb.py:{_LOSS_FUNCTIONS}",
    "package/ops/checks.py:check_clip,ImportanceLevel",
)
_ONE_PASS = ("package/ops/linear_la_tb.py", "package/ops/segments.py:segment_sum,check_cu_seqlens")
_UPDATE_MODULES = ("training/update", "training/policy", "training/samples", "objectives/log_z")
_UPDATE_MODULES += ("models/logprob_model", "models/head", "models/modes", "models/batches", "models/packed_attention")
_UPDATE_MODULES += ("models/adapters",)
_UPDATE_MODULES += ("objectives/trajectories", "objectives/trajectory_balance", "objectives/residual_losses")
_UPDATE = (
    "package/ops/segments.py",
    "package/ops/la_tb.py:group_log_z",
    *(f"package/{name}.py" for name in _UPDATE_MODULES),
)
SOURCES = {
    ("linear_logprobs", "torch"): _HEAD_TORCH,
    ("linear_logprobs", "triton"): _HEAD_TRITON,
    ("linear_la_tb_loss", "torch"): _HEAD_TORCH + _LOSS + _ONE_PASS,
    ("linear_la_tb_loss", "triton"): _HEAD_TRITON + _LOSS + _ONE_PASS + ("kernels/scale.py",),
    ("la_tb_loss", "compiled"): _LOSS,
    ("rollout", "torch"): (
        "package/rollout/engine.py",
        "package/rollout/generate.py",
        "package/rollout/continuous.py",
        "package/rollout/vllm.py",
        "package/tools/random_state.py:seeded",
    ),
    ("update", "torch"): _HEAD_TORCH + _LOSS + _UPDATE,
    ("update", "triton"): _HEAD_TRITON + _LOSS + _UPDATE,
}


class _Computing(ast.NodeTransformer):
    """Leaves out what computes nothing: docstrings, imports, ``__all__``, and an ``if`` with nothing else in it."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        return None if defined_names(node) == {"__all__"} else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str) else node

    def visit_If(self, node: ast.If) -> ast.AST | None:
        node = self.generic_visit(node)
        return node if node.body or node.orelse else None


def defined_names(statement: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _canonical(node: object) -> str:
    """A syntax tree as text. `ast.dump` differs between versions of Python, by the empty fields that it shows."""
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = (f"{name}={_canonical(value)}" for name, value in ast.iter_fields(node) if value not in (None, []))
    return f"{type(node).__name__}({','.join(fields)})"


@functools.cache
def python_definitions(text: str) -> tuple[tuple[frozenset[str], str], ...]:
    """(names, canonical text) of each top-level statement that computes something."""
    statements = _Computing().visit(ast.parse(text)).body
    return tuple((frozenset(defined_names(statement)), _canonical(statement)) for statement in statements)


_C_LITERAL_OR_COMMENT = re.compile(
    r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/""",
    re.DOTALL,
)


@functools.cache
def c_code(text: str) -> str:
    """C++ or CUDA without comments, includes and white space."""
    text = _C_LITERAL_OR_COMMENT.sub(lambda match: match[1] or " ", text)
    return "".join("".join(line.split()) for line in text.splitlines() if not line.lstrip().startswith("#include"))


def source_digest(op: str, backend: str, *, package: Path | None = None) -> str:
    """Hash of the definitions that a figure rests on: those of ``package``, by default of the one that is imported.

    It is the hash of a set. The files that hold the definitions, their order, imports, comments and docstrings don't
    count, so that code can be moved and explained without a new measurement. A C++ source counts as one definition.
    """
    package = package or Path(powerflow_fast.__file__).resolve().parent
    kernels = package / "kernels" if (package / "kernels").is_dir() else package.parent / "kernels"
    roots = {"package": package, "kernels": kernels, "csrc": ROOT / "csrc"}
    code: set[str] = set()
    for entry in SOURCES[op, backend]:
        place, _, listed = entry.partition(":")
        folder, _, file = place.partition("/")
        text = (roots[folder] / file).read_text(encoding="utf-8")
        if not file.endswith(".py"):
            code.add(c_code(text))
            continue
        definitions = python_definitions(text)
        wanted = set(listed.split(",")) if listed else set()
        if missing := wanted.difference(*(names for names, _ in definitions)):
            raise ValueError(f"source_digest: {place} does not define {', '.join(sorted(missing))}")
        code |= {canonical for names, canonical in definitions if not (wanted and names) or names & wanted}
    return hashlib.sha256("\0".join(sorted(code)).encode()).hexdigest()[:12]


def _say(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, str]:
    """What Linux says of the first processor; elsewhere nothing."""
    try:
        lines = CPUINFO.read_text().split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdecimal() else None


def environment(device: torch.device) -> dict[str, object]:
    """What a reader needs to judge a figure or to repeat it; part of every row."""
    # the results that this very run writes don't count
    changed = _say("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    cpu = _cpu()
    name = cpu.get("model name") or platform.processor() or platform.machine()
    env: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": _say("git", "rev-parse", "HEAD"),
        "dirty": None if changed is None else bool(changed),
        "device": name if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu": name,
        "cpu_family": _number(cpu.get("cpu family")),  # the name of some is that of several generations
        "cpu_model": _number(cpu.get("model")),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": None,
    }
    if device.type == "cuda":
        query = _say("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
        env["driver"] = query.splitlines()[0] if query else None
    return env


class Clock:
    """Times one call in milliseconds. ``cold`` overwrites the GPU's L2 cache before each; a CPU has no such switch."""

    def __init__(self, device: torch.device, *, cold: bool = True):
        self.device = device
        self._flush: Tensor | None = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            if cold:
                size = torch.cuda.get_device_properties(device).L2_cache_size
                self._flush = torch.empty(4 * size, dtype=torch.int8, device=device)

    def __call__(self, call: Callable[[], Outputs]) -> tuple[float, Outputs]:
        if self.device.type == "cpu":
            start = time.perf_counter()
            outputs = call()
            return (time.perf_counter() - start) * 1e3, outputs
        if self._flush is not None:
            self._flush.zero_()
        torch.cuda.synchronize(self.device)
        self._events[0].record()
        outputs = call()
        self._events[1].record()
        torch.cuda.synchronize(self.device)
        return self._events[0].elapsed_time(self._events[1]), outputs


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the sorted values."""
    values = sorted(values)
    place = q * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


class Timing:
    """Times of one provider, or the error that stopped it."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.first_ms: float | None = None  # of the first round: compilation and autotuning, where they weren't before
        self.error: str | None = None

    def summary(self) -> dict[str, float | int]:
        named = {f"ms_p{p}": round(quantile(self.ms, p / 100), 4) for p in (20, 50, 80)}
        return {**named, "ms_first": round(self.first_ms, 1), "reps": len(self.ms)}


def describe(error: BaseException) -> str:
    """One line without paths of this machine, for the row of a provider that cannot run."""
    text = str(error).strip().splitlines()
    line = text[0] if text else ""
    words = [word if not word.strip("'\"(),").startswith("/") else "<path>" for word in line.split()]
    return f"{type(error).__name__}: {' '.join(words)}"[:300].rstrip(": ")


def interleave(
    calls: dict[str, Callable[[], Outputs]],
    clock: Clock,
    *,
    warmup: int,
    min_reps: int,
    max_reps: int,
    budget_s: float,
    slow_s: float,
    on_output: Callable[[str, int, Outputs], None],
) -> dict[str, Timing]:
    """Time every call once per round, in a new random order each round, so that a machine that slows down slows all.

    Rounds go on until the budget is used (``min_reps`` at least) or ``max_reps`` are done; the first ``warmup`` don't
    count. A call that takes more than ``slow_s`` is left out after its first counted repetition. ``on_output`` gets the
    results of the first two rounds, outside of the timed region. A call that raises leaves with its error.
    """
    timings = {name: Timing() for name in calls}
    order, shuffle = list(calls), random.Random(0)
    begin = time.perf_counter()
    for turn in range(warmup + max_reps):
        round_begin = time.perf_counter()
        shuffle.shuffle(order)
        for name in list(order):
            timing = timings[name]
            try:
                ms, outputs = clock(calls[name])
                if turn == 0:
                    timing.first_ms = ms
                if turn < 2:
                    on_output(name, turn, outputs)
            except Exception as error:
                timing.error = describe(error)
                order.remove(name)
                continue
            finally:
                outputs = None
            if turn >= warmup:
                timing.ms.append(ms)
                if ms > slow_s * 1e3:
                    order.remove(name)
        now = time.perf_counter()
        if turn + 1 >= warmup + min_reps and now - begin + (now - round_begin) > budget_s:
            break
    return timings


def fingerprint(outputs: Outputs) -> tuple[int, ...]:
    """A number per tensor: the integers behind its values, each weighted by an odd number of its own, mod 2^64.

    A change of one element always shows, several would have to cancel.
    """
    result = []
    for tensor in outputs:
        ints = {4: torch.int32, 2: torch.int16, 8: torch.int64}[tensor.element_size()]
        flat = tensor.detach().contiguous().view(-1).view(ints)
        total = 0
        for start in range(0, flat.numel(), 1 << 24):
            piece = flat[start : start + (1 << 24)].long()
            weights = torch.arange(start, start + piece.numel(), device=piece.device) * 2 + 1
            total += int((piece * weights).sum())
        result.append(total % (1 << 64))
    return tuple(result)


def _status_kib(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def rss_peak_mib(call: Callable[[], object]) -> float:
    """MiB by which the resident set's peak during ``call`` exceeds its size before. OSError where Linux isn't."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)  # else blocks that the heap kept could serve the call unseen
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to the present size
    before = _status_kib("VmRSS")
    result = call()
    peak = _status_kib("VmHWM")
    del result
    return max(0, peak - before) / 1024


def cuda_peak_mib(call: Callable[[], object], device: torch.device) -> float:
    """MiB by which the caching allocator's peak during ``call`` exceeds what was allocated before."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return (peak - before) / 2**20
