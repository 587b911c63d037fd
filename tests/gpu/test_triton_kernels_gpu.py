"""The Triton kernels on a CUDA device: the interpreter's cases, real sizes, memory, equal bits, and no host sync."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from triton_cases import DTYPES, IGNORE, OPTIONS, SHAPES, Case, case_of_unlikely_tokens, make_case

from powerflow_fast import linear_la_tb_loss
from powerflow_fast.kernels import launch, linear_logprob_bwd, linear_logprob_exps, linear_logprob_fwd
from powerflow_fast.kernels.linear_logprob_reference import linear_logprob_stats_ref

pytestmark = pytest.mark.gpu
GIB = 2**30


def on_gpu(case: Case) -> Case:
    tensors = {name: x.cuda() for name, x in vars(case).items() if isinstance(x, torch.Tensor)}
    return dataclasses.replace(case, **tensors)


def large_case(n, v, h, dtype=torch.bfloat16, *, ignored=False, bias=False) -> Case:
    generator = torch.Generator("cuda").manual_seed(0)
    random = dict(generator=generator, device="cuda", dtype=dtype)
    labels = torch.randint(0, v, (n,), generator=generator, device="cuda")
    if ignored:
        labels[::3] = IGNORE
    weight = torch.randn(v, h, **random).mul_(3 * h**-0.5)
    d_logp = torch.randn(n, generator=generator, device="cuda")
    return Case(torch.randn(n, h, **random), weight, labels, d_logp, torch.randn(v, **random) if bias else None)


def exact_rows(case: Case, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp64 logp and unit gradient of a few rows, a slice of the vocabulary at a time."""
    hidden, labels = case.hidden[rows].double(), case.labels[rows]
    slices = range(0, len(case.weight), 8192)
    z = torch.cat([hidden @ case.weight[i : i + 8192].double().t() for i in slices], 1)
    log_p = torch.log_softmax(z, 1)
    p = log_p.exp()
    mean = sum(p[:, i : i + 8192] @ case.weight[i : i + 8192].double() for i in slices)
    return log_p.gather(1, labels[:, None])[:, 0], case.weight[labels].double() - mean


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_matches_fp64(options, dtype, check_accuracy):
    on_gpu(make_case(dtype, n=500, v=1300, h=264, **options)).check(check_accuracy)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_shapes(shape, dtype, check_accuracy):
    on_gpu(make_case(dtype, **shape)).check(check_accuracy)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unlikely_tokens_among_likely_ones(dtype, check_accuracy):
    on_gpu(case_of_unlikely_tokens(dtype)).check(check_accuracy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_real_size(dtype):
    """V 151936, H 1536: sampled rows of logp, of the unit gradient and of d_hidden, and sampled rows of d_weight."""
    case = large_case(2048, 151936, 1536, dtype, ignored=True)
    ours = case.run()
    keep = (case.labels != IGNORE).nonzero()[:, 0]
    rows = keep[:: len(keep) // 32]
    logp, unit = exact_rows(case, rows)
    for name in ("logp", "logp of unit"):
        torch.testing.assert_close(ours[name][rows].double(), logp, rtol=1e-5, atol=5e-5)
    scale = unit.abs().amax(1, keepdim=True)
    assert ((ours["unit"][rows].double() - unit).abs() < 6e-3 * scale).all()
    exact = unit * case.d_logp[rows, None]
    assert ((ours["d_hidden"][rows].double() - exact).abs() < 6e-3 * exact.abs().amax(1, keepdim=True)).all()

    columns = torch.cat([case.labels[keep[:4]], torch.tensor([0, 151935], device="cuda")])
    lse = ours["lse"].double()
    z = case.hidden.double() @ case.weight[columns].double().t()
    g = (case.labels[:, None] == columns).double() - (z - lse[:, None]).exp()
    g *= torch.where(case.labels == IGNORE, 0.0, case.d_logp).double()[:, None]
    exact = g.t() @ case.hidden.double()
    for name in ("d_weight", "d_weight kept") if dtype == torch.bfloat16 else ("d_weight",):
        error = (ours[name][columns].double() - exact).abs().amax(1)
        assert (error < 1e-2 * exact.abs().amax(1)).all(), name


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_statistics_of_every_pass(softcap):
    """At a real vocabulary: sampled rows against fp64, and the other results as without statistics."""
    case = large_case(700, 50257, 576, ignored=True)
    case.transform = case.transform._replace(logit_softcap=softcap, temperature=0.9)
    hidden, weight, labels, bias, transform, ignore = case.call()
    rows = (labels != IGNORE).nonzero()[::40, 0]
    options = {**transform._asdict(), "bias": bias, "ignore_index": ignore}
    exact = linear_logprob_stats_ref(hidden[rows].double(), weight.double(), labels[rows], **options)
    kept = case.call()._replace(labels=labels.clamp(min=0))
    for function, call in (
        (linear_logprob_fwd.linear_logprob_fwd, case.call()),
        (linear_logprob_exps.linear_logprob_fwd_d_hidden, case.call()),
        (linear_logprob_exps.linear_logprob_fwd_exps, kept),
    ):
        *without, nothing = function(call)
        *others, stats = function(call, stats=True)
        assert nothing is None
        for a, b in zip(without, others, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5 if a.dtype == torch.float32 else 1e-2, atol=1e-5)
        for name, expected in zip(stats._fields, exact[1:], strict=True):
            got = getattr(stats, name)[rows].double()
            torch.testing.assert_close(
                got, expected, rtol=1e-5, atol=5e-5, msg=f"{function.__name__}, {name}: {{}}".format
            )


def test_offsets_beyond_int32(monkeypatch):
    """N V > 2^31 in one buffer each of exponentials and of logit gradients, and V H > 2^31."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * GIB:
        pytest.skip("needs 40 GiB")
    monkeypatch.setattr(launch, "SCRATCH_BYTES", 8 * GIB)
    for n, v, h in ((16384, 151936, 64), (256, 151936, 14400)):
        case = large_case(n, v, h)
        assert n * v > 2**31 or v * h > 2**31
        case.labels[-3:] = torch.tensor([v - 1, v - 2, 0], device="cuda")
        ours = case.run()
        rows = torch.tensor([0, 1, n // 2, n - 3, n - 2, n - 1], device="cuda")
        logp, unit = exact_rows(case, rows)
        for name in ("logp", "logp of unit"):
            torch.testing.assert_close(ours[name][rows].double(), logp, rtol=1e-5, atol=1e-4)
        for name, exact in (("unit", unit), ("d_hidden", unit * case.d_logp[rows, None])):
            bound = 1e-2 * exact.abs().amax(1, keepdim=True)
            assert ((ours[name][rows].double() - exact).abs() < bound).all(), (name, n)
        assert all(torch.isfinite(x).all() for x in ours.values())
        del case, ours


def test_equal_bits_every_time():
    case = large_case(3000, 50000, 1024, ignored=True, bias=True)
    first = case.run()
    for _ in range(3):
        again = case.run()
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_launches_and_order_of_rows_change_no_bit(monkeypatch):
    """A row's log-prob depends on the row alone: not on its place, on other rows, or on the launch that it is in."""
    case = large_case(1000, 50000, 512)
    logp = linear_logprob_fwd.linear_logprob_fwd(case.call()).logp
    order = torch.randperm(1000, device="cuda")
    shuffled = dataclasses.replace(case, hidden=case.hidden[order], labels=case.labels[order])
    assert torch.equal(linear_logprob_fwd.linear_logprob_fwd(shuffled.call()).logp, logp[order])
    monkeypatch.setattr(linear_logprob_fwd, "SCRATCH_ROWS", 256)
    assert torch.equal(linear_logprob_fwd.linear_logprob_fwd(case.call()).logp, logp)


def test_copy_engine_and_pointers_agree(monkeypatch, check_accuracy):
    case = large_case(300, 5000, 512, bias=True)
    monkeypatch.setattr(launch, "tile_for", lambda *_, **__: launch.Tile(128, 128, 32, 8, 3, tma=False))
    case.check(check_accuracy)


def one_pass(case: Case, lengths: list[int], *, group: bool, **options) -> dict[str, torch.Tensor]:
    """``linear_la_tb_loss`` of the case's rows as completions: outputs and gradients by name."""
    b = len(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden, weight = (x.detach().requires_grad_() for x in (case.hidden, case.weight))
    base_logps = torch.linspace(-9.0, -11.0, b, device="cuda") * torch.tensor(lengths, device="cuda")
    log_z = None if group else torch.zeros(b, device="cuda")
    group_ids = torch.arange(b) // 2 if group else None
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = linear_la_tb_loss(
            hidden, weight, case.labels, cu_seqlens, base_logps, log_z, alpha=2.0, group_ids=group_ids, **options
        )
        d_hidden, d_weight = torch.autograd.grad(out.loss, [hidden, weight])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {**{name: x.detach() for name, x in out._asdict().items()}, "d_hidden": d_hidden, "d_weight": d_weight}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_loss_in_chunks_without_a_host_sync(dtype):
    """Against the torch backend in fp32; the offsets are on the CPU, so that chunks need no wait."""
    case, lengths = large_case(3000, 30000, 512, dtype), [700, 0, 900, 400, 300, 700]
    whole = one_pass(case, lengths, group=False)
    exact = one_pass(
        dataclasses.replace(case, hidden=case.hidden.float(), weight=case.weight.float()), lengths, group=False
    )
    chunked = one_pass(case, lengths, group=False, cache_bytes=800 * 30000 * dtype.itemsize)
    for name, x in exact.items():
        bound = (2e-5 if dtype == torch.float32 or "d_" not in name else 1e-2) * float(x.abs().max())
        for ours in (whole, chunked):
            assert float((ours[name].float() - x).abs().max()) <= bound, name
    again = one_pass(case, lengths, group=False, cache_bytes=800 * 30000 * dtype.itemsize)
    assert all(torch.equal(chunked[name], again[name]) for name in again)


def test_one_pass_loss_of_groups():
    case, lengths = large_case(2000, 30000, 512), [500, 200, 600, 300, 400, 0]
    ours = one_pass(case, lengths, group=True, cache_bytes=900 * 30000 * 2)
    assert all(torch.isfinite(x).all() for x in ours.values())
    assert float(ours["delta"][:2].sum()) == pytest.approx(0, abs=1e-4), "a group's residuals add up to zero"


def test_no_host_sync():
    case = large_case(1000, 50000, 512, ignored=True, bias=True)
    case.run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run_launchers()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory():
    n, v, h = 8192, 128256, 2048
    case = large_case(n, v, h)
    forward = linear_logprob_fwd.linear_logprob_fwd(case.call())

    def extra(function) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    slack = 64 * 2**20  # row vectors, the gathered rows' indices, workspaces
    tiles = -(-v // launch.choose_tile(case.hidden, heavy=False).block_v)
    used = extra(lambda: linear_logprob_fwd.linear_logprob_fwd(case.call()))
    assert used <= n * (2 * h + 8 * tiles) + slack
    used = extra(lambda: linear_logprob_exps.linear_logprob_fwd_d_hidden(case.call()))
    rows = launch.SCRATCH_BYTES // (2 * v)
    assert used <= launch.SCRATCH_BYTES + rows * (2 * h + 4 * h + 8 * tiles) + 2 * n * h + slack
    needs = {"need_d_hidden": True, "need_d_weight": True, "need_d_bias": False}
    used = extra(lambda: linear_logprob_bwd.linear_logprob_bwd(case.call(), forward, case.d_logp, **needs))
    assert used <= launch.SCRATCH_BYTES + (4 + 2) * n * h + 2 * v * h + slack
