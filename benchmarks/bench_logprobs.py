"""The head under pytest-benchmark, for work on it: ``pytest benchmarks/bench_logprobs.py``.

Small shapes, seconds in all; compare two versions of the code with pytest-benchmark's ``--benchmark-autosave`` and
``--benchmark-compare``. Figures to publish come from ``run.py``.
"""

from __future__ import annotations

import peers
import pytest
import torch
import workloads
from workloads import HeadCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (8192, 151936, 1536) if DEVICE.type == "cuda" else (256, 16384, 256)


@pytest.mark.parametrize("provider", peers.default_providers("linear_logprobs", DEVICE, "fp32"), ids=lambda p: p.name)
@pytest.mark.parametrize("mode", workloads.MODES)
@pytest.mark.parametrize("dtype", ["bf16"] if DEVICE.type == "cuda" else ["fp32", "bf16"])
def test_head(benchmark, provider, mode, dtype):
    case = HeadCase(*SHAPE, dtype=dtype, mode=mode)
    inputs = workloads.head_inputs(case, DEVICE)
    try:
        step = peers.head_step(provider, case, inputs)
        step()
    except Exception as error:
        pytest.skip(f"{provider.name}: {error}")
    benchmark.group = f"{mode} {dtype}"

    def timed():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
