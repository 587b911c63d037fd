"""Where the time of our passes goes, kernel by kernel, on a CUDA device:

    python benchmarks/kernel_times.py [--out FOLDER] [--heads 2]

Each mode of the head (no_grad, frozen, full; the first two also with an entropy from the same pass) and the one-pass
loss runs seven times in a row, timed by events, as the bare products of the mode do before it; then a few times under
torch.profiler, for each kernel's launches and milliseconds a step. What the kernels leave of the step is launches and
gaps. Rows go to ``FOLDER/kernel-times.jsonl``.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import measure  # noqa: E402
from cases.head import HeadCase, head_inputs  # noqa: E402
from cases.loss import LossCase, loss_inputs  # noqa: E402
from measure import source_digest  # noqa: E402
from peers.head import HEAD_PROVIDERS, head_step  # noqa: E402
from peers.loss import OURS, loss_step  # noqa: E402
from product_rates import median_ms  # noqa: E402
from suites import GPU_HEADS  # noqa: E402

N = 8192
STEPS = 3
HEAD = next(p for p in HEAD_PROVIDERS if p.name == "powerflow_fast")
WITH_ENTROPY = next(p for p in HEAD_PROVIDERS if p.name == "powerflow_fast with entropy")
FLOOR = next(p for p in HEAD_PROVIDERS if p.name == "gemm")
ONE_PASS = next(p for p in OURS if p.name == "powerflow_fast one pass")


def short(kernel: str) -> str:
    """A kernel's name without template arguments, parameters and namespaces."""
    return re.sub(r"[<(].*", "", kernel.removeprefix("void ")).split("::")[-1][:70]


def kernels_of(step) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches a step, by kernel; empty where the profiler sees no device."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = collections.defaultdict(list)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[short(event.name)].append(event.device_time_total / 1e3)
    return {name: (sum(times) / STEPS, len(times) / STEPS) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--heads", type=int, default=len(GPU_HEADS), help="only the first so many heads")
    parser.add_argument("--commit", help="of a copy that has no .git")
    modes = ["no_grad", "frozen", "full", "one pass", "no_grad with entropy", "frozen with entropy"]
    parser.add_argument("--modes", nargs="+", default=modes)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda")
    keys = ("date", "commit", "torch", "triton", "driver")
    environment = {key: value for key, value in measure.environment(device).items() if key in keys}
    if options.commit:
        environment["commit"] = options.commit
    with open(options.out / "kernel-times.jsonl", "w", encoding="utf-8") as file:
        for v, h in GPU_HEADS[: options.heads]:
            for mode in options.modes:
                if mode == "one pass":
                    case = LossCase(N, v, h, b=16)
                    inputs = loss_inputs(case, device)
                    step, floor = loss_step(ONE_PASS, case, inputs), loss_step(FLOOR, case, inputs)
                else:
                    plain = mode.removesuffix(" with entropy")
                    case = HeadCase(N, v, h, mode=plain)
                    inputs = head_inputs(case, device)
                    step = head_step(HEAD if plain == mode else WITH_ENTROPY, case, inputs)
                    floor = head_step(FLOOR, case, inputs)
                bare = median_ms(floor, 7)
                ms = median_ms(step, 7)
                kernels = kernels_of(step)
                busy = sum(time for time, _ in kernels.values())
                shown = {k: x for k, x in sorted(kernels.items(), key=lambda x: -x[1][0]) if x[0] >= 0.004 * busy}
                row = {
                    "op": case.op,
                    "backend": "triton",
                    "device": torch.cuda.get_device_name(),
                    "n": N,
                    "v": v,
                    "h": h,
                }
                row |= {"mode": mode, "ms": round(ms, 4), "products_ms": round(bare, 4), "kernels_ms": round(busy, 4)}
                row |= {"launches": round(sum(count for _, count in kernels.values()))}
                row |= {"kernels": {name: [round(x, 4) for x in times] for name, times in shown.items()}, **environment}
                row["sources"] = source_digest(case.op, "triton")
                file.write(json.dumps(row) + "\n")
                print(f"{v} x {h} {mode}: {ms:.3f} ms, {ms / bare:.3f} of products {bare:.3f}; kernels {busy:.3f} ms")
                for name, (time, count) in list(shown.items())[:9]:
                    print(f"    {time:>9.4f} ms x{count:<5.1f} {name}")
                sys.stdout.flush()
                del inputs, step, floor
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
