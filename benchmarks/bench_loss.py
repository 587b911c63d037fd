"""The LA-TB loss from hidden states under pytest-benchmark, small shapes: ``pytest benchmarks/bench_loss.py``."""

from __future__ import annotations

import pytest
import torch
from cases.loss import LossCase, loss_inputs
from peers.loss import loss_providers, loss_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = (8192, 151936, 1536, 16) if DEVICE.type == "cuda" else (256, 16384, 256, 8)


@pytest.mark.parametrize("provider", loss_providers(DEVICE, "fp32"), ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", ["bf16"] if DEVICE.type == "cuda" else ["fp32", "bf16"])
def test_loss(benchmark, provider, dtype):
    case = LossCase(*SHAPE, dtype=dtype)
    inputs = loss_inputs(case, DEVICE)
    try:
        step = loss_step(provider, case, inputs)
        step()
    except Exception as error:
        pytest.skip(f"{provider.name}: {error}")
    benchmark.group = dtype

    def timed():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=5, warmup_rounds=1)
