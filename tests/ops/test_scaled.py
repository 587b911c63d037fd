"""The upstream factor of gradients that were made before it was known, in both backends."""

from __future__ import annotations

import pytest
import torch

from powerflow_fast.ops import torch_backend

try:
    import triton

    from powerflow_fast.kernels import scale

    INTERPRETED = triton.knobs.runtime.interpret
except ImportError:
    INTERPRETED = False

BACKENDS = [torch_backend.scaled]
if INTERPRETED:
    BACKENDS.append(scale.scaled)


@pytest.mark.parametrize("scaled", BACKENDS)
@pytest.mark.parametrize("shape", [(7,), (300, 41), (0, 5)])
@pytest.mark.parametrize("source, target", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize("factor", [1.0, -0.37])
def test_rounded_once(scaled, shape, source, target, factor, poisoned_memory):
    source, target = getattr(torch, source), getattr(torch, target)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source)
    expected = (x.float() * torch.tensor(factor)).to(target)
    out = scaled(x, torch.tensor(factor), target)
    assert out.dtype == target and torch.equal(out, expected)
    assert (out is x) == (source == target), "in place where the dtype stays"
