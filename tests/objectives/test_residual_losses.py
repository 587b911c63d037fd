"""Residual losses: shape, digits, overflow, the divergence each one trains towards, and each one's group log Z."""

from __future__ import annotations

import math

import pytest
import torch
from objective_oracle import RESIDUALS as PLAIN

from powerflow_fast.objectives import RESIDUAL_LOSSES, Trajectories, resolve_residual_loss, tb
from powerflow_fast.objectives.residual_losses import LIMIT

every = pytest.mark.parametrize("g", RESIDUAL_LOSSES.values(), ids=list(RESIDUAL_LOSSES))


@every
def test_values_and_slopes(g):
    delta = torch.linspace(-20, 20, 401, dtype=torch.float64).requires_grad_()
    value, slope = PLAIN[g.name]
    torch.testing.assert_close(g.value(delta), value(delta), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(g.slope(delta), slope(delta), rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(g.value(delta).sum(), delta)
    torch.testing.assert_close(gradient, g.slope(delta), rtol=1e-12, atol=1e-13)
    assert (g.value(delta) >= 0).all() and (gradient.diff() > 0).all(), "convex, with its minimum at 0"


@every
def test_the_second_derivative_at_zero_is_that_of_the_square(g):
    zero = torch.zeros((), dtype=torch.float64)
    assert g.value(zero) == 0 and g.slope(zero) == 0
    assert (g.slope(zero + 1e-6) - g.slope(zero - 1e-6)) / 2e-6 == pytest.approx(2, rel=1e-6)


@every
@pytest.mark.parametrize("sign", [-1, 1])
def test_large_residuals_follow_the_tangent(g, sign):
    for dtype in (torch.float32, torch.float64):
        delta = (sign * torch.tensor([1.0, 59, 61, 200, 1e4, 1e6])).to(dtype).requires_grad_()
        value = g.value(delta)
        (gradient,) = torch.autograd.grad(value.sum(), delta)
        assert value.isfinite().all() and gradient.square().isfinite().all() and (value.diff() > 0).all()
        torch.testing.assert_close(gradient, g.slope(delta.detach()))
        assert gradient.abs().max() <= max(2e6, 4 * math.exp(LIMIT))
    assert not g.value(torch.tensor([math.nan, math.inf, -math.inf])).isfinite().any()


@every
def test_the_gradient_is_that_of_the_divergence(g):
    """With the target's own log Z, E_π[∇ g(δ)] over samples from π; the sum over all of 5 outcomes is exact."""
    torch.manual_seed(0)
    logits = torch.randn(5, dtype=torch.float64).requires_grad_()
    log_r = 3 * torch.randn(5, dtype=torch.float64)
    log_z = torch.logsumexp(log_r, 0)
    log_pi, log_p = logits.log_softmax(0), log_r - log_z
    pi, p = log_pi.exp(), log_p.exp()
    (expected,) = torch.autograd.grad((pi.detach() * g.value(log_z + log_pi - log_r)).sum(), logits, retain_graph=True)
    forward, reverse = (p * (log_p - log_pi)).sum(), (pi * (log_pi - log_p)).sum()
    divergence = {
        "squared": 2 * reverse,
        "linex": 2 * forward,
        "half_linex": 4 * (p.sqrt() - pi.sqrt()).square().sum(),
        "shifted_cosh": forward + ((pi - p).square() / p).sum() / 2,
    }[g.name]
    assert (
        g.divergence
        == {
            "squared": "2 KL(π‖p)",
            "linex": "2 KL(p‖π)",
            "half_linex": "4 Σ (√p − √π)²",
            "shifted_cosh": "KL(p‖π) + χ²(π‖p) / 2",
        }[g.name]
    )
    torch.testing.assert_close(
        expected, torch.autograd.grad(divergence, logits, retain_graph=True)[0], rtol=1e-11, atol=1e-13
    )
    others = [d for d in (reverse, forward) if d is not divergence / 2]
    assert any(
        not torch.allclose(expected, 2 * torch.autograd.grad(d, logits, retain_graph=True)[0], rtol=1e-2)
        for d in others
    )


def group(x, w, g):
    """tb on a group whose α(log p_base + ψ) − log π are x, with importance weights w."""
    zero = torch.zeros_like(x)
    options = {"cu_seqlens": torch.arange(len(x) + 1).int(), "group_ids": torch.zeros(len(x), dtype=torch.int64)}
    return tb(
        Trajectories(logps=zero, base_logps=x, old_logps=-w.log(), clip=(0.0, 1e6), **options), residual_loss=g.name
    )


@every
def test_the_groups_log_z_is_the_argmin(g):
    torch.manual_seed(1)
    x, w = 3 * torch.randn(9, dtype=torch.float64), torch.rand(9, dtype=torch.float64)
    centre = group(x, w, g).log_z[0]

    def loss(c):
        return (w * g.value(c - x)).sum()

    assert (w * g.slope(centre - x)).sum().abs() < 1e-10 * (w * g.slope(centre - x).abs()).sum()
    assert all(loss(centre) < loss(centre + d) for d in (-0.1, -1e-3, 1e-3, 0.1))


@every
def test_the_groups_log_z_at_thousands_of_nats(g):
    x = torch.tensor([0.0, 5.0, -5.0, 1.0], dtype=torch.float64)
    w = torch.tensor([1.0, 0.2, 3.0, 1.0], dtype=torch.float64)
    here = group(x, w, g).log_z[0]
    for shift in (-5e3, 5e3):
        torch.testing.assert_close(group(x + shift, w, g).log_z[0], here + shift, rtol=1e-12, atol=0)


def test_linex_over_samples_of_the_policy_estimates_log_z():
    """The group's log Z under linex is log mean R / π, whose expectation over samples from π is the target's own."""
    torch.manual_seed(0)
    log_r, log_pi = torch.randn(6, dtype=torch.float64), torch.randn(6, dtype=torch.float64).log_softmax(0)
    found = group(log_r - log_pi, log_pi.exp() * 6, RESIDUAL_LOSSES["linex"]).log_z[0]
    torch.testing.assert_close(found, torch.logsumexp(log_r, 0))


def test_unknown_name():
    assert resolve_residual_loss("f", "linex") is RESIDUAL_LOSSES["linex"]
    with pytest.raises(ValueError, match=r"^f: residual_loss must be one of 'squared', 'linex', .*, got 'huber'"):
        resolve_residual_loss("f", "huber")
