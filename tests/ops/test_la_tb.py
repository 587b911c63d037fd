"""la_tb_loss: value and gradient against the fp64 oracle, identities of the method, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from powerflow_fast.kernels.la_tb_reference import group_log_z_ref, la_tb_loss_ref
from powerflow_fast.ops import LATBOutput, extension, la_tb, la_tb_loss


@pytest.fixture(params=["compiled", "torch"])
def implementation(request, monkeypatch):
    """Every test that takes this runs on the compiled op and on the plain torch that stands in for it."""
    if request.param == "torch":
        monkeypatch.setattr(extension, "_STATUS", extension.ExtensionStatus(False, False, "hidden by the test"))
        monkeypatch.setattr(la_tb, "_warned", {"cpu"})
    elif not extension.extension_status().available:
        pytest.skip(extension.extension_status().reason)
    return request.param


def make_batch(lengths, *, dtype=torch.float64, seed=0, psi=False, old=False):
    """Inputs of la_tb_loss for completions of these lengths; log-ratios of a few tenths, on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(lengths, dtype=torch.int32)
    batch = len(lengths)

    def rand(n):
        return torch.rand(n, generator=g, dtype=torch.float64)

    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)])
    logps = (-3 * rand(int(lengths.sum()))).to(dtype).requires_grad_()
    sums = torch.stack([part.detach().double().sum() for part in logps.split(lengths.tolist())])
    inputs = {
        "logps": logps,
        "base_logps": (sums - lengths * rand(batch)).to(dtype),
        "log_z": (2 * rand(batch) - 1).to(dtype).requires_grad_(),
        "cu_seqlens": cu_seqlens,
    }
    options = {"psi": (-0.5 * (rand(batch) > 0.5)).to(dtype)} if psi else {}
    if old:
        options["old_logps"] = (sums + torch.linspace(-0.3, 0.3, batch)).to(dtype)
    return inputs, options


def as_double(inputs):
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if v.is_floating_point() else v
        for k, v in inputs.items()
    }


LENGTHS = [7, 1, 0, 130, 33, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("psi", [False, True])
@pytest.mark.parametrize("level", [None, "sequence", "length_normalized"])
def test_matches_the_oracle(implementation, dtype, psi, level, poisoned_memory):
    inputs, options = make_batch(LENGTHS, dtype=dtype, psi=psi, old=level is not None)
    options |= {"alpha": 2.5, "importance_level": level or "sequence", "clip": (0.9, 1.15)}
    exact_inputs, exact_options = (
        as_double(inputs),
        {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()},
    )
    out = la_tb_loss(**inputs, **options)
    exact = la_tb_loss_ref(**exact_inputs, **exact_options)
    leaves, exact_leaves = ([d["logps"], d["log_z"]] for d in (inputs, exact_inputs))
    grads = torch.autograd.grad(3 * out.loss, leaves)
    exact_grads = torch.autograd.grad(3 * exact[0], exact_leaves)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for name, ours, theirs in zip(
        (*LATBOutput._fields, "d_logps", "d_log_z"), (*out, *grads), (*exact, *exact_grads), strict=True
    ):
        assert ours.dtype == dtype and ours.shape == theirs.shape, name
        assert torch.allclose(ours.double(), theirs, rtol=tolerance, atol=tolerance), name
    if level == "sequence":
        w = out.weight[out.weight > 0]
        assert w.min() == torch.tensor(0.9, dtype=dtype) and w.max() == torch.tensor(1.15, dtype=dtype)
        assert ((w > 0.9) & (w < 1.15)).any(), "the batch must also hold ratios inside the bounds"


def test_only_the_loss_is_differentiable(implementation):
    inputs, options = make_batch([3, 4], old=True)
    out = la_tb_loss(**inputs, **options, alpha=2.0)
    assert [x.requires_grad for x in out] == [True, False, False, False]


@pytest.mark.parametrize("level", ["sequence", "length_normalized"])
def test_gradcheck(implementation, level):
    inputs, options = make_batch([5, 0, 3], psi=True)
    old = options | {"alpha": 4.0, "importance_level": level}

    def loss(logps, log_z):
        # w is detached, so numerical differentiation must see it as the constant that it is: old is far away
        far = {"old_logps": torch.full((3,), 50.0, dtype=torch.float64)}
        return la_tb_loss(**(inputs | {"logps": logps, "log_z": log_z}), **old, **far).loss

    assert torch.autograd.gradcheck(loss, (inputs["logps"], inputs["log_z"]))


def test_micro_batches_add_up_to_the_step(implementation):
    inputs, options = make_batch([4, 9, 0, 6, 2], psi=True, old=True)
    whole = la_tb_loss(**inputs, **options, alpha=4.0)
    whole_grads = torch.autograd.grad(whole.loss, [inputs["logps"], inputs["log_z"]])
    cu = inputs["cu_seqlens"]
    losses = []
    for rows in (slice(0, 1), slice(1, 5)):
        bounds = cu[rows.start : rows.stop + 1]
        part = {
            "logps": inputs["logps"][bounds[0] : bounds[-1]],
            "base_logps": inputs["base_logps"][rows],
            "log_z": inputs["log_z"][rows],
            "cu_seqlens": bounds - bounds[0],
        }
        part_options = {k: v[rows] for k, v in options.items()}
        losses.append(la_tb_loss(**part, **part_options, alpha=4.0, num_sequences=4).loss)
    torch.testing.assert_close(sum(losses), whole.loss, rtol=1e-14, atol=0)
    for ours, exact in zip(
        torch.autograd.grad(sum(losses), [inputs["logps"], inputs["log_z"]]), whole_grads, strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-14, atol=1e-16)


def test_gradient_is_twice_that_of_grpo_with_group_log_z(implementation):
    """w = 1, log Z' of the group: 2x GRPO without std normalisation, its reward α(r+ψ)−s held constant."""
    inputs, options = make_batch([6, 3, 8, 5, 4, 7], psi=True)
    groups = torch.tensor([0, 1, 0, 1, 1, 0])
    lengths = inputs["cu_seqlens"].diff()
    fixed = inputs | {
        "log_z": group_log_z_ref(
            **{k: inputs[k] for k in ("logps", "base_logps", "cu_seqlens")}, group_ids=groups, alpha=4.0, **options
        )
    }
    (ours,) = torch.autograd.grad(la_tb_loss(**fixed, **options, alpha=4.0).loss, inputs["logps"])

    s = torch.stack([part.mean() for part in inputs["logps"].split(lengths.tolist())])
    reward = (4.0 * (inputs["base_logps"] / lengths + options["psi"]) - s).detach()
    advantage = torch.stack([reward[i] - reward[groups == groups[i]].mean() for i in range(6)])
    grpo = -(advantage * s).mean()  # on-policy: the ratio is 1, its gradient that of the log-prob
    (theirs,) = torch.autograd.grad(grpo, inputs["logps"])
    torch.testing.assert_close(ours, 2 * theirs, rtol=0, atol=1e-15)


def test_equals_tb_over_squared_length_at_equal_lengths(implementation):
    """With T tokens each and log Z = T log Z', TB's squared residual of the whole sequence is T² times LA-TB's."""
    length, alpha = 5, 0.5
    inputs, _ = make_batch([length] * 4)
    out = la_tb_loss(**inputs, alpha=alpha)
    log_pi = inputs["logps"].view(4, length).sum(1)
    tb = (length * inputs["log_z"] + log_pi - alpha * inputs["base_logps"]).square().mean()
    torch.testing.assert_close(out.loss, tb / length**2, rtol=1e-14, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, [inputs["logps"], inputs["log_z"]]),
        torch.autograd.grad(tb, [inputs["logps"], inputs["log_z"]]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs / length**2, rtol=1e-13, atol=1e-16)


def test_no_gradient_at_the_optimum(implementation):
    inputs, options = make_batch([4, 6], psi=True)
    lengths = inputs["cu_seqlens"].diff()
    s = torch.stack([part.mean() for part in inputs["logps"].detach().split(lengths.tolist())])
    target = 2.0 * (inputs["base_logps"] / lengths + options["psi"])
    inputs["log_z"] = (target - s).requires_grad_()
    out = la_tb_loss(**inputs, **options, alpha=2.0)
    grads = torch.autograd.grad(out.loss, [inputs["logps"], inputs["log_z"]])
    assert out.loss < 1e-28 and all(g.abs().max() < 1e-14 for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ratios_of_any_size_are_clipped(implementation, dtype):
    inputs, _ = make_batch([3, 3, 3, 3, 3], dtype=dtype)
    sums = inputs["logps"].detach().view(5, 3).sum(1)
    shift = torch.tensor([200.0, -200.0, 5e4, -math.inf, math.inf], dtype=dtype)
    out = la_tb_loss(**inputs, alpha=4.0, old_logps=sums - shift, clip=(0.8, 1.2))
    torch.testing.assert_close(out.weight, torch.tensor([1.2, 0.8, 1.2, 0.8, 1.2], dtype=dtype), rtol=1e-7, atol=0)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(out.loss, [inputs["logps"], inputs["log_z"]]))
    zero = la_tb_loss(**inputs, alpha=4.0, old_logps=sums - shift, clip=(0, 1.2))
    assert zero.weight[1] < 1e-30 and torch.isfinite(zero.loss)


def test_length_normalized_ratio_is_the_geometric_mean(implementation):
    inputs, _ = make_batch([4])
    old = inputs["logps"].detach().sum()[None] - 0.4
    options = {"alpha": 1.0, "old_logps": old, "clip": (0.5, 2.0)}
    assert la_tb_loss(**inputs, **options).weight.item() == pytest.approx(math.exp(0.4), rel=1e-12)
    normalised = la_tb_loss(**inputs, **options, importance_level="length_normalized")
    assert normalised.weight.item() == pytest.approx(math.exp(0.1), rel=1e-12)


@pytest.mark.parametrize("lengths", [[0, 3, 0, 5, 0], [0, 0], []])
def test_empty_completions_contribute_nothing(implementation, lengths):
    inputs, _ = make_batch(lengths or [1])
    if not lengths:
        inputs = {k: v[:0].detach().requires_grad_(v.requires_grad) for k, v in inputs.items()}
        inputs["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
    empty = torch.tensor([length == 0 for length in lengths], dtype=torch.bool)
    inputs["base_logps"][empty] = math.nan  # nothing of an empty completion may be looked at
    out = la_tb_loss(**inputs, alpha=4.0, old_logps=inputs["base_logps"])
    d_logps, d_log_z = torch.autograd.grad(out.loss, [inputs["logps"], inputs["log_z"]])
    for per_sequence in (*out[1:], d_log_z):
        assert (per_sequence[empty] == 0).all() and torch.isfinite(per_sequence).all()
    assert d_logps.shape == inputs["logps"].shape and torch.isfinite(d_logps).all()
    kept = [length for length in lengths if length]
    if not kept:
        assert out.loss == 0
        return
    alone = {k: v[~empty].detach() for k, v in inputs.items() if k in ("base_logps", "log_z")}
    cu = torch.tensor([0, *kept], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    without = la_tb_loss(inputs["logps"], **alone, cu_seqlens=cu, alpha=4.0, old_logps=alone["base_logps"])
    assert out.loss == without.loss and (d_log_z[~empty] != 0).all()


def test_long_sums_keep_their_digits(implementation):
    """8192 tokens of about -10 nats in fp32: a running fp32 sum is off by tenths of a nat, and so is the ratio."""
    logps = -10 * torch.rand(2 * 8192, generator=torch.Generator().manual_seed(0))
    cu = torch.tensor([0, 8192, 16384], dtype=torch.int32)
    exact = logps.double().view(2, -1).sum(1)
    out = la_tb_loss(logps, torch.zeros(2), torch.zeros(2), cu, alpha=1.0)
    assert ((out.logp_mean.double() * 8192 - exact).abs() < 5e-3).all()  # what rounding the mean to fp32 allows
    old = (exact - 0.1).float()
    ratio = la_tb_loss(logps, torch.zeros(2), torch.zeros(2), cu, alpha=1.0, old_logps=old).weight.double()
    torch.testing.assert_close(ratio, (exact - old.double()).exp(), rtol=1e-6, atol=0)


def test_non_finite_input_is_not_hidden(implementation):
    inputs, options = make_batch([3, 3], old=True)
    for bad in (math.nan, math.inf, -math.inf):
        broken = inputs | {"logps": inputs["logps"].detach().clone()}
        broken["logps"][4] = bad
        out = la_tb_loss(**broken, **options, alpha=2.0)
        assert not torch.isfinite(out.loss) and torch.isfinite(out.delta[0])


def test_strided_inputs(implementation):
    inputs, options = make_batch([5, 2, 4], psi=True, old=True)
    dense = la_tb_loss(**inputs, **options, alpha=3.0)
    every_other = {
        k: torch.stack([v.detach(), v.detach() * 0], -1)[:, 0].requires_grad_(v.requires_grad)
        for k, v in (inputs | options).items()
    }
    assert not every_other["logps"].is_contiguous()
    strided = la_tb_loss(**every_other, alpha=3.0)
    assert all(torch.equal(a, b) for a, b in zip(dense, strided, strict=True))
    (a,), (b,) = (torch.autograd.grad(o.loss, [d["logps"]]) for o, d in ((dense, inputs), (strided, every_other)))
    assert torch.equal(a, b)


def test_autocast_changes_nothing(implementation):
    inputs, options = make_batch([5, 2], dtype=torch.float32, old=True)
    plain = la_tb_loss(**inputs, **options, alpha=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = la_tb_loss(**inputs, **options, alpha=3.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    seed=st.integers(0, 2**16),
    alpha=st.floats(0.1, 8.0),
    psi=st.booleans(),
    old=st.booleans(),
    level=st.sampled_from(["sequence", "length_normalized"]),
    total=st.one_of(st.none(), st.integers(1, 64)),
)
def test_any_packing_matches_the_oracle(lengths, seed, alpha, psi, old, level, total):
    inputs, options = make_batch(lengths, seed=seed, psi=psi, old=old)
    options |= {"alpha": alpha, "importance_level": level, "num_sequences": total}
    leaves = [inputs["logps"], inputs["log_z"]]
    ours, exact = la_tb_loss(**inputs, **options), la_tb_loss_ref(**inputs, **options)
    for a, b in zip(
        (*ours, *torch.autograd.grad(ours.loss, leaves)), (*exact, *torch.autograd.grad(exact[0], leaves)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def bad(name, value, error, *parts):
    return pytest.param(name, value, error, parts, id=f"{name}={value if not torch.is_tensor(value) else 'tensor'}")


@pytest.mark.parametrize(
    ("name", "value", "error", "parts"),
    [
        bad("alpha", 0.0, ValueError, "0.0"),
        bad("alpha", -1.0, ValueError, "-1.0"),
        bad("alpha", math.nan, ValueError, "nan"),
        bad("alpha", math.inf, ValueError, "inf"),
        bad("alpha", "4", TypeError, "str"),
        bad("clip", (1.2, 0.8), ValueError, "0 <= low <= 1 <= high", "(1.2, 0.8)"),
        bad("clip", (-0.1, 1.2), ValueError, "-0.1"),
        bad("clip", (0.8, math.inf), ValueError, "inf"),
        bad("clip", (0.8, math.nan), ValueError, "nan"),
        bad("clip", (1.1, 1.2), ValueError, "1.1"),
        bad("clip", 0.2, TypeError, "0.2"),
        bad("clip", (0.8, 1.0, 1.2), TypeError, "(0.8, 1.0, 1.2)"),
        bad("importance_level", "token", ValueError, "'token'", "length_normalized"),
        bad("num_sequences", -1, ValueError, "-1"),
        bad("num_sequences", 2.0, TypeError, "float"),
        bad("num_sequences", True, TypeError, "bool"),
        bad("logps", [0.0], TypeError, "list"),
        bad("logps", torch.zeros(2, 3), ValueError, "(N,)", "(2, 3)"),
        bad("logps", torch.zeros(6, dtype=torch.bfloat16), TypeError, "bfloat16"),
        bad("base_logps", torch.zeros(3), ValueError, "(B,)=(2,)", "(3,)"),
        bad("base_logps", torch.zeros(2, dtype=torch.float64), TypeError, "float64"),
        bad("base_logps", None, TypeError, "NoneType"),
        bad("log_z", torch.zeros(()), ValueError, "(B,)=(2,)", "()"),
        bad("log_z", torch.zeros(2, device="meta"), ValueError, "device", "meta"),
        bad("psi", torch.zeros(1), ValueError, "(B,)=(2,)", "(1,)"),
        bad("psi", -0.5, TypeError, "float"),
        bad("old_logps", torch.zeros(2, 1), ValueError, "(2, 1)"),
        bad("cu_seqlens", torch.tensor([0, 2, 6]), TypeError, "int32", "int64"),
        bad("cu_seqlens", torch.zeros(0, dtype=torch.int32), ValueError, "(B+1,)", "(0,)"),
        bad("cu_seqlens", torch.tensor([0, 2, 6], dtype=torch.int32, device="meta"), ValueError, "device"),
        bad("cu_seqlens", torch.tensor([1, 2, 6], dtype=torch.int32), ValueError, "0 to N=6", "[1, 2, 6]"),
        bad("cu_seqlens", torch.tensor([0, 2, 5], dtype=torch.int32), ValueError, "N=6", "5"),
        bad("cu_seqlens", torch.tensor([0, 7, 6], dtype=torch.int32), ValueError, "[0, 7, 6]"),
    ],
)
def test_bad_arguments(name, value, error, parts):
    good = {
        "logps": torch.zeros(6),
        "base_logps": torch.zeros(2),
        "log_z": torch.zeros(2),
        "cu_seqlens": torch.tensor([0, 2, 6], dtype=torch.int32),
        "alpha": 4.0,
    }
    la_tb_loss(**good)
    with pytest.raises(error) as caught:
        la_tb_loss(**(good | {name: value}))
    message = str(caught.value)
    assert message.startswith("la_tb_loss: ") and name in message
    assert all(part in message for part in parts), message
