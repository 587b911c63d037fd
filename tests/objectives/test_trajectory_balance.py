"""The trajectory-balance family against loops in fp64: values, gradients, partitions, divisors, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from objective_oracle import RESIDUALS, change, exact, leaves, make, oracle

from powerflow_fast import objectives as family
from powerflow_fast.objectives import ObjectiveOutput, residual_losses, sub_trajectory_balance
from powerflow_fast.ops.segments import prefix_sums

CASES = [
    ("la_tb", {}),
    ("tb", {}),
    ("log_variance_tb", {}),
    ("relative_tb", {"beta": 2.0}),
    ("flowrl", {"beta": 0.7}),
    ("flowrl", {"beta": 0.7, "scale_rewards": "none"}),
    ("token_tb", {}),
    ("subtb", {}),
    ("subtb", {"lam": 1.0}),
    ("subtb", {"lam": 2.5}),
]
ALL_RESIDUALS = [(name, o | {"residual_loss": g}) for name, o in CASES[:8] for g in RESIDUALS]
CLOSED = [c for c in ALL_RESIDUALS if c[0] != "subtb"] + CASES[7:]
"""Those whose log Z a group gives."""


def identify(case):
    return "-".join([case[0], *(f"{v}" for v in case[1].values())])


def run(name, t, options):
    out = getattr(family, name)(t, **options)
    assert isinstance(out, ObjectiveOutput)
    return out, torch.autograd.grad(out.loss, leaves(t), allow_unused=name == "log_variance_tb")


def compare(name, t, options, tolerance):
    same = exact(t)
    loss, log_z = oracle(name, same, **options)
    expected = torch.autograd.grad(loss, leaves(same), allow_unused=name == "log_variance_tb")
    out, grads = run(name, t, options)
    for ours, theirs in (
        (out.loss, loss),
        *zip(grads, expected, strict=True),
        (out.log_z[t.has_tokens], log_z[t.has_tokens]),
    ):
        if ours is None and theirs is None:
            continue
        assert ours.dtype == t.logps.dtype
        assert torch.allclose(ours.double(), theirs.detach(), rtol=tolerance, atol=tolerance), (ours, theirs)


@pytest.mark.parametrize("case", ALL_RESIDUALS + CASES[8:], ids=identify)
@pytest.mark.parametrize("policy", ["on", "off", "off-normalised"])
def test_log_z_given(case, policy, poisoned_memory):
    level = "length_normalized" if policy == "off-normalised" else "sequence"
    t = make(log_z=True, old=policy != "on", importance_level=level, clip=(0.9, 1.05))
    if policy == "off":
        w = t.importance_weight()[t.has_tokens]
        assert w.min() == 0.9 and w.max() == 1.05
    compare(*case[:1], t, case[1], 1e-11)


@pytest.mark.parametrize("case", CLOSED, ids=identify)
@pytest.mark.parametrize("old", [False, True])
def test_log_z_of_the_group_is_the_argmin(case, old, poisoned_memory):
    """The oracle finds the minimiser of each group's loss by bisection."""
    compare(case[0], make(old=old, clip=(0.0, 1.05)), case[1], 1e-10)


@pytest.mark.parametrize("case", CLOSED, ids=identify)
def test_single_precision(case):
    compare(case[0], make(dtype=torch.float32, old=True, log_z=case[0] == "subtb"), case[1], 3e-6)


@pytest.mark.parametrize(
    ("case", "log_z"),
    [(c, given) for c in ALL_RESIDUALS + CASES[8:] for given in (False, True) if given or c in CLOSED],
    ids=lambda x: x if isinstance(x, bool) else identify(x),
)
def test_gradcheck(case, log_z):
    """Also without log_z: the group's own is a minimum, so that it may be held constant (envelope theorem)."""
    name, options = case
    t = make([4, 0, 3, 1], [1, 1, 2, 2], log_z=log_z and name != "log_variance_tb")
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}

    def loss(*inputs):
        given = dict(zip(("logps", "log_z"), inputs, strict=False))
        return getattr(family, name)(type(t)(**(fields | given)), **options).loss

    assert torch.autograd.gradcheck(loss, leaves(t))


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_micro_batches_of_whole_groups_add_up(case):
    name, options = case
    lengths, groups = [4, 2, 0, 7, 1, 3], [1, 1, 1, 2, 2, 2]
    whole = make(lengths, groups, old=True)
    out, (gradient,) = run(name, whole, options)
    losses, gradients = [], []
    for first, last in ((0, 3), (3, 6)):
        a, b = int(whole.cu_seqlens[first]), int(whole.cu_seqlens[last])
        fields = {"alpha": whole.alpha, "num_sequences": 5, "cu_seqlens": whole.cu_seqlens[first : last + 1] - a}
        fields |= {k: getattr(whole, k).detach()[a:b] for k in ("base_logps", "old_logps")}
        fields |= {k: getattr(whole, k)[first:last] for k in ("psi", "rewards", "group_ids")}
        part = type(whole)(logps=whole.logps.detach()[a:b].requires_grad_(), **fields)
        part_out, (part_gradient,) = run(name, part, options)
        losses.append(part_out.loss)
        gradients.append(part_gradient)
    torch.testing.assert_close(sum(losses), out.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("case", [c for c in CLOSED if c[0] != "flowrl"], ids=identify)
def test_the_log_z_of_the_step_serves_parts_of_a_group(case):
    """Where a group does not fit into a call: its log Z from one without gradients, then given to each part."""
    name, options = case
    whole = make([4, 2, 7, 1, 3], [1, 2, 1, 2, 1], old=True)
    _, (gradient,) = run(name, whole, options)
    with torch.no_grad():
        log_z = getattr(family, name)(whole, **options).log_z
    gradients, at = [], 0
    for i, length in enumerate([4, 2, 7, 1, 3]):
        fields = {k: getattr(whole, k).detach()[at : at + length] for k in ("logps", "base_logps", "old_logps")}
        fields |= {k: getattr(whole, k)[i : i + 1] for k in ("psi", "rewards", "group_ids")}
        fields |= {"cu_seqlens": torch.tensor([0, length], dtype=torch.int32), "log_z": log_z[i : i + 1]}
        part = change(whole, **fields, num_sequences=5)
        part.logps.requires_grad_()
        gradients.append(torch.autograd.grad(getattr(family, name)(part, **options).loss, part.logps)[0])
        at += length
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("case", CLOSED, ids=identify)
@pytest.mark.parametrize("lengths", [[0, 3, 0, 5, 2], [0, 0], []])
def test_empty_completions_add_nothing(case, lengths):
    name, options = case
    nan = torch.full((len(lengths),), math.nan).double().masked_fill(torch.tensor(lengths) > 0, -0.5)
    t = change(make(lengths, [1] * 5), psi=nan)
    out, (gradient,) = run(name, t, options)
    empty = ~t.has_tokens
    for values in (out.weight, out.logp_mean, out.delta):
        assert (values[empty] == 0).all() and values.isfinite().all()
    assert gradient.isfinite().all() and gradient.shape == t.logps.shape
    if t.has_tokens.any():
        kept = [n for n in lengths if n]
        alone = make(kept, [1] * 5)
        fields = {k: getattr(alone, k) for k in ("cu_seqlens", "group_ids")}
        fields |= {"logps": t.logps, "base_logps": t.base_logps, "rewards": t.rewards[~empty], "psi": t.psi[~empty]}
        without, _ = run(name, type(t)(**fields, alpha=t.alpha), options)
        torch.testing.assert_close(out.loss, without.loss, rtol=1e-13, atol=0)
    else:
        assert out.loss == 0


@pytest.mark.parametrize("case", CLOSED, ids=identify)
def test_non_finite_input_is_not_hidden(case):
    t = make(log_z=True)
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}
    for bad in (math.nan, -math.inf):
        logps = t.logps.detach().clone()
        logps[3] = bad
        assert not getattr(family, case[0])(type(t)(**(fields | {"logps": logps})), **case[1]).loss.isfinite()


@pytest.mark.parametrize("case", [c for c in ALL_RESIDUALS if c[0] in ("tb", "token_tb", "la_tb")], ids=identify)
@pytest.mark.parametrize("log_z", [False, True])
@pytest.mark.parametrize("shift", [-3e3, 3e3])
def test_residuals_of_thousands_of_nats_stay_finite(case, log_z, shift):
    t = make([40, 80, 3], [1, 1, 1], dtype=torch.float32, log_z=log_z)
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}
    far = t.base_logps + shift * torch.linspace(0, 1, 123)
    out, grads = run(case[0], type(t)(**(fields | {"base_logps": far})), case[1])
    norm = torch.stack([x.square().sum() for x in grads]).sum()
    assert out.loss.isfinite() and norm.isfinite() and out.log_z.isfinite().all()


def test_only_the_loss_is_differentiable():
    for name, options in CASES:
        out, _ = run(name, make(log_z=True), options)
        assert not any(x.requires_grad for x in out[1:] if x is not None)


def test_a_given_log_z_is_a_constant_to_log_variance_tb():
    t = make(log_z=True)
    out = family.log_variance_tb(t)
    assert torch.equal(out.log_z[t.has_tokens], t.log_z.detach()[t.has_tokens]) and not out.log_z.requires_grad
    assert torch.autograd.grad(out.loss, t.log_z, allow_unused=True) == (None,)


def test_outputs_of_la_tb_and_flowrl():
    t = make(log_z=True)
    torch.testing.assert_close(family.la_tb(t).delta, family.la_tb(t, residual_loss="linex").delta)
    out = family.flowrl(t)
    assert torch.equal(out.advantage, t.group_advantages()) and out.advantage.abs().max() > 0.5


# SubTB


@pytest.mark.parametrize("residual_loss", RESIDUALS)
@pytest.mark.parametrize("lam", [0.0, 0.5, 3.0, math.inf])
def test_learned_flows(lam, residual_loss):
    t = make([4, 0, 3, 1], [1, 1, 2, 2])
    flows = torch.linspace(-1, 1, 8, dtype=torch.float64).requires_grad_()
    value = RESIDUALS[residual_loss][0]
    expected, at = 0, 0
    for length in (4, 3, 1):
        f = torch.cat([flows[at : at + length], torch.zeros(1)])
        gap = (t.logps - t.target_logps)[at : at + length]
        pairs = [(i, j) for i in range(length) for j in range(i + 1, length + 1)]
        if lam == math.inf:
            pairs = [(0, length)]
        if lam == 0:
            pairs = [(i, i + 1) for i in range(length)]
        weights = [1.0 if lam in (0, math.inf) else lam ** (j - i) for i, j in pairs]
        terms = [w * value(f[i] - f[j] + gap[i:j].sum()) for w, (i, j) in zip(weights, pairs, strict=True)]
        expected, at = expected + sum(terms) / sum(weights) / 3, at + length
    out = sub_trajectory_balance.subtb(t, lam=lam, log_flows=flows, residual_loss=residual_loss)
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, [t.logps, flows]), torch.autograd.grad(expected, [t.logps, flows]), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("lam", [0.0, 1e-300, 0.3, 0.999, 1.0, 1.5, 1e300, math.inf])
@pytest.mark.parametrize("log_z", [False, True])
def test_long_completions_at_any_lambda(lam, log_z):
    """600 tokens: λ^600 is no number. Blocks of lags give what a double loop over lags gives."""
    lengths = [600, 37]
    t = make(lengths, [1, 1], log_z=log_z)
    out, grads = run("subtb", t, {"lam": lam})
    assert out.loss.isfinite() and all(x.isfinite().all() for x in grads)
    same = exact(t)
    loss = 0
    for i, (a, b) in enumerate(((0, 600), (600, 637))):
        gap = torch.cat([torch.zeros(1).double(), (same.logps - same.target_logps)[a:b].cumsum(0)])
        length = b - a
        c = out.log_z[i] if same.log_z is None else same.log_z[i]
        lags = torch.arange(1, length + 1).double()
        log_weights = (
            lags * math.log(lam)
            if 0 < lam < math.inf
            else torch.where(lags == (1 if lam == 0 else length), 0.0, -math.inf).double()
        )
        counts = length + 1 - lags
        weights = (log_weights - torch.logsumexp(log_weights + counts.log(), 0)).exp()
        for n in range(1, length + 1):
            loss = loss + weights[n - 1] * (gap[n:] - gap[:-n] + n * c).square().sum() / 2
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-9, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(loss, leaves(same)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


def test_memory_of_long_completions_is_bounded(monkeypatch):
    from powerflow_fast.objectives import sub_trajectory_balance

    t = make([300, 120], [1, 1], log_z=True)
    whole, (gradient, _) = run("subtb", t, {"lam": 1.0})
    monkeypatch.setattr(sub_trajectory_balance, "_BLOCK", 4096)
    largest = []
    slope = residual_losses.resolve_residual_loss("subtb", "squared").slope
    monkeypatch.setattr(
        sub_trajectory_balance,
        "resolve_residual_loss",
        lambda op, name: type("G", (), {"name": name, "value": staticmethod(torch.square), "slope": staticmethod(spy)}),
    )

    def spy(delta):
        largest.append(delta.numel())
        return slope(delta)

    blocks, (same, _) = run("subtb", t, {"lam": 1.0})
    assert max(largest) <= 4096 and len(largest) > 50
    torch.testing.assert_close(blocks.loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(same, gradient, rtol=1e-11, atol=1e-13)


def test_subtb_refuses_a_second_derivative():
    t = make(log_z=True)
    (gradient,) = torch.autograd.grad(sub_trajectory_balance.subtb(t).loss, t.logps, create_graph=True)
    with pytest.raises(RuntimeError, match="subtb: second derivatives"):
        gradient.sum().backward()


@pytest.mark.parametrize("steps", [0, 1, 2, 7, 8, 9])
def test_prefix_sums(steps):
    values = torch.arange(2.0 * steps).view(2, steps)
    assert torch.equal(prefix_sums(values), values.cumsum(1))


@pytest.mark.parametrize(
    ("name", "fields", "options", "error", "match"),
    [
        ("tb", {}, {"residual_loss": "l1"}, ValueError, "must be one of 'squared', 'linex', .*, got 'l1'"),
        ("la_tb", {"group_ids": None}, {}, ValueError, r"log_z=None needs group_ids \(B,\), got None"),
        ("tb", {"group_ids": None}, {}, ValueError, r"log_z=None needs group_ids \(B,\), got None"),
        ("token_tb", {"group_ids": None}, {}, ValueError, "log_z=None needs group_ids"),
        ("subtb", {"group_ids": None}, {}, ValueError, "log_z=None needs group_ids"),
        ("log_variance_tb", {"group_ids": None}, {}, ValueError, "the loss needs group_ids"),
        ("la_tb", {"group_ids": torch.arange(8)}, {}, ValueError, "two completions .* got one in group 0"),
        ("tb", {"group_ids": torch.arange(8)}, {}, ValueError, "two completions .* got one in group 0"),
        ("relative_tb", {"rewards": None}, {}, ValueError, r"needs rewards \(B,\), got None"),
        ("relative_tb", {}, {"beta": math.nan}, ValueError, "beta must be finite, got nan"),
        ("relative_tb", {}, {"beta": "1"}, TypeError, "beta must be a number, got str"),
        ("flowrl", {"rewards": None}, {}, ValueError, r"needs rewards \(B,\), got None"),
        ("flowrl", {}, {"scale_rewards": "batch"}, ValueError, "scale_rewards must be"),
        ("flowrl", {}, {"beta": math.inf}, ValueError, "beta must be finite, got inf"),
        ("subtb", {}, {"lam": -0.1}, ValueError, r"lam must be >= 0 \(inf is allowed\), got -0.1"),
        ("subtb", {}, {"lam": math.nan}, ValueError, "lam must be >= 0"),
        ("subtb", {}, {"lam": True}, TypeError, "lam must be a number, got bool"),
        ("subtb", {}, {"residual_loss": "linex"}, ValueError, "needs log_z .* or log_flows .* only 'squared'"),
        ("subtb", {}, {"log_flows": torch.zeros(3)}, ValueError, r"log_flows must have shape \(N,\)=\(20,\), got \(3,"),
        (
            "subtb",
            {"log_z": torch.zeros(8).double()},
            {"log_flows": torch.zeros(20).double()},
            ValueError,
            "log_z must",
        ),
    ],
)
def test_bad_arguments(name, fields, options, error, match):
    with pytest.raises(error, match=f"^{name}: .*{match}|^{name}: {match}"):
        getattr(family, name)(change(make(), **fields), **options)
