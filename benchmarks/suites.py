"""The suites: which cases are measured together. The most telling cases come first: a run that reaches its time limit
has those.
"""

from __future__ import annotations

from cases.head import HeadCase
from cases.la_tb import LaTbCase
from cases.loss import LossCase
from cases.rollout import RolloutCase
from cases.update import UpdateCase
from operations import Case

CPU_SHAPES = ((1024, 151936, 896), (2048, 49152, 576))
GPU_HEADS = ((151936, 1536), (151936, 3584), (128256, 4096), (262144, 2304), (151936, 896), (49152, 576))
CPU_DTYPES = ("fp32", "bf16")


def _cpu_modes() -> list[HeadCase]:
    v, h = CPU_SHAPES[1][1:]
    both = [(shape, dtype) for shape in CPU_SHAPES for dtype in CPU_DTYPES]
    modes = [HeadCase(*shape, dtype=dtype, mode=mode) for mode in ("no_grad", "full") for shape, dtype in both]
    masked = [HeadCase(2048, v, h, dtype="fp32", mask_ratio=ratio) for ratio in (0.5, 0.9)]
    long = [HeadCase(8192, v, h, dtype=dtype, mode="no_grad") for dtype in CPU_DTYPES]
    return [*modes, *masked, HeadCase(777, v, h, dtype="fp32"), *long]


def _gpu_main() -> list[HeadCase]:
    return [HeadCase(8192, v, h, mode=mode) for v, h in GPU_HEADS for mode in ("frozen", "full", "no_grad")]


def _gpu_n() -> list[HeadCase]:
    v, h = GPU_HEADS[0]
    lengths = [HeadCase(n, v, h) for n in (512, 2048, 7777, 32768)]
    masked = [HeadCase(8192, v, h, mask_ratio=ratio) for ratio in (0.5, 0.9)]
    wide = [HeadCase(8192, width, 2304) for width in (32768, 65536, 131072)]
    hot = [HeadCase(n, v, h, l2="hot") for n in (512, 8192)]
    other = [HeadCase(8192, v, h, dtype="fp32"), HeadCase(512, v, h, mode="full")]
    return [*lengths, *masked, *wide, *hot, *other, HeadCase(1024, v, h), HeadCase(4096, v, h), HeadCase(16384, v, h)]


SUITES: dict[str, list[Case]] = {
    "cpu": [HeadCase(*shape, dtype=dtype) for shape in CPU_SHAPES for dtype in CPU_DTYPES],
    "cpu-loss": [LossCase(*shape, b=8, dtype=dtype) for shape in CPU_SHAPES for dtype in CPU_DTYPES],
    "cpu-modes": _cpu_modes(),
    "cpu-n": [HeadCase(n, *CPU_SHAPES[1][1:], dtype="fp32") for n in (256, 512, 1024, 2048, 4096)],
    "cpu-v": [HeadCase(1024, v, 576, dtype="fp32") for v in (8192, 16384, 32768, 65536, 131072)],
    "cpu-update": [UpdateCase("SmolLM2-135M", dtype, sequences=16, prompt=32, completion=128) for dtype in CPU_DTYPES],
    "cpu-packing": [UpdateCase("SmolLM2-135M", dtype, sequences=16, prompt=4, completion=160) for dtype in CPU_DTYPES],
    "cpu-rollout": [
        RolloutCase("SmolLM2-135M", "bf16", requests, places, prompt=32, completion=128)
        for requests, places in ((32, 32), (32, 8), (128, 32))
    ],
    "gpu": _gpu_main(),
    "gpu-loss": [LossCase(8192, v, h, b=16) for v, h in GPU_HEADS],
    "gpu-n": _gpu_n(),
    "gpu-rollout": [RolloutCase("Qwen2.5-1.5B", "bf16", requests, 64, 128, 1024) for requests in (64, 256)],
    "gpu-update": [UpdateCase("Qwen2.5-1.5B", "bf16", sequences=16, prompt=128, completion=1536)],
    "la-tb": [
        LaTbCase(n, b, off_policy) for n, b in ((16384, 64), (65536, 64), (65536, 1024)) for off_policy in (False, True)
    ],
}
