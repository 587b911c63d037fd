"""The torch backend's arithmetic: products and exponentials against fp64, by every class that can run here."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from powerflow_fast.config import PowerFlowConfig
from powerflow_fast.ops import torch_products
from powerflow_fast.ops.torch_products import CompiledProducts, CpuBf16Products, Products, bf16_is_fast, products_for
from powerflow_fast.training.prepare import make_accelerator

NATIVE_BF16 = torch_products.cpu_multiplies_bf16()
compiled = pytest.mark.skipif(not torch_products.compiled_products_run(), reason="the compiled products need AVX-512")
CASES = [
    pytest.param(Products, torch.float32, id="torch-fp32"),
    pytest.param(CompiledProducts, torch.float32, id="compiled-fp32", marks=compiled),
    pytest.param(CpuBf16Products, torch.bfloat16, id="torch-bf16"),
    pytest.param(
        CompiledProducts,
        torch.bfloat16,
        id="compiled-bf16",
        marks=[compiled, pytest.mark.skipif(not NATIVE_BF16, reason="this CPU has no bf16 products")],
    ),
]
# around the block sizes: one element, odd depths, one more or less than a block, several blocks each way
SHAPES = [(1, 1, 1), (3, 65, 33), (64, 64, 64), (65, 128, 31), (130, 300, 127), (17, 257, 1100), (70, 70, 2049)]


def noise(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_products_are_those_of_fp64(kind, dtype, shape):
    m, n, k = shape
    hidden, weight = noise(m, k, dtype=dtype), noise(n, k, dtype=dtype, seed=1)
    run = kind(hidden)
    assert run.operand_dtype == dtype
    # The second product of CpuBf16Products brings 8 bits back, and its other products are rounded.
    tolerance = {"rtol": 0, "atol": (2e-6 if kind is not CpuBf16Products else 1e-5) * math.sqrt(k) * 8}
    exact = hidden.double() @ weight.double().t()
    out = torch.full((m, n), torch.nan)
    run.logits(hidden, weight, out)
    torch.testing.assert_close(out.double(), exact, **tolerance)

    start = noise(m, n, dtype=torch.float32, seed=2)
    rounded = {"rtol": 0, "atol": 2e-6 * math.sqrt(k) * 8 if kind is not CpuBf16Products else 0.04 * math.sqrt(k)}
    layouts = {
        "rows": (hidden, weight.t()),
        "a's columns": (hidden.t().contiguous().t(), weight.t()),
        "b's rows": (hidden, weight.t().contiguous()),
        "within larger ones": (
            torch.cat([hidden, hidden], 1)[:, :k],
            torch.cat([weight.t(), weight.t()], 1)[:, :n],
        ),
        "no contiguous side": (hidden.repeat_interleave(2, 1)[:, ::2], weight.t().repeat_interleave(2, 1)[:, ::2]),
    }
    for name, (a, b) in layouts.items():
        wide = torch.cat([start, start], 1)
        run.add(a, b, wide[:, :n])
        torch.testing.assert_close(
            wide[:, :n].double(), start + exact, **rounded, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert torch.equal(wide[:, n:], start), "nothing is written beside the result"
        run.add(a, b, wide[:, :n], fresh=True)
        torch.testing.assert_close(wide[:, :n].double(), exact, **rounded)


@compiled
def test_no_depth_is_a_sum_of_nothing():
    run = CompiledProducts(torch.zeros(1))
    out = torch.ones(3, 4)
    run.add(torch.zeros(3, 0), torch.zeros(0, 4), out)
    assert torch.equal(out, torch.ones(3, 4))
    run.logits(torch.zeros(3, 0), torch.zeros(4, 0), out)
    assert not out.any()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16] if NATIVE_BF16 else [torch.float32], ids=str)
def test_bits_do_not_depend_on_the_threads(dtype):
    a, b = noise(200, 1500, dtype=dtype), noise(300, 1500, dtype=dtype, seed=1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out, turned = torch.empty(200, 300), torch.zeros(200, 300)
            run = CompiledProducts(a)
            run.logits(a, b, out)
            run.add(a.t().contiguous().t(), b.t(), turned)
            results.append((out, turned))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for later in results[1:] for x, y in zip(later, results[0], strict=True))


@compiled
def test_exponentials_are_accurate_over_the_whole_range():
    run = CompiledProducts(torch.zeros(1))
    x = torch.cat([torch.linspace(-87.2, 88.3, 400_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30])])
    nowhere = torch.tensor([-1])
    e = run.exponentials(x[None].clone(), torch.zeros(1), nowhere)[0]
    exact = x.double().exp()
    assert ((e - exact).abs() / exact).max() < 2.5e-7, "two units in the last place"
    ends = torch.tensor([-math.inf, -1e30, -88.0, 88.8, 1e30, math.inf, math.nan])
    e = run.exponentials(ends[None].clone(), torch.zeros(1), nowhere)[0]
    assert e.tolist()[:6] == [0.0, 0.0, 0.0, math.inf, math.inf, math.inf] and e[6].isnan()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 1000])
@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_exponentials_leave_the_label_out(kind, dtype, width):
    rows = 9
    z = noise(rows, width, dtype=torch.float32) * 3
    anchor, at_label = noise(rows, dtype=torch.float32, seed=1), noise(rows, dtype=torch.float32, seed=2)
    label = torch.tensor([-5, -1, 0, width - 1, width, width + 3, width // 2, 0, 0])
    here = (label >= 0) & (label < width)
    exact = (z - anchor[:, None]).double().exp()
    exact[here, label[here]] = 0.0
    start = torch.linspace(0, 5, rows)
    run = kind(torch.zeros(1, dtype=dtype))
    for values in (None, at_label):
        expected = exact.clone()
        if values is not None:
            expected[here, label[here]] = values[here].double()
        for out in (None, torch.empty(rows, width), torch.empty(rows, 2 * width, dtype=run.operand_dtype)[:, :width]):
            sums, logits = start.clone(), z.clone()
            e = run.exponentials(logits, anchor, label, values, sums=sums, out=out)
            assert e.data_ptr() == (logits if out is None else out).data_ptr()
            half = e.dtype == torch.bfloat16
            torch.testing.assert_close(e.double(), expected, rtol=4e-3 if half else 1e-6, atol=1e-37)
            if half:
                torch.testing.assert_close(e, expected.to(torch.bfloat16), rtol=8e-3, atol=0)
            torch.testing.assert_close(sums.double(), start + exact.sum(1), rtol=1e-6, atol=0)
            again, sums_again, energy, logits = torch.empty_like(e), start.clone(), start.clone(), start.clone()
            statistics = {"sums": sums_again, "energy": energy, "logits": logits}
            run.exponentials(z.clone(), anchor, label, values, **statistics, out=again)
            assert torch.equal(again, e) and torch.equal(sums_again, sums)
            torch.testing.assert_close(logits.double(), start + z.double().sum(1), rtol=2e-6, atol=1e-4)
            exact_energy = (exact * (z - anchor[:, None])).sum(1)
            torch.testing.assert_close(energy.double(), start + exact_energy, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_a_ruled_out_column_has_no_energy(kind, dtype):
    z = torch.tensor([[0.5, -torch.inf, -1.0, -100.0]])
    sums, energy, logits = torch.zeros(3, 1)
    statistics = {"sums": sums, "energy": energy, "logits": logits}
    kind(torch.zeros(1, dtype=dtype)).exponentials(z, torch.zeros(1), torch.tensor([-1]), **statistics)
    assert logits.item() == -math.inf
    assert sums.item() == pytest.approx(math.exp(0.5) + math.exp(-1), rel=1e-6)
    assert energy.item() == pytest.approx(0.5 * math.exp(0.5) - math.exp(-1), rel=1e-6)


@compiled
def test_bf16_exponentials_round_to_even():
    bits = torch.arange(0x3F7F8000, 0x3F828000, 0x1000, dtype=torch.int32)
    x = bits.view(torch.float32).log()
    z, out = x[None].clone(), torch.empty(1, len(x), dtype=torch.bfloat16)
    run, nowhere = CompiledProducts(torch.zeros(1)), torch.tensor([-1])
    exact = run.exponentials(x[None].clone(), torch.zeros(1), nowhere)
    assert torch.equal(run.exponentials(z, torch.zeros(1), nowhere, out=out), exact.to(torch.bfloat16))


@compiled
def test_the_compiled_products_are_taken_where_they_run(monkeypatch):
    assert type(products_for(torch.zeros(1))) is CompiledProducts
    assert products_for(torch.zeros(1, dtype=torch.float16)).operand_dtype == torch.float32
    assert type(products_for(torch.zeros(1, dtype=torch.float64))) is Products
    with torch.backends.mkldnn.flags(enabled=False):  # the block product is oneDNN's
        assert type(products_for(torch.zeros(1))) is Products
    monkeypatch.setattr(torch_products, "compiled_products_run", lambda: False)
    assert type(products_for(torch.zeros(1))) is Products
    bf16 = products_for(torch.zeros(1, dtype=torch.bfloat16))
    assert type(bf16) is (CpuBf16Products if NATIVE_BF16 else Products)


@compiled
def test_a_tracer_that_comes_first_does_not_hide_them():
    code = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
import powerflow_fast
from powerflow_fast.ops.torch_products import products_for
with FakeTensorMode():
    traced = type(products_for(torch.zeros(1))).__name__
print(traced, type(products_for(torch.zeros(1))).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["CompiledProducts"] * 2, done.stderr


@compiled
@pytest.mark.parametrize(
    ("op", "arguments", "message"),
    [
        ("head_product", lambda f: (f(2, 3), f(4, 5), f(2, 5), False, f(9999)), r"takes \(M, K\), \(K, N\)"),
        ("head_product", lambda f: (f(2, 3), f(3, 5).half(), f(2, 5), False, f(9999)), "of one dtype"),
        ("head_product", lambda f: (f(2, 3).half(), f(3, 5).half(), f(2, 5), False, f(9999)), "float32 or bfloat16"),
        ("head_product", lambda f: (f(2, 3), f(3, 5), f(2, 5), False, f(9)), "memory hold b"),
        (
            "head_exponentials",
            lambda f: (f(2, 3), f(3), f(2).long(), None, None, None, None, f(2, 3)),
            "all .rows,. and contig",
        ),
        ("head_exponentials", lambda f: (f(2, 3), f(2), f(2).long(), None, None, None, None, f(2, 4)), "one shape"),
        (
            "head_exponentials",
            lambda f: (f(2, 3), f(2), f(2).long(), None, None, None, None, f(2, 3).half()),
            "out must be",
        ),
        ("head_exponentials", lambda f: (f(2, 3), f(2), f(2).long(), None, None, f(2), None, f(2, 3)), "both be given"),
    ],
)
def test_a_direct_call_cannot_read_outside_of_its_tensors(op, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.powerflow_fast, op)(*arguments(torch.zeros))


def test_devices_that_multiply_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert bf16_is_fast("cpu") is False
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert bf16_is_fast("cpu") is True
    assert bf16_is_fast("mps") is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert bf16_is_fast("cuda") is False


@pytest.mark.parametrize(("bf16", "precision"), [(True, "bf16"), (False, "no"), ("auto", "bf16")])
def test_autocast_is_what_the_config_says_or_what_is_fast(monkeypatch, tmp_path, bf16, precision):
    monkeypatch.setattr("powerflow_fast.training.prepare.bf16_is_fast", lambda device_type: device_type == "cpu")
    config = PowerFlowConfig(bf16=bf16, output_dir=str(tmp_path))
    assert make_accelerator(config).mixed_precision == precision
