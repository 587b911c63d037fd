"""`linear_logprobs` under torch.compile(fullgraph=True) and torch.export: same bits as eager, no graph break."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import powerflow_fast
from powerflow_fast.kernels.interface import HeadCall, LogitTransform
from powerflow_fast.ops import logprobs, logprobs_custom_ops, torch_backend
from powerflow_fast.ops.backends import implementation_for

V, H = 37, 16
ROW = 48 * 4  # bytes of one kept row
NUMBERS = {"temperature": 0.7, "logit_scale": 1.3, "logit_softcap": 4.0}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def tensors(n=13, *, trainable=("hidden",), dtype=torch.float32, seed=0):
    """hidden, weight, labels (two ignored), bias."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=g).to(dtype) for shape in ((n, H), (V, H), (V,)))
    labels = torch.randint(0, V, (n,), generator=g)
    labels[1:3] = -100
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(name in trainable)
    return hidden, weight, labels, bias


def outcome(function, inputs, **options):
    """Value and gradients of a function of hidden, weight, labels, bias, with an upstream gradient of its own."""
    logp = function(*inputs, **options)
    leaves = [t for t in inputs if t.requires_grad]
    upstream = torch.linspace(-1, 2, logp.shape[0])
    return [logp.detach(), *torch.autograd.grad(logp, leaves, upstream)]


def eager(hidden, weight, labels, bias, **options):
    return powerflow_fast.linear_logprobs(hidden, weight, labels, bias=bias, **options)


def operator(
    hidden,
    weight,
    labels,
    bias,
    *,
    temperature=1.0,
    logit_scale=1.0,
    logit_softcap=None,
    ignore_index=-100,
    backend="auto",
    cache_bytes=None,
):
    """`linear_logprobs` by the operators that a compiler would take, with or without one."""
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    call = HeadCall(hidden, weight, labels, bias, transform, ignore_index)
    return logprobs.scored("linear_logprobs", call, backend, cache_bytes, stats=False, by_operator=True)[0]


def assert_same_bits(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


TRAINABLE = [("hidden",), ("hidden", "weight", "bias"), ("weight",), ("hidden", "bias")]


@pytest.mark.parametrize("trainable", TRAINABLE, ids="+".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_eager_bits(trainable, dtype):
    for options in ({}, NUMBERS, {"cache_bytes": 5 * ROW}, {"cache_bytes": 10**6, **NUMBERS}):
        inputs = tensors(trainable=trainable, dtype=dtype)
        assert_same_bits(outcome(operator, inputs, **options), outcome(eager, inputs, **options))
    assert not operator(*tensors(trainable=())).requires_grad
    with torch.no_grad():
        assert torch.equal(operator(*inputs), eager(*inputs))


@pytest.mark.parametrize("trainable", TRAINABLE[:2], ids="+".join)
def test_the_triton_backend_has_its_bits_too(trainable):
    """Its launchers return rows of one tensor, which an operator must not."""
    inputs = tensors(trainable=trainable)
    options = {"backend": "triton", "temperature": 0.7}
    assert_same_bits(outcome(operator, inputs, **options), outcome(eager, inputs, **options))


@pytest.mark.parametrize("cache_bytes", [0, 5 * ROW, 10**6])
@pytest.mark.parametrize("trainable", [(), *TRAINABLE], ids=lambda names: "+".join(names) or "nothing")
@pytest.mark.parametrize("need_stats", [False, True])
def test_opcheck(trainable, cache_bytes, need_stats):
    inputs = hidden, weight, labels, bias = tensors(trainable=trainable)
    ops, options = torch.ops.powerflow_fast, (0.7, 1.0, 4.0, -100, "auto")
    torch.library.opcheck(ops.linear_logprobs_forward.default, (*inputs, *options, need_stats, cache_bytes))
    if trainable == ("hidden",) and not cache_bytes:
        torch.library.opcheck(ops.linear_logprobs_unit.default, (*inputs[:3], None, *options, need_stats))
    if not trainable:
        logp, kept, others, stats = ops.linear_logprobs_forward(*inputs, *options, need_stats, cache_bytes)
        assert len(stats) == 3 * need_stats and len(kept) == 3 * (cache_bytes > 0) and len(others) == 3
        for positions in ([0], [1, 3], [0, 1, 3]):
            arguments = (hidden, weight, labels, bias, *options, kept, others, torch.ones_like(logp), positions)
            torch.library.opcheck(ops.linear_logprobs_backward.default, arguments)


@pytest.mark.parametrize("trainable", TRAINABLE[:3], ids="+".join)
@pytest.mark.parametrize("cache_bytes", [0, 5 * ROW])
def test_compiles_to_one_graph_with_a_dynamic_number_of_rows(trainable, cache_bytes):
    def step(function):
        def run(hidden, weight, labels, bias):
            return 3 * function(hidden * 2, weight, labels, bias, cache_bytes=cache_bytes, **NUMBERS)

        return run

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(step(operator), fullgraph=True, backend=counter)
    for n in (13, 7, 64):
        inputs = tensors(n, trainable=trainable, seed=n)
        torch._dynamo.mark_dynamic(inputs[0], 0)
        torch._dynamo.mark_dynamic(inputs[2], 0)
        assert_same_bits(outcome(run, inputs), outcome(step(eager), inputs))
    assert counter.frame_count == 1


def test_the_public_functions_compile_whole():
    """They hand over to the operators where a compiler looks."""
    offsets = torch.tensor([0, 5, 5, 13], dtype=torch.int32)

    def sums(hidden, weight, labels, bias):
        return powerflow_fast.sequence_logprobs(hidden, weight, labels, offsets, bias=bias)

    for function in (eager, sums):
        counter = CompileCounterWithBackend("aot_eager")
        run = torch.compile(function, fullgraph=True, backend=counter)
        inputs = tensors(trainable=("hidden", "weight"))
        assert_same_bits(outcome(run, inputs), outcome(function, inputs))
        assert counter.frame_count == 1


@pytest.mark.parametrize("trainable", [(), *TRAINABLE[:3]], ids=lambda names: "+".join(names) or "nothing")
@pytest.mark.parametrize("cache_bytes", [0, 5 * ROW])
def test_statistics_compile_whole(trainable, cache_bytes):
    def stats(hidden, weight, labels, bias):
        found = powerflow_fast.linear_logprob_stats(hidden, weight, labels, bias=bias, cache_bytes=cache_bytes)
        return type(found)(found.logp, found.lse, 2 * found.entropy, found.mean_logit)

    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(stats, fullgraph=True, backend=counter)
    inputs = tensors(trainable=trainable)
    for ours, theirs in zip(run(*inputs), stats(*inputs), strict=True):
        assert torch.equal(ours, theirs)
    assert counter.frame_count == 1
    if trainable:
        assert_same_bits(outcome(lambda *x: run(*x).logp, inputs), outcome(lambda *x: stats(*x).logp, inputs))


def test_numbers_may_change_between_calls():
    run = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    inputs = tensors()
    for temperature in (0.7, 0.9, 1.0):
        assert_same_bits(outcome(run, inputs, temperature=temperature), outcome(eager, inputs, temperature=temperature))


def test_compiles_inside_autocast():
    def step(function, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs, cache_bytes=0)

    run = torch.compile(lambda *inputs: step(operator, inputs), fullgraph=True, backend="aot_eager")
    inputs = tensors(trainable=("hidden", "weight"))
    ours = outcome(run, inputs)
    assert_same_bits(ours, outcome(lambda *inputs: step(eager, inputs), inputs))
    assert not torch.equal(ours[0], eager(*inputs)), "autocast must have rounded the inputs"


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (("hidden",), ["linear_logprob_fwd_d_hidden"]),
        (("hidden", "weight"), ["linear_logprob_fwd", "linear_logprob_bwd"]),
        ((), ["linear_logprob_fwd"]),
    ],
    ids=["frozen head", "trained head", "no gradient"],
)
def test_compiled_code_runs_each_pass_once(monkeypatch, trainable, expected):
    calls = []

    class Recorded:
        def __init__(self, implementation):
            self.implementation = implementation

        def __getattr__(self, name):
            if name.startswith("linear"):
                calls.append(name)
            return getattr(self.implementation, name)

    monkeypatch.setattr(logprobs_custom_ops, "implementation_for", lambda *args: Recorded(implementation_for(*args)))
    run = torch.compile(lambda *inputs: operator(*inputs).exp(), fullgraph=True, backend="aot_eager")
    inputs = tensors(trainable=trainable)
    for _ in range(2):  # the first call also traces
        calls.clear()
        logp = run(*inputs)
        if trainable:
            logp.sum().backward()
    assert calls == expected


@pytest.mark.parametrize("cache_bytes", [None, 10**6])
def test_nothing_is_kept_without_a_gradient(monkeypatch, cache_bytes):
    monkeypatch.setattr(torch_backend, "linear_logprob_fwd_exps", None)
    inputs = tensors(trainable=("hidden", "weight"), dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(operator(*inputs, cache_bytes=cache_bytes), eager(*inputs, cache_bytes=cache_bytes))
    assert operator(*tensors(trainable=("hidden",)), cache_bytes=cache_bytes).requires_grad


def test_no_rows_and_no_counted_rows():
    for n in (0, 3):
        hidden, weight, labels, bias = tensors(n, trainable=("hidden", "weight"))
        labels.fill_(-100)
        for cache_bytes in (0, 5 * ROW):
            logp, d_hidden, d_weight = outcome(operator, (hidden, weight, labels, bias), cache_bytes=cache_bytes)
            assert logp.shape == (n,) and not logp.any() and not d_hidden.any() and not d_weight.any()
    hidden, weight, labels, bias = tensors(0)
    assert outcome(operator, (hidden, weight, labels, bias))[1].shape == (0, H)


def test_errors_are_those_of_the_eager_function():
    hidden, weight, labels, bias = tensors()
    far = labels.clone()
    far[4] = V
    wrong = [
        ({"labels": far}, ValueError, r"linear_logprobs: labels must lie in .*labels\[4\]=37"),
        ({"labels": labels[:3]}, ValueError, r"labels must have shape \(N,\)=\(13,\), got \(3,\)"),
        ({"temperature": 0.0}, ValueError, "linear_logprobs: temperature must be finite and > 0"),
        ({"logit_softcap": -1.0}, ValueError, "linear_logprobs: logit_softcap must be finite and > 0"),
        ({"weight": weight.double()}, TypeError, "weight must have hidden's dtype"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton'"),
        ({"cache_bytes": -1}, ValueError, "cache_bytes must be >= 0"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index must be an int"),
    ]
    for change, error, message in wrong:
        arguments = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change
        with pytest.raises(error, match=message):
            operator(**arguments)


def test_compiled_code_checks_values_when_it_runs():
    run = torch.compile(operator, fullgraph=True, backend="aot_eager")
    hidden, weight, labels, bias = tensors()
    run(hidden, weight, labels, bias)
    far = labels.clone()
    far[4] = V
    with pytest.raises(ValueError, match=r"linear_logprobs: labels must lie in .*labels\[4\]=37"):
        run(hidden, weight, far, bias)
    with pytest.raises(ValueError, match="linear_logprobs: temperature must be finite and > 0, got -1"):
        run(hidden, weight, labels, bias, temperature=-1.0)


@pytest.mark.parametrize("trainable", TRAINABLE[:2], ids="+".join)
def test_second_derivatives_are_refused(trainable):
    inputs = tensors(trainable=trainable)
    (grad,) = torch.autograd.grad(operator(*inputs).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="linear_logprobs: second derivatives are not available"):
        (inputs[0].square().sum() + grad.square().sum()).backward()


@pytest.mark.slow
@pytest.mark.parametrize("trainable", TRAINABLE[:2], ids="+".join)
def test_compiles_with_inductor(trainable):
    def step(function, hidden, weight, labels, bias):
        return function(torch.tanh(hidden), weight, labels, bias, cache_bytes=5 * ROW) * 2

    run = torch.compile(lambda *inputs: step(operator, *inputs), fullgraph=True, dynamic=True)
    for n in (13, 29):
        inputs = tensors(n, trainable=trainable)
        theirs = outcome(lambda *inputs: step(eager, *inputs), inputs)
        for a, b in zip(outcome(run, inputs), theirs, strict=True):
            torch.testing.assert_close(a, b)
