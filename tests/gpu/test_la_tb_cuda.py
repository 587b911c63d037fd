"""The CUDA op against the fp64 oracle, and what only a GPU can show: run-to-run bits, one launch, no host sync."""

from __future__ import annotations

import math

import pytest
import torch

from powerflow_fast.kernels.la_tb_reference import group_log_z_ref, la_tb_loss_ref
from powerflow_fast.ops import group_log_z, la_tb_loss
from powerflow_fast.ops.extension import extension_status

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not extension_status().cuda, reason=extension_status().reason),
]


def make_batch(lengths, *, dtype=torch.float32, psi=True, old=True):
    """CPU tensors rounded to dtype: (inputs, options)."""
    g = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    batch = len(lengths)
    logps = (-3 * torch.rand(int(cu[-1]), generator=g, dtype=torch.float64)).to(dtype)
    sums = torch.stack([part.double().sum() for part in logps.split(list(lengths))])
    base, noise, penalty, log_z = torch.rand(4, batch, generator=g, dtype=torch.float64)
    inputs = {
        "logps": logps,
        "base_logps": (sums - cu.diff() * base).to(dtype),
        "log_z": (2 * log_z - 1).to(dtype),
        "cu_seqlens": cu,
    }
    options = {"psi": (-penalty).to(dtype)} if psi else {}
    return inputs, options | ({"old_logps": (sums + 0.6 * noise - 0.3).to(dtype)} if old else {})


def on_gpu(tensors):
    return {k: v.cuda().requires_grad_(k in ("logps", "log_z")) for k, v in tensors.items()}


def loss_and_gradients(inputs, **options):
    out = la_tb_loss(**inputs, **options)
    return (*out, *torch.autograd.grad(out.loss, [inputs["logps"], inputs["log_z"]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lengths", [(7, 1, 0, 130, 33, 0, 2), (0, 0), (5000, 1, 8192), tuple(range(300))], ids=len)
@pytest.mark.parametrize("level", [None, "sequence", "length_normalized"])
@pytest.mark.parametrize("total", [None, 1000])
def test_matches_the_oracle(dtype, lengths, level, total, poisoned_memory):
    inputs, options = make_batch(lengths, dtype=dtype, old=level is not None)
    keywords = {"alpha": 4.0, "importance_level": level or "sequence", "num_sequences": total}
    exact = {k: v.double() if v.is_floating_point() else v for k, v in (inputs | options).items()}
    for name in ("logps", "log_z"):
        exact[name].requires_grad_()
    oracle = la_tb_loss_ref(**exact, **keywords)
    oracle = (*oracle, *torch.autograd.grad(oracle[0], [exact["logps"], exact["log_z"]]))
    ours = loss_and_gradients(on_gpu(inputs), **{k: v.cuda() for k, v in options.items()}, **keywords)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for a, b in zip(ours, oracle, strict=True):
        assert a.is_cuda and a.dtype == dtype
        assert torch.allclose(a.double().cpu(), b, rtol=tolerance, atol=tolerance)


def test_same_bits_on_every_run_and_on_a_side_stream(poisoned_memory):
    inputs, options = make_batch([int(n) for n in torch.randint(0, 900, (3000,))])
    inputs, options = on_gpu(inputs), {k: v.cuda() for k, v in options.items()}
    first = loss_and_gradients(inputs, **options, alpha=4.0)
    for _ in range(20):
        again = loss_and_gradients(inputs, **options, alpha=4.0)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = loss_and_gradients(inputs, **options, alpha=4.0)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_more_sequences_than_blocks_and_one_long_one(poisoned_memory):
    for lengths in ([3] * 20_000, [2_000_003]):
        inputs, options = make_batch(lengths)
        gpu = loss_and_gradients(on_gpu(inputs), **{k: v.cuda() for k, v in options.items()}, alpha=4.0)
        for name in ("logps", "log_z"):
            inputs[name].requires_grad_()
        for a, b in zip(gpu, loss_and_gradients(inputs, **options, alpha=4.0), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-6)


def test_one_launch_and_no_host_sync():
    inputs, options = make_batch([100, 0, 400])
    inputs, options = on_gpu(inputs), {k: v.cuda() for k, v in options.items()}
    loss_and_gradients(inputs, **options, alpha=4.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss_and_gradients(inputs, **options, alpha=4.0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            la_tb_loss(**inputs, **options, alpha=4.0)
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    events = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [name for name in events if "memset" not in name.lower() and "memcpy" not in name.lower()]
    assert len(kernels) == 1 and "la_tb_kernel" in kernels[0], events


def test_ratios_of_any_size_are_clipped():
    inputs, _ = make_batch([3] * 5)
    old = inputs["logps"].view(5, 3).sum(1) - torch.tensor([200.0, -200.0, 5e4, -math.inf, math.inf])
    ours = loss_and_gradients(on_gpu(inputs), alpha=4.0, old_logps=old.cuda())
    torch.testing.assert_close(ours[2].cpu(), torch.tensor([1.2, 0.8, 1.2, 0.8, 1.2]))
    assert all(torch.isfinite(x).all() for x in ours)


@pytest.mark.parametrize("offsets", [[0, 9, 5, 8], [1, 3, 5, 8], [0, 3, 5, 7], [0, 3, 5, 99], [0, -4, 5, 8]])
def test_offsets_that_do_not_partition_the_tokens_give_nan(offsets):
    inputs, _ = make_batch([3, 2, 3])
    inputs["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    assert la_tb_loss(**on_gpu(inputs), alpha=4.0).loss.isnan()


def test_no_sequences():
    empty = torch.zeros(0, device="cuda")
    cu = torch.zeros(1, dtype=torch.int32, device="cuda")
    assert la_tb_loss(empty, empty, empty, cu, alpha=4.0).loss.item() == 0


def test_tensors_on_two_devices_are_refused():
    inputs, _ = make_batch([3, 2])
    with pytest.raises(ValueError, match="base_logps must be on logps' device cuda:0, got cpu"):
        la_tb_loss(**(on_gpu(inputs) | {"base_logps": inputs["base_logps"]}), alpha=4.0)


def test_compiles_to_one_graph():
    inputs, _ = make_batch([5, 0, 9], old=False, psi=False)
    inputs = on_gpu(inputs)
    step = torch.compile(lambda *t: la_tb_loss(*t, alpha=4.0).loss * 2, fullgraph=True)
    ours, eager = step(*inputs.values()), la_tb_loss(*inputs.values(), alpha=4.0).loss * 2
    torch.testing.assert_close(ours, eager)
    torch.testing.assert_close(*(torch.autograd.grad(x, inputs["logps"])[0] for x in (ours, eager)))


def test_captured_in_a_cuda_graph():
    inputs, options = make_batch([5, 0, 9])
    tensors = {k: v.cuda() for k, v in (inputs | options).items()}
    expected = la_tb_loss(**tensors, alpha=4.0).loss.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = la_tb_loss(**tensors, alpha=4.0)
    for _ in range(3):  # the counter of finished blocks is reset inside of the graph
        out.loss.fill_(math.nan)
        graph.replay()
        assert torch.equal(out.loss, expected)


def test_group_log_z_is_deterministic_and_does_not_wait():
    lengths = [int(n) for n in torch.randint(0, 200, (512,))]
    inputs, options = make_batch(lengths)
    del inputs["log_z"]
    ids = torch.randint(0, 64, (512,))
    exact = group_log_z_ref(
        **{k: v.double() if v.is_floating_point() else v for k, v in (inputs | options).items()},
        group_ids=ids,
        alpha=4.0,
    )
    tensors = {k: v.cuda() for k, v in (inputs | options | {"group_ids": ids}).items()}
    first = group_log_z(**tensors, alpha=4.0)
    assert torch.allclose(first.double().cpu(), exact, rtol=3e-6, atol=3e-6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [group_log_z(**tensors, alpha=4.0) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, again) for again in runs)
