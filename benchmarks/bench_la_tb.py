"""The LA-TB loss and its gradients under pytest-benchmark: ``pytest benchmarks/bench_la_tb.py``."""

from __future__ import annotations

import pytest
import torch
from cases.la_tb import LaTbCase, la_tb_inputs
from peers.la_tb import LA_TB_PROVIDERS, la_tb_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("provider", LA_TB_PROVIDERS, ids=lambda p: p.name)
@pytest.mark.parametrize(("n", "b"), [(16384, 64), (65536, 1024)])
def test_la_tb(benchmark, provider, n, b):
    case = LaTbCase(n, b)
    inputs = la_tb_inputs(case, DEVICE)
    try:
        step = la_tb_step(provider, case, inputs)
        step()
    except Exception as error:
        pytest.skip(f"{provider.name}: {error}")
    benchmark.group = f"N={n} B={b}"

    def timed():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
