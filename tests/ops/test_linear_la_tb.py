"""linear_la_tb_loss: its one pass against the composition of oracles, chunk plans, memory and work, bad input."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

from powerflow_fast.kernels.interface import kept_width
from powerflow_fast.kernels.la_tb_reference import group_log_z_ref, la_tb_loss_ref
from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref
from powerflow_fast.ops import linear_la_tb, linear_la_tb_loss, torch_backend
from powerflow_fast.ops.linear_la_tb import chunks_of_sequences

BACKENDS = ["torch", "triton"]
LENGTHS = (7, 0, 12, 3, 9, 1, 30)
GROUPS = (5, 5, 5, -1, -1, 8, 8)
V, H = 75, 24
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_call(dtype=torch.float32, *, lengths=LENGTHS, bias=True, old=True, group=False, seed=0, far=0.0):
    """(leaves, labels, sequences, options): random hidden states whose labels' log-probs are a language model's."""
    g = torch.Generator().manual_seed(seed)
    n, b = sum(lengths), len(lengths)
    leaves = {"hidden": torch.randn(n, H, generator=g), "weight": torch.randn(V, H, generator=g) * 0.4}
    if bias:
        leaves["bias"] = torch.randn(V, generator=g)
    leaves = {name: x.to(dtype) for name, x in leaves.items()}
    labels = torch.randint(V, (n,), generator=g)
    leaves["hidden"][::5] += far * leaves["weight"][labels[::5]]
    sums = torch.tensor([-4.5 * length for length in lengths])
    sequences = {
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "base_logps": sums - torch.rand(b, generator=g),
        "psi": -0.5 * (torch.rand(b, generator=g) < 0.5),
    }
    if old:
        sequences["old_logps"] = sums + torch.randn(b, generator=g)
    if group:
        sequences["group_ids"] = torch.tensor(GROUPS)
    else:
        leaves["log_z"] = torch.randn(b, generator=g)
    return leaves, labels, sequences, {"alpha": 3.0, "temperature": 0.8, "logit_scale": 1.25, "clip": (0.7, 1.5)}


def composed(leaves, labels, sequences, options, *, head=linear_logprobs_ref):
    """The documented equivalent, from the oracles."""
    sequences, options = dict(sequences), dict(options)
    alpha, clip = options.pop("alpha"), options.pop("clip")
    logps = head(leaves["hidden"], leaves["weight"], labels, bias=leaves.get("bias"), **options)
    group_ids, log_z = sequences.pop("group_ids", None), leaves.get("log_z")
    cu_seqlens, base_logps = sequences.pop("cu_seqlens"), sequences.pop("base_logps")
    if log_z is None:
        log_z = group_log_z_ref(logps.detach(), base_logps, group_ids, cu_seqlens, alpha=alpha, clip=clip, **sequences)
    return la_tb_loss_ref(logps, base_logps, log_z, cu_seqlens, alpha=alpha, clip=clip, **sequences)


def naive_head(hidden, weight, labels, *, bias=None, temperature, logit_scale, logit_softcap=None):
    """Logits in the inputs' dtype, fp32 log-softmax."""
    z = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return (z.float() / temperature).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def cast(tensors, dtype):
    return {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}


def run(call, frozen=(), **extra):
    """(outputs, gradients by name) of ``2 · loss``."""
    leaves, labels, sequences, options = call
    leaves = {name: x.detach().clone().requires_grad_(name not in frozen) for name, x in leaves.items()}
    arguments = {"bias": None, "log_z": None, **leaves, **sequences, **options, **extra}
    out = linear_la_tb_loss(labels=labels, **arguments)
    wanted = {name: x for name, x in leaves.items() if x.requires_grad}
    grads = torch.autograd.grad(2 * out.loss, list(wanted.values()))
    return type(out)(*(x.detach() for x in out)), dict(zip(wanted, grads, strict=True))


def expected(call, dtype, head=linear_logprobs_ref):
    leaves, labels, sequences, options = call
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in leaves.items()}
    out = composed(leaves, labels, cast(sequences, torch.promote_types(dtype, torch.float32)), options, head=head)
    grads = torch.autograd.grad(2 * out[0], list(leaves.values()))
    return [x.detach() for x in out], dict(zip(leaves, grads, strict=True))


def budget(rows, dtype):
    """``cache_bytes`` for so many rows, on the torch backend or in the interpreter."""
    return rows * kept_width(V) * 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(linear_la_tb, "_FEWEST_ROWS", 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("group", [False, True], ids=["learned", "group"])
@pytest.mark.parametrize("rows", [1000, 13, 0], ids=["one chunk", "chunks", "no cache"])
@pytest.mark.parametrize("softcap", [None, 6.0], ids=["plain", "softcap"])
def test_value_and_gradients(backend, dtype, group, rows, softcap, check_accuracy):
    call = make_call(dtype, group=group)
    call[3]["logit_softcap"] = softcap
    ours, grads = run(call, backend=backend, cache_bytes=budget(rows, dtype))
    exact, exact_grads = expected(call, torch.float64)
    torchs, torchs_grads = expected(call, dtype, naive_head)
    for name, a, t, e in zip(ours._fields, ours, torchs, exact, strict=True):
        assert a.dtype == torch.float32
        check_accuracy(a, t if dtype == torch.float32 else e, e, dtype, name)
    assert grads.keys() == exact_grads.keys()
    for name, e in exact_grads.items():
        assert grads[name].dtype == call[0][name].dtype
        check_accuracy(grads[name], torchs_grads[name], e, dtype, f"d_{name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("far", [40.0, -60.0])
def test_confident_and_very_unlikely_tokens(backend, far, check_accuracy):
    call = make_call(torch.float32, far=far)
    ours, grads = run(call, backend=backend)
    exact, exact_grads = expected(call, torch.float64)
    torchs, torchs_grads = expected(call, torch.float32, naive_head)
    for name, a, t, e in zip(ours._fields, ours, torchs, exact, strict=True):
        check_accuracy(a, t, e, torch.float32, name)
    for name, e in exact_grads.items():
        check_accuracy(grads[name], torchs_grads[name], e, torch.float32, f"d_{name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["hidden", "weight bias", "weight", "log_z bias", "hidden log_z"])
def test_only_what_needs_a_gradient(backend, frozen):
    call = make_call()
    _, some = run(call, frozen.split(), backend=backend)
    _, every = run(call, backend=backend)
    assert some.keys() == every.keys() - set(frozen.split())
    for name, grad in some.items():
        torch.testing.assert_close(grad, every[name], rtol=1e-5, atol=1e-6)


def test_nothing_needs_a_gradient():
    leaves, labels, sequences, options = make_call()
    out = linear_la_tb_loss(labels=labels, **leaves, **sequences, **options)
    assert not out.loss.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_repeat(backend):
    call = make_call(torch.bfloat16, group=True)
    first, grads = run(call, backend=backend, cache_bytes=budget(40, torch.bfloat16))
    again, grads_again = run(call, backend=backend, cache_bytes=budget(40, torch.bfloat16))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("group", [False, True])
def test_chunks_do_not_show(group):
    call = make_call(group=group)
    whole, whole_grads = run(call)
    for rows in (1, 9, 12, 20, 61):
        out, grads = run(call, cache_bytes=budget(rows, torch.float32))
        for a, b in zip(out, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        for name in grads:
            torch.testing.assert_close(grads[name], whole_grads[name], rtol=1e-5, atol=1e-6)


def test_micro_batches_add_up():
    leaves, labels, sequences, options = make_call(bias=False)
    _, whole = run((leaves, labels, sequences, {**options, "num_sequences": 6}))
    total = {name: torch.zeros_like(x) for name, x in leaves.items()}
    bounds = sequences["cu_seqlens"].tolist()
    for first, last in ((0, 3), (3, 7)):
        rows, which = slice(bounds[first], bounds[last]), slice(first, last)
        part = {"hidden": leaves["hidden"][rows], "weight": leaves["weight"], "log_z": leaves["log_z"][which]}
        cut = {name: x[which] for name, x in sequences.items() if name != "cu_seqlens"}
        cut["cu_seqlens"] = sequences["cu_seqlens"][first : last + 1] - bounds[first]
        _, grads = run((part, labels[rows], cut, {**options, "num_sequences": 6}))
        total["hidden"][rows] += grads["hidden"]
        total["weight"] += grads["weight"]
        total["log_z"][which] += grads["log_z"]
    for name, grad in whole.items():
        torch.testing.assert_close(total[name], grad, rtol=1e-5, atol=1e-6)


def test_backward_twice_and_second_derivatives_are_refused():
    leaves, labels, sequences, options = make_call()
    leaves = {name: x.requires_grad_() for name, x in leaves.items()}
    loss = linear_la_tb_loss(labels=labels, **leaves, **sequences, **options).loss
    (gradient,) = torch.autograd.grad(loss, leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_la_tb_loss: second derivatives are not available"):
        gradient.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_la_tb_loss: a second backward pass through one call"):
        torch.autograd.grad(loss, leaves["weight"])


def spied(monkeypatch):
    calls = []

    def recorded(name):
        def wrapper(*args, **kwargs):
            hidden = getattr(args[0], "hidden", args[0])  # of a HeadCall
            calls.append((name, hidden.shape[0]))
            return getattr(torch_backend, name)(*args, **kwargs)

        return wrapper

    names = [name for name in vars(torch_backend) if name.startswith("linear_logprob_")]
    spies = types.SimpleNamespace(
        kept_dtype=torch_backend.kept_dtype, scaled=torch_backend.scaled, **{name: recorded(name) for name in names}
    )
    monkeypatch.setattr(linear_la_tb, "implementation_for", lambda *_: spies)
    return calls


def test_no_logit_is_formed_twice_unless_a_sequence_is_too_long(monkeypatch):
    calls = spied(monkeypatch)
    run(make_call())
    assert calls == [("linear_logprob_fwd_exps", 62), ("linear_logprob_bwd_exps", 62)]
    calls.clear()
    run(make_call(), cache_bytes=budget(20, torch.float32))
    assert [n for name, n in calls if name.endswith("exps")] == [19, 19, 13, 13]
    assert [n for name, n in calls if not name.endswith("exps")] == [30, 30]


@pytest.mark.parametrize(
    ("lengths", "groups", "most", "chunks"),
    [
        ([3, 4, 5], None, 100, [(0, 3, 0, 12)]),
        ([3, 4, 5], None, 8, [(0, 2, 0, 7), (2, 3, 7, 12)]),
        ([9, 9, 1, 1], None, 8, [(0, 2, 0, 18), (2, 4, 18, 20)]),
        ([1, 9, 1], None, 8, [(0, 1, 0, 1), (1, 2, 1, 10), (2, 3, 10, 11)]),
        ([0, 0], None, 8, [(0, 2, 0, 0)]),
        ([2, 2, 2, 2], [0, 0, 1, 1], 5, [(0, 2, 0, 4), (2, 4, 4, 8)]),
        ([2, 2, 2, 2], [0, 1, 0, 1], 5, [(0, 4, 0, 8)]),
        ([2, 2, 2, 2], [7, 3, 3, 9], 5, [(0, 1, 0, 2), (1, 3, 2, 6), (3, 4, 6, 8)]),
    ],
)
def test_chunk_plans(lengths, groups, most, chunks):
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    assert list(chunks_of_sequences(bounds, groups, most)) == chunks


_PEAK = """
import resource, sys, torch
from powerflow_fast import linear_la_tb_loss
torch.set_num_threads(1)
n = int(sys.argv[1])
hidden, weight = torch.randn(8192, 64), torch.randn(32768, 64, requires_grad=True)
labels = torch.randint(0, 32768, (8192,))

def loss(n, length):
    cu = torch.arange(0, n + 1, length, dtype=torch.int32)
    zero = torch.zeros(len(cu) - 1)
    out = linear_la_tb_loss(hidden[:n], weight, labels[:n], cu, zero, zero, alpha=2.0, cache_bytes=64 * 2**20)
    out.loss.backward()

loss(256, 128)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loss(n, 128)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_is_bounded_by_the_cache():
    """fp32 logits of 8192 rows would be 1024 MiB; the cache holds 64."""
    command = [sys.executable, "-c", _PEAK]
    small, large = (
        int(subprocess.run([*command, str(n)], capture_output=True, text=True, check=True).stdout) for n in (1024, 8192)
    )
    assert large < 112 * 1024, f"{large // 1024} MiB"
    assert large - small < 24 * 1024, f"{small // 1024} MiB at 1024 rows, {large // 1024} MiB at 8192"


def test_autocast_acts_as_for_a_linear_layer():
    call = make_call()
    with torch.autocast("cpu", torch.bfloat16):
        out, grads = run(call)
    leaves, *rest = call
    rounded = {name: x if name == "log_z" else x.bfloat16() for name, x in leaves.items()}
    same, _ = run((rounded, *rest))
    assert all(torch.equal(a, b) for a, b in zip(out, same, strict=True))
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def bad(name, value, error, message):
    return pytest.param({name: value}, error, message, id=f"{name}={value if not hasattr(value, 'shape') else '...'}")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        bad(
            "labels", torch.tensor([1, -100, 2]), ValueError, r"labels must not hold ignored rows, got labels\[1\]=-100"
        ),
        bad("labels", torch.tensor([1, 5, 2]), ValueError, r"labels must lie in \[0, V\)=\[0, 5\), got labels\[1\]=5"),
        bad("alpha", 0.0, ValueError, "alpha must be finite and > 0"),
        bad("log_z", None, ValueError, "exactly one of log_z and group_ids must be given, got neither"),
        bad("group_ids", torch.zeros(1, dtype=torch.int64), ValueError, "log_z and group_ids must be given, got both"),
        bad("base_logps", torch.zeros(2), ValueError, r"base_logps must have shape \(B,\)=\(1,\), got \(2,\)"),
        bad("cu_seqlens", torch.tensor([0, 2], dtype=torch.int32), ValueError, "must rise from 0 to N=3"),
        bad("cu_seqlens", [0, 3], TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        bad("cache_bytes", -1, ValueError, "cache_bytes must be >= 0, got -1"),
        bad("cache_bytes", 1.5, TypeError, "cache_bytes must be an int, got float"),
        bad("weight", torch.zeros(5, 3), ValueError, "weight must have shape"),
        bad("hidden", None, TypeError, "hidden must be a torch.Tensor, got NoneType"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    good = {
        "hidden": torch.randn(3, 4),
        "weight": torch.randn(5, 4, requires_grad=True),
        "labels": torch.tensor([1, 0, 2]),
        "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32),
        "base_logps": torch.zeros(1),
        "log_z": torch.zeros(1),
        "alpha": 4.0,
    }
    linear_la_tb_loss(**good)
    with pytest.raises(error, match=f"^linear_la_tb_loss: .*{message}"):
        linear_la_tb_loss(**{**good, **arguments})


def test_bad_group_ids_are_named():
    leaves, labels, sequences, options = make_call(group=True)
    for group_ids, error in ((torch.zeros(3, dtype=torch.int64), ValueError), (torch.zeros(7), TypeError)):
        with pytest.raises(error, match=r"^linear_la_tb_loss: group_ids must"):
            linear_la_tb_loss(labels=labels, log_z=None, **leaves, **{**sequences, "group_ids": group_ids}, **options)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_bias_in_double_precision_is_trained_in_several_chunks(backend, dtype):
    generator = torch.Generator().manual_seed(0)
    n, v = 300, 60
    hidden, weight = (torch.randn(rows, 16, generator=generator).to(dtype) for rows in (n, v))
    bias = torch.randn(v, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(v, (n,), generator=generator)
    cu_seqlens = torch.arange(0, n + 1, n // 6, dtype=torch.int32)
    grads = []
    for cache_bytes in (None, 128 * 64 * 4):
        out = linear_la_tb_loss(
            *(hidden, weight.requires_grad_(), labels, cu_seqlens, torch.zeros(6), torch.zeros(6)),
            alpha=2.0,
            bias=bias,
            backend=backend,
            cache_bytes=cache_bytes,
        )
        grads.append(torch.autograd.grad(out.loss, [weight, bias]))
    assert grads[0][1].dtype == torch.float64
    for whole, cut in zip(*grads, strict=True):
        torch.testing.assert_close(cut, whole, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-3)


def test_a_float32_bias_beside_a_bf16_head_keeps_its_digits():
    """Complete products are rounded at once where the sums are bf16, and only there."""
    g = torch.Generator().manual_seed(0)
    n, v, h = 256, 300, 64
    cu = torch.tensor([0, 100, n], dtype=torch.int32)
    labels = torch.randint(v, (n,), generator=g)
    hidden, weight = (torch.randn(rows, h, generator=g).bfloat16() for rows in (n, v))
    sequences = (cu, torch.full((2,), -300.0), torch.zeros(2))

    def gradient(dtype):
        bias = torch.zeros(v, requires_grad=True)
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        loss = linear_la_tb_loss(*leaves, labels, *sequences, alpha=2.0, bias=bias).loss
        return torch.autograd.grad(loss, [*leaves, bias])[2]

    ours, exact = gradient(torch.bfloat16), gradient(torch.float32)
    bf16 = exact.bfloat16().float()
    assert not torch.equal(ours, ours.bfloat16().float()), "no sum was rounded to bf16"
    assert float((ours - exact).norm()) < 3 * float((bf16 - exact).norm())
