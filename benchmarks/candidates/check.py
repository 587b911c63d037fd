"""Checks candidate tile kernels against those of the library and times both, on an sm_90 GPU:

    python benchmarks/candidates/check.py [--variants NAME ...] [--groups 8 32] [--seed 1] [--out FOLDER]

Each variant must give the library's numbers, leave alone what it must, and repeat its bits, at awkward shapes and at
the one that is timed; only then is it timed. The table comes last, rows go to ``FOLDER/tile-kernels.jsonl``. A kernel
that does not come back within seconds is named, left out, and the others go on in a new process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import gluon_sm90
import persistent
import torch
import triton

import powerflow_fast  # noqa: F401  (mounts the kernels)
from powerflow_fast.kernels import launch, linear_logprob_fwd

GROUP = 16
PRE = 0.9
MARK = 7.0  # what outputs hold before a launch
HUNG = 3  # exit code
SHAPES = ((151936, 1536), (128256, 4096), (49152, 576))
VARIANTS = {**{name: persistent for name in persistent.PLANS}, **{name: gluon_sm90 for name in gluon_sm90.PLANS}}
START = time.time()


def say(text: str) -> None:
    print(f"[{time.time() - START:5.1f} s] {text}", flush=True)


def finish(what: str, limit: float = 5.0) -> None:
    """Waits for the device; ends the process where that takes too long (a deadlock can't be cancelled)."""
    event = torch.cuda.Event()
    event.record()
    start = time.time()
    while not event.query():
        if time.time() - start > limit:
            say(f"HANG in {what}")
            os._exit(HUNG)
        time.sleep(0.001)


def worse(a: float, b: float) -> float:
    """The larger one, or the one that is no number."""
    return a if b <= a or a != a else b


class Case:
    """Inputs of one shape, and launches of the library's kernels and of the candidates."""

    def __init__(self, n: int, v: int, h: int, idle: float):
        self.n, self.v, self.h = n, v, h
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        h_stride, self.width = -(-h // 8) * 8, -(-v // 16) * 16
        self.x = torch.randn(n, h_stride, device="cuda").bfloat16()[:, :h]
        self.w = (torch.randn(v, h_stride, device="cuda") * (4 / h**0.5)).bfloat16()[:, :h]
        self.labels = torch.randint(v, (n,), device="cuda")
        self.active = torch.ones(n, dtype=torch.int32, device="cuda")
        if idle:
            self.active[torch.rand(n, device="cuda") < idle] = 0
            self.active[256:384] = 0  # one row tile is skipped, another one has no inactive row
            self.active[:128] = 1
        self.labels[self.active == 0] = -100
        label = self.labels.clamp(min=0)
        own = zip(self.x.split(1024), label.split(1024), strict=True)
        self.anchor = torch.cat([(a.float() * self.w[b].float()).sum(1) for a, b in own]).mul_(PRE)
        self.tile = launch.choose_tile(self.x, heavy=False)
        self.on = self.active.bool()

    def outputs(self, block_v: int, exps: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        partial = torch.full((2, triton.cdiv(self.v, block_v), self.n), MARK, device="cuda")
        return partial, torch.full((self.n, self.width), MARK, dtype=torch.bfloat16, device="cuda") if exps else None

    def library(self, partial: torch.Tensor, exps: torch.Tensor | None) -> None:
        operands = [launch.operand(t, r, self.tile) for t, r in ((self.x, 128), (self.w, self.tile.block_v))]
        grid = (triton.cdiv(self.n, 128) * partial.shape[1],)
        strides = self.x.stride(0), self.w.stride(0)
        flags = {"HAS_BIAS": False, "HAS_SOFTCAP": False, **self.tile.meta()}
        if exps is None:
            linear_logprob_fwd._rest_tile_kernel[grid](
                *operands, None, self.labels, self.active, partial,
                self.n, self.v, self.h, partial.stride(0), *strides, PRE, 1.0, STATS=False, **flags,
            )  # fmt: skip
        else:
            linear_logprob_fwd._exp_tile_kernel[grid](
                *operands, None, self.labels, self.active, self.anchor, exps, partial,
                self.n, self.v, self.h, partial.stride(0), *strides, exps.stride(0), PRE, 1.0, **flags,
            )  # fmt: skip

    def candidate(self, variant: str, partial: torch.Tensor, exps: torch.Tensor | None, group: int = GROUP) -> None:
        module, options = VARIANTS[variant], {"num_sms": self.num_sms, "group": group, "variant": variant}
        inputs = self.x, self.w, self.labels, self.active
        if exps is None:
            module.rest_tiles(*inputs, partial, PRE, **options)
        else:
            module.exp_tiles(*inputs, self.anchor, exps, partial, PRE, **options)

    def compare(self, expected: tuple, got: tuple) -> tuple[float, float, float, bool]:
        """(max error of a row's maximum, of log-sums, of E relative to itself, untouched where it must be)"""
        (p0, e0), (p1, e1) = expected, got
        fine, logs = True, []
        for p in (p0, p1):
            m, s = p[0][:, self.on], p[1][:, self.on]
            fine &= not bool((m == MARK).any() | (s == MARK).any())
            top = m.amax(0)
            total = s.double().sum(0) if e0 is not None else (s.double() * (m.double() - top).exp()).sum(0)
            logs.append((top, total.log() if e0 is not None else total.log() + top))
        errors = [float((a - b).abs().max()) for a, b in zip(*logs, strict=True)]
        if p0.shape == p1.shape:  # tiles of one width: tile by tile
            finite = p0[0] > -1e30
            errors[0] = worse(errors[0], float((p0[0] - p1[0])[finite].abs().max()))
            some = finite & self.on
            errors[1] = worse(errors[1], float(((p0[1] - p1[1]).abs() / (p0[1].abs() + 1e-30))[some].max()))
        err_e = 0.0
        if e0 is not None:
            for a, b, on in zip(e0.split(1024), e1.split(1024), self.on.split(1024), strict=True):
                fine &= bool(((a == MARK) == (b == MARK)).all()) and bool((b[~on] == MARK).all())
                a, b = a[on].float(), b[on].float()
                if len(a):
                    err_e = worse(err_e, float(((a - b).abs() / (a.abs() + 1e-30)).max()))
        return *errors, err_e, fine

    def agreeing(self, variants: list[str], exps: bool) -> list[str]:
        """The variants that agree with the library's kernel, both times they run."""
        kind = "exp " if exps else "rest"
        expected = self.outputs(self.tile.block_v, exps)
        self.library(*expected)
        finish("the library's kernel", 20)
        good = []
        for variant in variants:
            ok, worst, first = True, (0.0, 0.0, 0.0), None
            try:
                for _ in range(2):
                    got = self.outputs(VARIANTS[variant].PLANS[variant].block_v, exps)
                    self.candidate(variant, *got)
                    finish(variant)
                    *errors, fine = self.compare(expected, got)
                    worst = tuple(worse(a, b) for a, b in zip(worst, errors, strict=True))
                    ok &= fine and (first is None or all(map(_equal, first, got)))
                    first = first or got
            except Exception as error:  # does not compile or launch here
                say(f"ERROR {kind} {variant}: {type(error).__name__}: {str(error)[:200]}")
                continue
            ok &= worst[0] < 1e-4 and worst[1] < 1e-4 and worst[2] < 0.01
            shape = f"N={self.n} V={self.v} H={self.h}"
            numbers = f"max {worst[0]:.1e}, sums {worst[1]:.1e}, E {worst[2]:.1e}"
            say(f"{'ok   ' if ok else 'WRONG'} {kind} {variant}: {shape}: {numbers}")
            good += [variant] * ok
        return good


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or torch.equal(a, b)


def median_ms(function, count: int = 10) -> float:
    for _ in range(2):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    finish("timing", 20)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def product_ms(case: Case) -> float:
    logits = torch.empty(case.n, case.v, dtype=torch.bfloat16, device="cuda")
    return median_ms(lambda: torch.mm(case.x, case.w.t(), out=logits))


def kernel_ms(launch_on, outputs: tuple) -> float:
    return median_ms(lambda: launch_on(*outputs))


def right_at_awkward_shapes(variants: list[str]) -> dict[bool, list[str]]:
    """By kernel (exponentials or not), the variants that stay."""
    left = {False: list(variants), True: list(variants)}
    shapes = ((777, 50257, 576, 0.1), (777, 50257, 264, 0.1), (300, 1000, 64, 0.5), (1, 7, 264, 0.0))
    for n, v, h, idle in shapes:
        case = Case(n, v, h, idle)
        for exps in (False, True):
            left[exps] = case.agreeing(left[exps], exps)
    case = Case(777, 50257, 576, 0.1)
    case.active.zero_()  # nothing is written, and nothing waits for a tile that never comes
    for exps in (False, True):
        for variant in list(left[exps]):
            got = case.outputs(VARIANTS[variant].PLANS[variant].block_v, exps)
            case.candidate(variant, *got)
            finish(variant)
            if not all(x is None or bool((x == MARK).all()) for x in got):
                say(f"WRONG {variant}: writes without an active row")
                left[exps].remove(variant)
    return left


def time_all(left: dict[bool, list[str]], groups: list[int], out: Path) -> None:
    rows = []

    def note(v: int, h: int, kernel: str, variant: str, group: int | None, ms: float) -> None:
        tflops = 2 * 8192 * v * h / ms / 1e9
        row = {"v": v, "h": h, "kernel": kernel, "variant": variant, "group": group, "ms": ms, "tflops": tflops}
        rows.append(row)
        say(f"V={v} H={h}: {kernel} {variant}{f', group {group}' if group else ''}: {ms:.3f} ms, {tflops:.0f} TFLOP/s")
        with open(out / "tile-kernels.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"n": 8192, "device": torch.cuda.get_device_name(), **row}) + "\n")

    for v, h in SHAPES:
        case = Case(8192, v, h, 0.0)
        note(v, h, "product", "torch.mm", None, product_ms(case))
        for exps in (False, True):
            kernel = "exp" if exps else "rest"
            ms = kernel_ms(case.library, case.outputs(case.tile.block_v, exps))
            note(v, h, kernel, "library", GROUP, ms)
            for variant in case.agreeing(left[exps], exps):
                for group in (GROUP, *groups):
                    run = functools.partial(case.candidate, variant, group=group)
                    ms = kernel_ms(run, case.outputs(VARIANTS[variant].PLANS[variant].block_v, exps))
                    note(v, h, kernel, variant, group, ms)
        del case
        torch.cuda.empty_cache()
    print(f"\nN=8192, bf16\n{'V':>8}{'H':>6}  {'kernel':<34}{'ms':>9}{'TFLOP/s':>9}")
    for row in rows:
        name = f"{row['kernel']} {row['variant']}" + (f" /{row['group']}" if row["group"] not in (None, GROUP) else "")
        print(f"{row['v']:>8}{row['h']:>6}  {name:<34}{row['ms']:>9.3f}{row['tflops']:>9.0f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--groups", nargs="+", type=int, default=[], help=f"values of GROUP to time besides {GROUP}")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        torch.manual_seed(options.seed)
        say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {options.seed}")
        time_all(right_at_awkward_shapes(options.variants), options.groups, options.out)
        return 0
    variants = options.variants
    while variants:  # the library's kernels and torch.mm are timed again after a hang, for one run's ratios
        command = [sys.executable, __file__, "--child", "--seed", str(options.seed), "--out", str(options.out)]
        command += ["--variants", *variants, *(["--groups", *map(str, options.groups)] if options.groups else [])]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        hung = None
        for line in child.stdout:
            print(line, end="", flush=True)
            hung = line.split("HANG in ")[1].strip() if "HANG in " in line else hung
        if child.wait() != HUNG or hung not in variants:
            return child.returncode
        variants = [name for name in variants if name != hung]
    return HUNG


if __name__ == "__main__":
    sys.exit(main())
