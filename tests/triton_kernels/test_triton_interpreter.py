"""The repair of Triton's interpreter (tests/triton_interpreter.py), against torch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
import triton_interpreter

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")


@triton.jit
def _bf16_kernel(p_a, p_b, p_x, o_sum, o_product, o_less, o_max, o_dot, o_narrow, o_widen, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a, b = tl.load(p_a + at), tl.load(p_b + at)
    tl.store(o_sum + at, a + b)
    tl.store(o_product + at, a * b)
    tl.store(o_less + at, (a < b).to(tl.int8))
    tl.store(o_max + at, tl.maximum(a, b))
    tl.store(o_dot + at, tl.dot(a, tl.trans(b)))
    tl.store(o_narrow + at, tl.load(p_x + at).to(tl.bfloat16))
    tl.store(o_widen + at, a.to(tl.float32))


def test_interpreter_computes_bfloat16():
    generator = torch.Generator().manual_seed(0)
    a, b, x = (torch.randn(32, 32, generator=generator) * 10.0**k for k in (0, 1, 3))
    a, b = a.bfloat16(), b.bfloat16()
    out = {name: torch.empty_like(a) for name in ("sum", "product")}
    out |= {"less": torch.empty(32, 32, dtype=torch.int8), "max": torch.empty_like(a)}
    out |= {"dot": torch.empty_like(x), "narrow": torch.empty_like(a), "widen": torch.empty_like(x)}
    _bf16_kernel[(1,)](a, b, x, *out.values(), N=32)
    exact = {"sum": a + b, "product": a * b, "less": (a < b).to(torch.int8), "max": torch.maximum(a, b)}
    exact |= {"narrow": x.bfloat16(), "widen": a.float()}
    for name, wanted in exact.items():
        assert torch.equal(out[name], wanted), name
    torch.testing.assert_close(out["dot"].double(), a.double() @ b.double().t(), rtol=1e-6, atol=1e-4)


def test_bfloat16_conversions_are_torchs():
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    values = triton_interpreter.widen(bits.numpy())
    wanted = bits.view(torch.bfloat16).float()
    assert torch.equal(torch.from_numpy(values).nan_to_num(nan=1.0), wanted.nan_to_num(nan=1.0))
    every = torch.arange(0, 2**32, 4099, dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = ((bits.to(torch.int32) << 16) | 0x8000).view(torch.float32)  # halfway between two neighbours
    for x in (every, ties, wanted):
        ours = torch.from_numpy(triton_interpreter.narrow(x.numpy()).view("int16")).view(torch.bfloat16)
        assert torch.equal(ours.isnan(), x.isnan())
        assert torch.equal(ours[~x.isnan()], x[~x.isnan()].bfloat16())
