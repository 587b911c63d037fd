"""Rates of the bare products that a head's passes are made of, cut as the kernels may cut them, on a CUDA device:

    python benchmarks/product_rates.py [--out FOLDER] [--heads 2]

The chunk plan (`plan_rows`) rests on a model of how cuBLAS fills the device; this measures what it models. Forms, with
E (N, V) the stored exponentials, W (V, H) the head, X (N, H) the hidden states and N = 8192:

* ``logits``: X W^T, bf16 result.
* ``E W rows R``: E W for R rows at a time, bf16 result; ``fp32``: float32 result.
* ``E W columns C``: ``total += E[:, c] W[c]`` for C columns at a time, float32 total.
* ``E^T X``: bf16 result; ``fp32``: float32; ``columns C``: C rows of the result at a time.

Rows go to ``FOLDER/product-rates.jsonl``; the table comes last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from suites import GPU_HEADS  # noqa: E402

N = 8192


def forms(x: Tensor, w: Tensor, e: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names and calls; each call does all N rows."""
    n, v = x.shape[0], w.shape[0]
    fp32 = torch.float32
    small, total = torch.empty_like(x), torch.empty_like(x, dtype=fp32)
    d_weight, wide = torch.empty_like(w), torch.empty_like(w, dtype=fp32)
    yield "logits", lambda: torch.mm(x, w.t(), out=e)
    e.uniform_(0, 1)

    def rows(r: int, out: Tensor | None) -> None:
        for first in range(0, n, r):
            if out is None:
                torch.mm(e[first : first + r], w, out_dtype=fp32)
            else:
                torch.mm(e[first : first + r], w, out=out[first : first + r])

    budget = (2**29 // (2 * v)) // 128 * 128
    sizes = {budget, 14 * 128, 16 * 128, 22 * 128, 33 * 128, 4096, n}
    for r in sorted(size for size in sizes if 0 < size <= n):
        yield f"E W rows {r}", lambda r=r: rows(r, small)
    for r in sorted({budget, 22 * 128, n}):
        yield f"E W rows {r} fp32", lambda r=r: rows(r, None)

    def columns(c: int) -> None:
        for first in range(0, v, c):
            part = slice(first, first + c)
            torch.addmm(total, e[:, part], w[part], out_dtype=fp32, beta=1 if first else 0, out=total)

    for c in (16384, 32768, 65536):
        if c < v:
            yield f"E W columns {c}", lambda c=c: columns(c)

    def transposed(c: int, out: Tensor) -> None:
        for first in range(0, v, c):
            part = slice(first, first + c)
            if out.dtype == fp32:
                torch.addmm(out[part], e[:, part].t(), x, out_dtype=fp32, beta=0, out=out[part])
            else:
                torch.mm(e[:, part].t(), x, out=out[part])

    yield "E^T X", lambda: transposed(v, d_weight)
    yield "E^T X fp32", lambda: transposed(v, wide)
    yield "E^T X columns 32768", lambda: transposed(32768, d_weight)
    half = n // 2

    def halves() -> None:
        for first in (0, half):
            part = slice(first, first + half)
            torch.addmm(wide, e[part].t(), x[part], out_dtype=fp32, beta=1 if first else 0, out=wide)

    yield "E^T X fp32 in 2 row chunks", halves


def median_ms(
    call: Callable[[], object], repetitions: int, wait: Callable[[], object] = torch.cuda.synchronize
) -> float:
    """Median of calls in a row, by events; ``wait`` until the device is done, or gives up on it."""
    for _ in range(2):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repetitions + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    wait()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--heads", type=int, default=len(GPU_HEADS), help="only the first so many heads")
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    device, table = torch.cuda.get_device_name(), []
    with open(options.out / "product-rates.jsonl", "w", encoding="utf-8") as file:
        for v, h in GPU_HEADS[: options.heads]:
            x = torch.randn(N, h, device="cuda", dtype=torch.bfloat16)
            w = torch.randn(v, h, device="cuda", dtype=torch.bfloat16)
            e = torch.empty(N, v, device="cuda", dtype=torch.bfloat16)
            for name, call in forms(x, w, e):
                row = {"device": device, "torch": torch.__version__, "n": N, "v": v, "h": h, "form": name}
                try:
                    ms = median_ms(call, options.repetitions)
                    row |= {"ms": round(ms, 4), "tflops": round(2 * N * v * h / ms / 1e9, 1)}
                except RuntimeError as error:
                    row["error"] = str(error).splitlines()[0][:200]
                table.append(row)
                file.write(json.dumps(row) + "\n")
            del x, w, e
            torch.cuda.empty_cache()
    for row in table:
        what = f"{row['ms']:>9.3f} ms {row['tflops']:>6.0f} TF/s" if "ms" in row else row["error"][:80]
        print(f"{row['v']:>7} x {row['h']:<5} {row['form']:<28}{what}")


if __name__ == "__main__":
    main()
