"""linear_logprobs, sequence_logprobs and linear_logprob_stats on every backend, against fp64 on the same inputs."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import types

import pytest
import torch

from powerflow_fast.errors import BackendUnavailableError
from powerflow_fast.kernels import interface
from powerflow_fast.kernels.linear_logprob_reference import linear_logprobs_ref
from powerflow_fast.ops import (
    backends,
    linear_logprob_stats,
    linear_logprobs,
    logprobs,
    logprobs_autograd,
    sequence_logprobs,
    torch_backend,
)
from powerflow_fast.ops.torch_products import products_for

BACKENDS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclasses.dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    d_logp: torch.Tensor
    options: dict

    def tensors(self, dtype=None, **trainable):
        """Leaves (hidden, weight, bias) in ``dtype``; pass e.g. weight=False to freeze one."""
        leaves = {"hidden": self.hidden, "weight": self.weight}
        if "bias" in self.options:
            leaves["bias"] = self.options["bias"]
        return {
            name: t.detach().to(dtype or t.dtype).clone().requires_grad_(trainable.get(name, True))
            for name, t in leaves.items()
        }

    def run(self, function, dtype=None, trainable=None, **extra):
        """Value and gradients of Σ d_logp · logp."""
        leaves = self.tensors(dtype, **(trainable or {}))
        options = {**self.options, **extra}
        if "bias" in leaves:
            options["bias"] = leaves["bias"]
        logp = function(leaves["hidden"], leaves["weight"], self.labels, **options)
        wanted = [t for t in leaves.values() if t.requires_grad]
        grads = iter(torch.autograd.grad((logp * self.d_logp.to(logp.dtype)).sum(), wanted))
        return logp.detach(), {name: next(grads) for name, t in leaves.items() if t.requires_grad}


def make_case(dtype, *, n=37, v=131, h=40, ignored=True, sharpness=1.0, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator)
    weight = torch.randn(v, h, generator=generator) * sharpness / h**0.5
    labels = torch.randint(0, v, (n,), generator=generator)
    if ignored:
        labels[1::5] = -100
    if options.pop("bias", False):
        options["bias"] = torch.randn(v, generator=generator).to(dtype)
    d_logp = torch.randn(n, generator=generator)
    return Case(hidden.to(dtype), weight.to(dtype), labels, d_logp, options)


def naive(hidden, weight, labels, **options):
    """What a training script does today: logits in the model's dtype, log-softmax in fp32."""
    keep = labels != -100
    temperature = options.pop("temperature", 1.0)
    scale, cap = options.pop("logit_scale", 1.0), options.pop("logit_softcap", None)
    logits = torch.nn.functional.linear(hidden, weight, options.get("bias")) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logp = torch.log_softmax(logits.float() / temperature, -1)
    return logp.gather(1, labels.where(keep, 0)[:, None])[:, 0].where(keep, 0.0)


def check(case, dtype, backend, check_accuracy, trainable=None):
    cache = {name: case.options.pop(name) for name in ("cache_bytes",) if name in case.options}
    exact, exact_grads = case.run(linear_logprobs_ref, torch.float64, trainable)
    torchs, torchs_grads = case.run(naive, None, trainable)
    ours, grads = case.run(linear_logprobs, None, trainable, backend=backend, **cache)
    assert ours.dtype == torch.float32
    # The value is fp32 whatever the inputs: it has to beat half-precision logits, not merely match them.
    check_accuracy(ours, exact if dtype != torch.float32 else torchs, exact, dtype, "logp")
    for name, exact_grad in exact_grads.items():
        assert grads[name].dtype == dtype
        check_accuracy(grads[name], torchs_grads[name], exact_grad, dtype, f"d_{name}")


TRANSFORMS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": 0.25},
    "softcap": {"logit_softcap": 4.0, "sharpness": 4.0},
    "bias": {"bias": True},
    "all": {"temperature": 1.3, "logit_scale": 0.5, "logit_softcap": 5.0, "bias": True, "sharpness": 4.0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("frozen", ["none", "head", "hidden"])
@pytest.mark.parametrize("cache", [{}, {"cache_bytes": 0}], ids=["usual", "no cache"])
def test_value_and_gradients(backend, dtype, transform, frozen, cache, check_accuracy):
    case = make_case(dtype, **TRANSFORMS[transform], **cache)
    trainable = {"none": {}, "head": {"weight": False, "bias": False}, "hidden": {"hidden": False}}[frozen]
    check(case, dtype, backend, check_accuracy, trainable)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [9, 1000])
@pytest.mark.parametrize("frozen", ["none", "hidden"])
def test_kept_exponentials(backend, dtype, rows, frozen, check_accuracy):
    """A trainable head with a cache for some or all of its rows, ignored ones among them."""
    case = make_case(dtype, logit_softcap=5.0, bias=True, sharpness=4.0)
    case.options["cache_bytes"] = rows * 131 * 4
    trainable = {"hidden": False} if frozen == "hidden" else {}
    ours, grads = case.run(linear_logprobs, None, trainable, backend=backend)
    del case.options["cache_bytes"]
    plain, _ = case.run(linear_logprobs, None, trainable, backend=backend)
    torch.testing.assert_close(ours, plain, rtol=2e-6, atol=2e-6)
    exact, exact_grads = case.run(linear_logprobs_ref, torch.float64, trainable)
    _, torchs_grads = case.run(naive, None, trainable)
    check_accuracy(ours, exact, exact, dtype, "logp")
    for name, exact_grad in exact_grads.items():
        check_accuracy(grads[name], torchs_grads[name], exact_grad, dtype, f"d_{name}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("n", "v", "h"), [(1, 1, 3), (1, 2, 1), (129, 7, 16), (5, 1025, 33), (64, 512, 64)])
def test_ragged_shapes(backend, n, v, h, check_accuracy):
    check(make_case(torch.float32, n=n, v=v, h=h, ignored=False), torch.float32, backend, check_accuracy)
    frozen_head = {"weight": False}
    case = make_case(torch.float32, n=n, v=v, h=h, ignored=False)
    check(case, torch.float32, backend, check_accuracy, frozen_head)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_no_rows_and_only_ignored_rows(backend, cache_bytes):
    for n, labels in ((0, torch.empty(0, dtype=torch.int64)), (3, torch.full((3,), -100))):
        for weight_needs_grad in (False, True):
            hidden = torch.randn(n, 8, requires_grad=True)
            weight = torch.randn(11, 8, requires_grad=weight_needs_grad)
            logp = linear_logprobs(hidden, weight, labels, backend=backend, cache_bytes=cache_bytes)
            logp.sum().backward()
            assert logp.tolist() == [0.0] * n
            assert hidden.grad.shape == (n, 8) and not hidden.grad.any()
            assert not weight_needs_grad or not weight.grad.any()


def special_row(gap, h=16, v=50, dtype=torch.float32):
    """One row whose label 3 is ``gap`` nats above (or, negative, below) every other logit, which lie within ±0.5."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(v, h, generator=generator) * 0.1
    weight[:, 0] = 0.0
    weight[3, 0] = gap
    hidden = torch.randn(1, h, generator=generator)
    hidden[:, 0] = 1.0
    return Case(hidden.to(dtype), weight.to(dtype), torch.tensor([3]), torch.ones(1), {})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("gap", [20.0, 26.0, -90.0, -120.0, -1000.0])
def test_extreme_tokens_keep_their_digits(backend, dtype, frozen, gap):
    """Confident tokens (1 − p < 1e-8) and tokens far below the maximum, value and gradient to relative accuracy."""
    case = special_row(gap, dtype=dtype)
    trainable = {"weight": not frozen}
    exact, exact_grads = case.run(linear_logprobs_ref, torch.float64, trainable)
    ours, grads = case.run(linear_logprobs, None, trainable, backend=backend)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=0)
    for name, exact_grad in exact_grads.items():
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
        # Values under the dtype's own smallest number cannot be told apart from it.
        floor = 2 * torch.finfo(dtype).tiny if dtype != torch.float16 else 1e-7
        error = (grads[name].double() - exact_grad).abs().max()
        assert error <= tolerance * exact_grad.abs().max() + floor, f"d_{name}: {error:.3e}"
        if dtype != torch.float16:
            assert grads[name].any(), f"d_{name} vanished"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_extreme_rows_among_ordinary_ones(backend, frozen, check_accuracy):
    case = make_case(torch.float32, n=40, v=300, h=24)
    case.hidden[::3] *= 60.0  # logits of several hundred: labels far below and far above the maximum
    check(case, torch.float32, backend, check_accuracy, {"weight": not frozen})


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_weight_sums_both_gradients(backend, check_accuracy):
    table = torch.randn(64, 16, dtype=torch.float64)
    tokens, labels = torch.randint(0, 64, (20,)), torch.randint(0, 64, (20,))

    def gradient(function, dtype, **options):
        leaf = table.to(dtype).requires_grad_()
        hidden = torch.nn.functional.embedding(tokens, leaf).tanh()
        return torch.autograd.grad(function(hidden, leaf, labels, **options).sum(), leaf)[0]

    exact = gradient(linear_logprobs_ref, torch.float64)
    torchs = gradient(naive, torch.float32)
    check_accuracy(gradient(linear_logprobs, torch.float32, backend=backend), torchs, exact, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    case = make_case(torch.float32, n=20, v=90, h=16)
    expected, grads = case.run(linear_logprobs, backend=backend)
    hidden = torch.stack([case.hidden, case.hidden], dim=-1)[..., 0].requires_grad_()
    weight = case.weight.t().contiguous().t().requires_grad_()
    labels = torch.stack([case.labels, case.labels], dim=-1)[:, 0]
    assert not hidden.is_contiguous() and not weight.is_contiguous() and not labels.is_contiguous()
    ours = linear_logprobs(hidden, weight, labels, backend=backend)
    (ours * case.d_logp).sum().backward()
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(hidden.grad, grads["hidden"], rtol=0, atol=2e-6)
    torch.testing.assert_close(weight.grad, grads["weight"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", [True, False])
def test_bits_repeat(backend, frozen):
    case = make_case(torch.bfloat16, n=70, v=300, h=32, bias=True)
    trainable = {"weight": not frozen, "bias": not frozen}
    first, first_grads = case.run(linear_logprobs, None, trainable, backend=backend)
    for _ in range(3):
        again, grads = case.run(linear_logprobs, None, trainable, backend=backend)
        assert torch.equal(first, again)
        assert all(torch.equal(first_grads[name], grads[name]) for name in grads)


@pytest.mark.parametrize("frozen", [True, False])
def test_torch_tiles_do_not_show(frozen, monkeypatch):
    case = make_case(torch.float32, n=20, v=60, h=24, bias=True, logit_softcap=6.0)
    trainable = {"weight": not frozen, "bias": not frozen}
    whole, whole_grads = case.run(linear_logprobs, None, trainable)
    products = type(products_for(case.hidden))
    for tile in ((1, 1), (7, 13), (20, 7), (3, 60)):
        monkeypatch.setattr(products, "tile_shape", lambda self, n, v, tile=tile: tile)
        tiled, tiled_grads = case.run(linear_logprobs, None, trainable)
        torch.testing.assert_close(tiled, whole, rtol=2e-6, atol=2e-6)
        for name in whole_grads:
            torch.testing.assert_close(tiled_grads[name], whole_grads[name], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_logprobs(backend):
    case = make_case(torch.float32, n=30)
    cu_seqlens = torch.tensor([0, 0, 12, 12, 29, 30, 30], dtype=torch.int32)
    hidden = case.hidden.clone().requires_grad_()
    sums = sequence_logprobs(hidden, case.weight, case.labels, cu_seqlens, backend=backend)
    tokens = linear_logprobs(case.hidden, case.weight, case.labels, backend=backend)
    bounds = cu_seqlens.tolist()
    expected = torch.stack([tokens[a:b].sum() for a, b in itertools.pairwise(bounds)])
    torch.testing.assert_close(sums, expected)
    upstream = torch.randn(6)
    sums.backward(upstream)
    twin = case.hidden.clone().requires_grad_()
    per_token = torch.repeat_interleave(upstream, cu_seqlens.diff().long())
    linear_logprobs(twin, case.weight, case.labels, backend=backend).backward(per_token)
    assert torch.equal(hidden.grad, twin.grad)


def test_no_wasted_work(monkeypatch):
    """A frozen head never runs the recomputing backward, and that one makes only the gradients that are needed."""
    calls, counts = [], []

    def recorded(name):
        function = getattr(torch_backend, name)

        def wrapper(*args, **kwargs):
            needs = {k: v for k, v in kwargs.items() if k.startswith("need_")}
            calls.append((name, needs))
            hidden = getattr(args[0], "hidden", args[0])  # of a HeadCall
            counts.append((name, hidden.shape[0]))
            return function(*args, **kwargs)

        return wrapper

    names = [name for name in vars(torch_backend) if name.startswith("linear_logprob_")]
    spies = types.SimpleNamespace(kept_dtype=torch_backend.kept_dtype, **{name: recorded(name) for name in names})
    monkeypatch.setattr(logprobs, "implementation_for", lambda *_: spies)
    case = make_case(torch.float32)
    case.run(linear_logprobs, None, {"weight": False})
    assert [name for name, _ in calls] == ["linear_logprob_fwd_d_hidden"]
    calls.clear()
    case.run(linear_logprobs, None, {"hidden": False})
    assert len(calls) == 2
    assert calls[1] == (
        "linear_logprob_bwd",
        {"need_d_hidden": False, "need_d_weight": True, "need_d_bias": False},
    )
    calls.clear()
    for dtype, kept in ((torch.float32, 1), (torch.float16, 0)):
        make_case(dtype).run(linear_logprobs, None, cache_bytes=1 << 20)
        assert sum(name == "linear_logprob_fwd_exps" for name, _ in calls) == kept
        assert sum(name == "linear_logprob_bwd_exps" for name, _ in calls) == kept
        calls.clear()
    counts.clear()
    make_case(torch.float32, ignored=False).run(linear_logprobs, None, cache_bytes=9 * 144 * 4)
    rows = {name.removeprefix("linear_logprob_"): n for name, n in counts}
    assert rows == {"fwd_exps": 9, "fwd": 28, "bwd_exps": 9, "bwd": 28}, "each row takes one of the two ways"
    calls.clear()
    with torch.no_grad():
        linear_logprobs(case.hidden.requires_grad_(), case.weight, case.labels)
    assert [name for name, _ in calls] == ["linear_logprob_fwd"]
    for trainable, expected in (({"weight": False}, ["fwd_d_hidden"]), ({}, ["fwd", "bwd"])):
        calls.clear()
        case.run(lambda *args, **options: linear_logprob_stats(*args, **options).logp, None, trainable)
        assert [name for name, _ in calls] == [f"linear_logprob_{name}" for name in expected]


@pytest.mark.parametrize(("dtype", "rows", "expected"), [("bf16", 9, False), ("bf16", 99, True), ("fp32", 99, False)])
def test_passes_that_add_up_do_so_in_fp32(monkeypatch, dtype, rows, expected):
    """One product of all rows rounds once by itself."""
    case = make_case({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    found, like = [], interface.HeadSums.like
    spy = types.SimpleNamespace(
        like=lambda *args, own_dtype: found.append(own_dtype) or like(*args, own_dtype=own_dtype)
    )
    monkeypatch.setattr(logprobs_autograd, "HeadSums", spy)
    case.run(linear_logprobs, None, cache_bytes=rows * 144 * products_for(case.hidden).operand_dtype.itemsize)
    assert found == [expected]


def test_what_is_kept_by_itself(monkeypatch):
    """bf16 on a CPU that multiplies it: all rows or none, by the bytes that they take and those that they save."""
    usual = logprobs_autograd.usual_cache_bytes
    hidden, weight = torch.zeros(100, 8).bfloat16(), torch.zeros(1000, 8).bfloat16()
    native = types.SimpleNamespace(kept_dtype=lambda hidden: hidden.dtype)
    assert usual(hidden, weight, native) == 0, "another backend"
    monkeypatch.setattr(logprobs_autograd, "torch_backend", native)
    assert usual(hidden, weight, native) == 100 * 1008 * 2
    assert usual(hidden.float(), weight.float(), native) == usual(hidden.half(), weight.half(), native) == 0
    monkeypatch.setattr(logprobs_autograd, "CPU_CACHE_BYTES", 100 * 1008 * 2 - 4 * 8000)
    assert usual(hidden, weight, native) == 100 * 1008 * 2
    monkeypatch.setattr(logprobs_autograd, "CPU_CACHE_BYTES", 100 * 1008 * 2 - 4 * 8000 - 1)
    assert usual(hidden, weight, native) == 0
    emulated = types.SimpleNamespace(kept_dtype=lambda hidden: torch.float32)
    monkeypatch.setattr(logprobs_autograd, "torch_backend", emulated)
    assert usual(hidden[:1], weight, emulated) == 0


def test_frozen_head_saves_one_gradient_and_nothing_else():
    case = make_case(torch.float32, n=64, v=500, h=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        linear_logprobs(case.hidden.requires_grad_(), case.weight, case.labels)
    assert saved == [(64, 8)]


def test_more_than_2_to_the_31_logits():
    """N·V = 2.4e9: no index may be 32-bit. Rows repeat, so every result is known from the first few."""
    n, v = 36_000, 66_000
    hidden = torch.randn(8, 2).repeat(n // 8, 1)
    weight, labels = torch.randn(v, 2), torch.tensor([0, 1, v // 2, v - 1]).repeat(n // 4)
    logp = linear_logprobs(hidden, weight, labels)
    exact = linear_logprobs_ref(hidden[:8].double(), weight.double(), labels[:8])
    torch.testing.assert_close(logp.view(-1, 8).double(), exact.expand(n // 8, 8), rtol=1e-5, atol=1e-5)


_PEAK = """
import resource, sys, torch
from powerflow_fast.ops import linear_logprobs
torch.set_num_threads(1)
hidden = torch.randn(8192, 64, requires_grad=True)
weight, labels = torch.randn(32768, 64), torch.randint(0, 32768, (8192,))
linear_logprobs(hidden[:4], weight, labels[:4]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_logprobs(hidden[:int(sys.argv[1])], weight, labels[:int(sys.argv[1])]).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_rows():
    """Eight times the rows add only their N x H gradients (fp32 logits of 8192 rows would be 1024 MiB)."""
    small, large = (
        int(subprocess.run([sys.executable, "-c", _PEAK, str(n)], capture_output=True, text=True, check=True).stdout)
        for n in (1024, 8192)
    )
    assert large < 80 * 1024, f"{large // 1024} MiB"
    assert large - small < 24 * 1024, f"{small // 1024} MiB at 1024 rows, {large // 1024} MiB at 8192"


def test_autocast_acts_as_for_a_linear_layer():
    case = make_case(torch.float32)
    leaves = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprobs(leaves["hidden"], leaves["weight"], case.labels)
    rounded = linear_logprobs(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels)
    assert ours.dtype == torch.float32 and torch.equal(ours, rounded)
    ours.sum().backward()
    assert leaves["hidden"].grad.dtype == torch.float32 and leaves["weight"].grad.dtype == torch.float32


def test_gradcheck_of_the_oracle_and_of_the_torch_backend():
    case = make_case(torch.float64, n=6, v=9, h=4, bias=True, logit_softcap=3.0, temperature=0.8)
    leaves = case.tensors()
    options = {"temperature": 0.8, "logit_softcap": 3.0}
    for function in (linear_logprobs_ref, linear_logprobs):
        assert torch.autograd.gradcheck(
            lambda h, w, b, function=function: function(h, w, case.labels, bias=b, **options), tuple(leaves.values())
        )
        assert torch.autograd.gradcheck(
            lambda h, function=function: function(h, case.weight, case.labels, **options), (leaves["hidden"],)
        )


@pytest.mark.parametrize("frozen", [True, False])
def test_second_derivatives_are_refused_where_they_are_used(frozen):
    case = make_case(torch.float32)
    leaves = case.tensors(weight=not frozen)
    total = linear_logprobs(leaves["hidden"], leaves["weight"], case.labels).sum()
    (gradient,) = torch.autograd.grad(total, leaves["hidden"], create_graph=True)
    total.backward(retain_graph=True)  # a graph that is not used again is fine
    with pytest.raises(RuntimeError, match="linear_logprobs: second derivatives are not available"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16_gradients_survive_a_loss_scale(backend):
    """A frozen head's gradient under fp16's smallest number, lifted back by a large upstream gradient."""
    case = special_row(20.0, dtype=torch.float16)
    grads = []
    for frozen in (True, False):
        leaves = case.tensors(weight=not frozen)
        logp = linear_logprobs(leaves["hidden"], leaves["weight"], case.labels, backend=backend)
        grads.append(torch.autograd.grad(logp, leaves["hidden"], torch.tensor([65536.0]))[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=2e-2, atol=1e-6)


H, W, Y = torch.randn(4, 8), torch.randn(16, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"hidden": H[0]}, ValueError, r"hidden must have two dimensions \(N, H\), got shape \(8,\)"),
        ({"hidden": H.numpy()}, TypeError, r"hidden must be a torch.Tensor, got ndarray"),
        ({"hidden": H.long()}, TypeError, r"hidden must be float32, bfloat16 or float16, got torch.int64"),
        ({"weight": W.half()}, TypeError, r"weight must have hidden's dtype torch.float32, got torch.float16"),
        ({"weight": W[:, :7]}, ValueError, r"weight must have shape \(V, H\)=\(16, 8\) to match hidden, got \(16, 7\)"),
        ({"labels": Y[:3]}, ValueError, r"labels must have shape \(N,\)=\(4,\), got \(3,\)"),
        ({"labels": Y.int()}, TypeError, r"labels must be torch.int64, got torch.int32"),
        ({"labels": Y + 13}, ValueError, r"labels must lie in \[0, V\)=\[0, 16\).* got labels\[3\]=16"),
        ({"labels": Y - 1}, ValueError, r"got labels\[0\]=-1"),
        ({"bias": torch.zeros(15)}, ValueError, r"bias must have shape \(V,\)=\(16,\), got \(15,\)"),
        ({"temperature": 0.0}, ValueError, r"temperature must be finite and > 0, got 0.0"),
        ({"temperature": float("nan")}, ValueError, r"temperature must be finite and > 0, got nan"),
        ({"logit_scale": "2"}, TypeError, r"logit_scale must be a number, got str"),
        ({"logit_softcap": -1.0}, ValueError, r"logit_softcap must be finite and > 0, got -1.0"),
        ({"cache_bytes": -1}, ValueError, r"cache_bytes must be >= 0, got -1"),
        ({"cache_bytes": True}, TypeError, r"cache_bytes must be an int, got bool"),
        ({"backend": "cuda"}, ValueError, r"backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
        ({"weight": W.to("meta")}, ValueError, r"weight must be on hidden's device cpu, got meta"),
    ],
)
def test_bad_input_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        linear_logprobs(**{"hidden": H, "weight": W, "labels": Y, **arguments})


def test_forced_triton_without_interpreter_says_why(monkeypatch):
    monkeypatch.setattr(backends, "_triton_state", lambda: (True, False, ""))
    with pytest.raises(BackendUnavailableError, match=r"need a CUDA tensor, got one on cpu.*TRITON_INTERPRET=1"):
        linear_logprobs(H, W, Y, backend="triton")
    monkeypatch.setattr(backends, "_triton_state", lambda: (False, False, "triton cannot be imported (no module)"))
    with pytest.raises(BackendUnavailableError, match="triton cannot be imported"):
        linear_logprobs(H, W, Y, backend="triton")
    assert linear_logprobs(H, W, Y).shape == (4,), "auto still runs"
