"""Losses g(δ) on the residual of a balance condition, and the log-partition that minimises each over a group.

The residual is ``δ = log Z + log π(y) − log R(y)``, with R the unnormalised target and p = R / Z: δ > 0 where the
policy has more than it should. On-policy and with the target's own log Z, the gradient of ``E_π[g(δ)]`` (y fixed once
drawn) is that of a divergence:

    E_π[g'(δ) ∇log π] = ∇ Σ_y p f(π / p)        with f'(u) = g'(log u)

Every g here has g(0) = g'(0) = 0 and g''(0) = 2, that of δ²: one learning rate serves all of them near the optimum.

Source: Hu et al. 2024, "Beyond Squared Error" (arXiv 2410.02596), which writes g of −δ and leaves out the factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

ResidualLossName = Literal["squared", "linex", "half_linex", "shifted_cosh"]

LIMIT = 30.0
"""Exponents beyond this one give the tangent: the loss stays convex, and squares of gradients stay within fp32."""


class Moments(Protocol):
    """Weighted means over a group of ``x = log R(y) − log π(y)``, the residual's negative but for log Z."""

    def mean(self) -> Tensor: ...

    def log_mean_exp(self, scale: float) -> Tensor:
        """log of the mean of ``exp(scale * x)``."""


@dataclass(frozen=True, kw_only=True)
class ResidualLoss:
    """A convex g with its derivative, and the log Z that minimises its mean over a group. All are elementwise."""

    name: str
    value: Callable[[Tensor], Tensor]
    """g(δ), differentiable."""
    slope: Callable[[Tensor], Tensor]
    """g'(δ)."""
    centre: Callable[[Moments], Tensor]
    """argmin over c of the group's mean of g(c − x): exact as long as no exponent passes ``LIMIT``. With the exponents
    of linex and half_linex none can; shifted_cosh has one in each direction, and a group may spread by more."""
    formula: str
    divergence: str
    """D(π, p) of which the on-policy gradient is, with the target's own log Z."""
    character: str


def _squared(delta: Tensor) -> Tensor:
    return delta.square()


def _linex(scale: float) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``2 (exp(−a δ) + a δ − 1) / a²`` with a = ``scale``, and its derivative."""

    def value(delta: Tensor) -> Tensor:
        x = -scale * delta
        inside = x.clamp(max=LIMIT).expm1() - x
        return 2 / scale**2 * (inside + (x - LIMIT).clamp(min=0) * math.exp(LIMIT))

    def slope(delta: Tensor) -> Tensor:
        return -2 / scale * (-scale * delta).clamp(max=LIMIT).expm1()

    return value, slope


def _shifted_cosh(delta: Tensor) -> Tensor:
    # 2 cosh δ − 2 = 4 sinh²(δ/2)
    inside = 4 * (delta.clamp(-LIMIT, LIMIT) / 2).sinh().square()
    return inside + (delta.abs() - LIMIT).clamp(min=0) * (2 * math.sinh(LIMIT))


_linex_value, _linex_slope = _linex(1.0)
_half_value, _half_slope = _linex(0.5)

RESIDUAL_LOSSES: dict[str, ResidualLoss] = {
    loss.name: loss
    for loss in (
        ResidualLoss(
            name="squared",
            value=_squared,
            slope=lambda delta: 2 * delta,
            centre=lambda x: x.mean(),
            formula="δ²",
            divergence="2 KL(π‖p)",
            character="zero-forcing: leaves out what it cannot fit",
        ),
        ResidualLoss(
            name="linex",
            value=_linex_value,
            slope=_linex_slope,
            centre=lambda x: x.log_mean_exp(1.0),
            formula="2 (e^−δ + δ − 1)",
            divergence="2 KL(p‖π)",
            character="zero-avoiding: covers all of the target; large gradients where the policy has too little",
        ),
        ResidualLoss(
            name="half_linex",
            value=_half_value,
            slope=_half_slope,
            centre=lambda x: 2 * x.log_mean_exp(0.5),
            formula="8 (e^(−δ/2) + δ/2 − 1)",
            divergence="4 Σ (√p − √π)²",
            character="between the two: the squared Hellinger distance",
        ),
        ResidualLoss(
            name="shifted_cosh",
            value=_shifted_cosh,
            slope=lambda delta: 2 * delta.clamp(-LIMIT, LIMIT).sinh(),
            centre=lambda x: (x.log_mean_exp(1.0) - x.log_mean_exp(-1.0)) / 2,
            formula="2 cosh δ − 2",
            divergence="KL(p‖π) + χ²(π‖p) / 2",
            character="zero-forcing and zero-avoiding: punishes any large residual",
        ),
    )
}


def resolve_residual_loss(op: str, name: str) -> ResidualLoss:
    """The residual loss with that name; ValueError for an unknown one, in the name of the function ``op``."""
    if name not in RESIDUAL_LOSSES:
        names = ", ".join(map(repr, RESIDUAL_LOSSES))
        raise ValueError(f"{op}: residual_loss must be one of {names}, got {name!r}")
    return RESIDUAL_LOSSES[name]
