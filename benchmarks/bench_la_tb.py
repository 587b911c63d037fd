"""The LA-TB loss and its gradients under pytest-benchmark: ``pytest benchmarks/bench_la_tb.py``."""

from __future__ import annotations

import peers
import pytest
import torch
import workloads
from workloads import LaTbCase

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", peers.LA_TB_PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("n", "b"), [(16384, 64), (65536, 1024)])
def test_la_tb(benchmark, provider, n, b):
    case = LaTbCase(n, b)
    inputs = workloads.la_tb_inputs(case, DEVICE)
    try:
        step = peers.la_tb_step(provider, case, inputs)
        step()
    except Exception as error:
        pytest.skip(f"{provider.name}: {error}")
    benchmark.group = f"N={n} B={b}"

    def timed():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
