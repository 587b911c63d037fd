"""The head under pytest-benchmark, for work on it: ``pytest benchmarks/bench_logprobs.py``.

Small shapes, seconds in all; compare two versions of the code with pytest-benchmark's ``--benchmark-autosave`` and
``--benchmark-compare``. Figures to publish come from ``run.py``.
"""

from __future__ import annotations

import pytest
import torch
from cases.head import MODES, HeadCase, head_inputs
from peers.head import default_head_providers, head_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (8192, 151936, 1536) if DEVICE.type == "cuda" else (256, 16384, 256)


@pytest.mark.parametrize("provider", default_head_providers(DEVICE, "fp32"), ids=lambda p: p.name)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["bf16"] if DEVICE.type == "cuda" else ["fp32", "bf16"])
def test_head(benchmark, provider, mode, dtype):
    case = HeadCase(*SHAPE, dtype=dtype, mode=mode)
    inputs = head_inputs(case, DEVICE)
    try:
        step = head_step(provider, case, inputs)
        step()
    except Exception as error:
        pytest.skip(f"{provider.name}: {error}")
    benchmark.group = f"{mode} {dtype}"

    def timed():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
