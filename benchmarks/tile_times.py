"""Checks Hopper's own tile kernels against the library's Triton ones and times both, on an sm_90 GPU:

    python benchmarks/tile_times.py [--quick] [--plans 64x4/2 32x8/4] [--groups 8 32] [--seed 1] [--out FOLDER]

Each use (``rest``, ``exp``, ``grad``) by each plan, "depth of a step x stages / stagger", must give the library's
numbers, leave alone what it must, and repeat its bits, at awkward shapes and at those that are timed; only then is it
timed. The table comes last, rows go to ``FOLDER/tile-kernels.jsonl``. A kernel that does not come back within seconds
is named, left out, and the others go on in a new process. ``--quick`` times one shape.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import product_rates
import torch
import triton

import powerflow_fast  # noqa: F401  (mounts the kernels)
from powerflow_fast.kernels import hopper_tiles, launch, linear_logprob_bwd, linear_logprob_exps, linear_logprob_fwd
from powerflow_fast.kernels.active_tiles import active_tiles

KINDS = ("rest", "exp", "grad")
PRE = 0.9
MARK = -12352.0  # what outputs hold before a launch: no result comes near it, and every dtype holds it
HUNG = 3  # exit code
AWKWARD = (
    (777, 50257, 576, 0.1, torch.bfloat16),
    (777, 50257, 264, 0.1, torch.bfloat16),
    (300, 1000, 64, 0.5, torch.float16),
    (1, 7, 264, 0.0, torch.bfloat16),
)
SHAPES = ((151936, 1536), (128256, 4096), (49152, 576))
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


def largest(x: torch.Tensor) -> float:
    """The largest element, NaN if there is one; 0 of none."""
    return float(x.max()) if x.numel() else 0.0


def worse(a: float, b: float) -> float:
    """The larger one, or the one that is no number."""
    return a if b <= a or a != a else b


def parsed(plan: str) -> hopper_tiles.Plan:
    """The plan of depth x stages / stagger."""
    ring, stagger = plan.split("/")
    return hopper_tiles.Plan(*map(int, ring.split("x")), int(stagger))


class Case:
    """Inputs of one shape, and launches of the library's kernels and of Hopper's own."""

    def __init__(self, n: int, v: int, h: int, idle: float, dtype: torch.dtype = torch.bfloat16):
        self.n, self.v, self.h, self.dtype = n, v, h, dtype
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        h_stride, self.width = -(-h // 8) * 8, -(-v // 16) * 16
        self.granules = -(-v // 8) * 8  # the copy engine writes 16 bytes at a time, also past the last column
        self.x = torch.randn(n, h_stride, device="cuda").to(dtype)[:, :h]
        self.w = (torch.randn(v, h_stride, device="cuda") * (4 / h**0.5)).to(dtype)[:, :h]
        self.labels = torch.randint(v, (n,), device="cuda")
        self.active = torch.ones(n, dtype=torch.int32, device="cuda")
        if idle:
            self.active[torch.rand(n, device="cuda") < idle] = 0
            self.active[256:384] = 0  # one row tile is skipped, another one has no inactive row
            self.active[:128] = 1
        self.set_active()
        label = self.labels.clamp(min=0)
        own = zip(self.x.split(1024), label.split(1024), strict=True)
        self.anchor = torch.cat([(a.float() * self.w[b].float()).sum(1) for a, b in own]).mul_(PRE)
        if dtype == torch.float16:
            self.anchor.fill_(8.0)  # within its range
        self.tile = launch.choose_tile(self.x, heavy=False)
        partial, _ = self.outputs("rest")
        self.library("rest", partial, None)
        self.top = partial[0].amax(0)
        self.total = (partial[1] * (partial[0] - self.top).exp()).nan_to_num(0.0).sum(0)

    def set_active(self) -> None:
        self.labels[self.active == 0] = -100
        self.on = self.active.bool()
        self.factor = torch.where(self.on, torch.randn(self.n, device="cuda"), 0.0)
        self.tiles = active_tiles(self.active)

    def outputs(self, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        partial = torch.full((2, triton.cdiv(self.v, hopper_tiles.TILE_V), self.n), MARK, device="cuda")
        if kind == "rest":
            return partial, None
        return partial, torch.full((self.n, self.width), MARK, dtype=self.dtype, device="cuda")

    def library(self, kind: str, partial: torch.Tensor, out: torch.Tensor | None) -> None:
        heights = self.tile.block_n, self.tile.block_v
        operands = [launch.operand(t, r, self.tile) for t, r in zip((self.x, self.w), heights, strict=True)]
        grid = (triton.cdiv(self.n, heights[0]) * triton.cdiv(self.v, heights[1]),)
        strides = self.x.stride(0), self.w.stride(0)
        flags = {"HAS_BIAS": False, "HAS_SOFTCAP": False, **self.tile.meta()}
        size = self.n, self.v, self.h
        if kind == "rest":
            linear_logprob_fwd._rest_tile_kernel[grid](
                *operands, None, self.labels, self.active, partial,
                *size, partial.stride(0), *strides, PRE, 1.0, STATS=False, **flags,
            )  # fmt: skip
        elif kind == "exp":
            linear_logprob_exps._exp_tile_kernel[grid](
                *operands, None, self.labels, self.active, self.anchor, out, partial,
                *size, partial.stride(0), *strides, out.stride(0), PRE, 1.0, **flags,
            )  # fmt: skip
        else:
            linear_logprob_bwd._logit_gradient_kernel[grid](
                *operands, None, self.labels, self.factor, self.top, self.total, out,
                *size, 0, *strides, out.stride(0), PRE, 1.0, **flags,
            )  # fmt: skip

    def hopper(
        self, kind: str, plan: str, partial: torch.Tensor, out: torch.Tensor | None, group: int | None = None
    ) -> None:
        plan = parsed(plan)._replace(group=group or hopper_tiles.PLAN.group)
        options = {"sms": self.sms, "plan": plan}
        inputs = self.x, self.w, self.labels
        if kind == "rest":
            hopper_tiles.rest_tiles(*inputs, self.tiles, partial, PRE, **options)
        elif kind == "exp":
            hopper_tiles.exp_tiles(*inputs, self.active, self.tiles, self.anchor, out, partial, PRE, **options)
        else:
            grad = out[:, : self.v]
            hopper_tiles.gradient_tiles(
                *inputs, self.factor, self.tiles, self.top, self.total, grad, 0, PRE, **options
            )  # fmt: skip

    def compare(self, kind: str, expected: tuple, got: tuple) -> tuple[float, float, float, bool]:
        """(largest error of a tile's row maximum; of a row sum, of an element of the result, relative to itself;
        untouched where it must be, written where it must be)"""
        (p0, x0), (p1, x1) = expected, got
        fine, errors = True, [0.0, 0.0, 0.0]
        if kind != "grad":
            a, b = p0[:, :, self.on], p1[:, :, self.on]
            finite = a[0] > -1e30
            fine &= not bool((b == MARK).any()) and bool(((b[0] > -1e30) == finite).all())
            errors[0] = largest((a[0] - b[0])[finite].abs())
            errors[1] = largest(((a[1] - b[1]).abs() / (a[1].abs() + 1e-30))[finite])
        if x0 is not None:
            for a, b, on in zip(x0.split(1024), x1.split(1024), self.on.split(1024), strict=True):
                fine &= bool(((a == MARK) == (b == MARK))[:, : self.v].all()) and bool(
                    (b[:, self.granules :] == MARK).all()
                )
                fine &= bool((b[~on, : self.v] == (0.0 if kind == "grad" else MARK)).all())
                a, b = a[on, : self.v].float(), b[on, : self.v].float()
                # below float32's or float16's normal range results may differ, or be 0
                floor = 1e-30 if self.dtype == torch.bfloat16 else 1e-3
                errors[2] = worse(errors[2], largest((a - b).abs() / (a.abs() + floor)))
        return *errors, fine

    def agrees(self, kind: str, plan: str, expected: tuple) -> bool:
        """Whether Hopper's kernel gives the library's results, both times it runs."""
        ok, worst, first = True, (0.0, 0.0, 0.0), None
        try:
            for _ in range(2):
                got = self.outputs(kind)
                self.hopper(kind, plan, *got)
                finish(f"{kind} {plan}")
                *errors, fine = self.compare(kind, expected, got)
                worst = tuple(worse(a, b) for a, b in zip(worst, errors, strict=True))
                ok &= fine and (first is None or all(map(_equal, first, got)))
                first = first or got
        except Exception as error:  # does not compile or launch here
            say(f"ERROR {kind} {plan}: {type(error).__name__}: {str(error)[:300]}")
            return False
        ok &= worst[0] < 1e-4 and worst[1] < 1e-4 and worst[2] < 0.01
        shape = f"N={self.n} V={self.v} H={self.h}"
        numbers = f"max {worst[0]:.1e}, sums {worst[1]:.1e}, elements {worst[2]:.1e}"
        say(f"{'ok   ' if ok else 'WRONG'} {kind} {plan} at {shape}: {numbers}")
        return ok

    def agreeing(self, variants: list[tuple[str, str]]) -> list[tuple[str, str]]:
        good = []
        for kind in KINDS:
            chosen = [x for x in variants if x[0] == kind]
            if chosen:
                expected = self.outputs(kind)
                self.library(kind, *expected)
                finish(f"the library's {kind}", 20)
                good += [x for x in chosen if self.agrees(*x, expected)]
        return good


def _equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is None or torch.equal(a, b)


def median_ms(function, what: str) -> float:
    return product_rates.median_ms(function, 10, lambda: finish(what, 20))


def product_ms(case: Case) -> float:
    logits = torch.empty(case.n, case.v, dtype=torch.bfloat16, device="cuda")
    return median_ms(lambda: torch.mm(case.x, case.w.t(), out=logits), "torch.mm")


def right_at_awkward_shapes(variants: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The variants that stay."""
    for shape in AWKWARD:
        variants = Case(*shape).agreeing(variants)
    case = Case(*AWKWARD[0])
    case.active.zero_()  # only zeros are written, and nothing waits for a tile that never comes
    case.set_active()
    for kind, plan in list(variants):
        got = case.outputs(kind)
        case.hopper(kind, plan, *got)
        finish(f"{kind} {plan}")
        expected = case.outputs(kind)
        if kind == "grad":
            expected[1][:, : case.v] = 0
        if not all(map(_equal, expected, got)):
            say(f"WRONG {kind} {plan}: writes without an active row")
            variants.remove((kind, plan))
    return variants


def time_all(variants: list[tuple[str, str]], shapes: tuple, groups: list[int], out: Path) -> None:
    rows = []

    def note(v: int, h: int, kernel: str, variant: str, ms: float) -> None:
        product = next((row["ms"] for row in rows if row["v"] == v and row["kernel"] == "product"), ms)
        row = {"v": v, "h": h, "kernel": kernel, "variant": variant, "ms": ms, "tflops": 2 * 8192 * v * h / ms / 1e9}
        rows.append(row | {"ratio": ms / product})
        say(f"V={v} H={h} {kernel} {variant}: {ms:.3f} ms, {ms / product:.3f} of mm")
        with open(out / "tile-kernels.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"n": 8192, "device": torch.cuda.get_device_name(), **rows[-1]}) + "\n")

    for v, h in shapes:
        case = Case(8192, v, h, 0.0)
        note(v, h, "product", "torch.mm", product_ms(case))
        good = case.agreeing(variants)
        for kind in KINDS:
            outputs = case.outputs(kind)
            run = functools.partial(case.library, kind, *outputs)
            note(v, h, kind, "Triton", median_ms(run, f"the library's {kind}"))
            for _, plan in [x for x in good if x[0] == kind]:
                for group in (None, *groups):
                    run = functools.partial(case.hopper, kind, plan, *outputs, group)
                    name = f"Hopper {plan}" + (f", group {group}" if group else "")
                    note(v, h, kind, name, median_ms(run, f"{kind} {plan}"))
            del outputs, run
        del case
        torch.cuda.empty_cache()
    print(f"\nN=8192, bf16\n{'V':>8}{'H':>6}  {'kernel':<30}{'ms':>9}{'of mm':>8}{'TFLOP/s':>9}")
    for row in rows:
        name = f"{row['kernel']} {row['variant']}"
        print(f"{row['v']:>8}{row['h']:>6}  {name:<30}{row['ms']:>9.3f}{row['ratio']:>8.3f}{row['tflops']:>9.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="time one shape")
    parser.add_argument("--plans", nargs="+", default=["64x4/2", "64x4/1", "32x8/4"], help="depth x stages / stagger")
    parser.add_argument("--groups", nargs="+", type=int, default=[], help="row tiles in a sweep, besides the default")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, default=Path("build"))
    parser.add_argument("--limit", type=float, default=180.0, help="seconds after which it ends")
    parser.add_argument("--without", nargs="*", default=[], help="what to leave out, as 'rest 64x4/2'")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    variants = [(kind, x) for x in options.plans for kind in KINDS if f"{kind} {x}" not in options.without]
    if options.child:
        torch.manual_seed(options.seed)
        say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, {options.seed}")
        time_all(right_at_awkward_shapes(variants), SHAPES[: 1 if options.quick else None], options.groups, options.out)
        return 0
    without = list(options.without)
    while len(without) < len(variants) + len(options.without):  # after a hang, timed anew for one process's ratios
        command = [sys.executable, __file__, "--child", *sys.argv[1:], "--seed", str(options.seed)]
        child = subprocess.Popen([*command, "--without", *without], stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(max(1.0, options.limit - (time.time() - START)), child.kill)
        timer.start()
        hung = None
        for line in child.stdout:
            print(line, end="", flush=True)
            hung = line.split("HANG in ")[1].strip() if "HANG in " in line else hung
        timer.cancel()
        if child.wait() != HUNG or hung not in {f"{kind} {x}" for kind, x in variants}:
            return child.returncode
        without.append(hung)
    return HUNG


if __name__ == "__main__":
    sys.exit(main())
