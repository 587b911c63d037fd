"""The mean of a residual loss over all sub-trajectories of a completion, for SubTB(λ)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ops.logprobs_autograd import refuse_second_derivative
from .residuals import ResidualLoss

_BLOCK = 1 << 20
"""Residuals in memory at a time: 8 MiB, and a few times that for what is made of them."""

_NEGLIGIBLE = math.log(1e-30)
"""Lags whose weight is below that of lag 1 by this factor are left out: they are lost in fp64 anyway."""


class SubTrajectories:
    """Weights of the sub-trajectories of B completions by lag n, the number of their tokens: λ^n, normalised so that
    those of all (i, i+n] of a completion add up to 1.

    Args:
        lengths: (B,) tokens of each completion.
        steps: the largest of them.
        lam: λ in [0, ∞], where 0 leaves the single tokens and ∞ the whole completion.
    """

    def __init__(self, lengths: Tensor, steps: int, lam: float):
        # The powers run in log space: 0.5^8192 and 2^8192 are no numbers.
        log_lam, last = (math.log(lam), steps) if 0 < lam < math.inf else (0.0, 1 if lam == 0 else steps)
        if log_lam < 0:
            last = min(steps, 1 + math.ceil(_NEGLIGIBLE / log_lam))
        self.lengths = lengths.long()[:, None]
        self.whole = lam == math.inf
        self.lags = torch.arange(1, last + 1, device=lengths.device)[None]
        if self.whole:
            return
        powers = self.lags.double() * log_lam
        counts = (self.lengths + 1 - self.lags).clamp(min=0).double()
        total = torch.logsumexp(powers + counts.log(), 1, keepdim=True)
        self.weights = (powers - total).where(counts > 0, -math.inf).exp()
        """(B, lags) fp64."""

    def mean_square_lag(self) -> Tensor:
        """(B,) the weighted mean of n²."""
        if self.whole:
            return self.lengths[:, 0].double().square()
        counts = (self.lengths + 1 - self.lags).clamp(min=0)
        return (self.weights * counts * self.lags.double().square()).sum(1)

    def mean(self, potentials: Tensor, residual: ResidualLoss) -> Tensor:
        """(B,) the weighted mean of ``g(potentials[:, j] - potentials[:, i])`` over all i < j ≤ length.

        Args:
            potentials: (B, steps + 1) fp64, finite beyond a completion's own length. Gradient: yes, made in the forward
                pass; a second derivative raises RuntimeError.
        """
        if self.whole:
            return residual.value(potentials.gather(1, self.lengths)[:, 0] - potentials[:, 0])
        return _Mean.apply(potentials, self, residual)

    def value_and_gradient(self, potentials: Tensor, residual: ResidualLoss) -> tuple[Tensor, Tensor]:
        """:meth:`mean` (B,) and its gradient (B, steps + 1), without autograd: 2 · steps · lags residuals a completion,
        a block of them at a time."""
        batch, states = potentials.shape
        last = self.lags.shape[1]
        width = max(1, _BLOCK // max(batch * states, 1))
        here = torch.arange(states, device=potentials.device)[None, :, None]
        lengths = self.lengths[:, :, None]
        right = torch.nn.functional.pad(potentials, (0, last))
        left = torch.nn.functional.pad(potentials, (last, 0))
        values, gradient = potentials.new_zeros(batch), torch.zeros_like(potentials)
        for first in range(1, last + 1, width):
            width = min(width, last + 1 - first)
            lags, weights = (x[:, None, first - 1 : first - 1 + width] for x in (self.lags, self.weights))
            # the sub-trajectories that begin here; g(0) = g'(0) = 0 where there are none
            ends = right[:, first : first + states + width - 1].unfold(1, width, 1)
            delta = (ends - potentials[:, :, None]).where(here + lags <= lengths, 0.0)
            values += (weights * residual.value(delta)).sum((1, 2))
            gradient -= (weights * residual.slope(delta)).sum(2)
            # those that end here, the longest first
            begin = last - first - width + 1
            starts = left[:, begin : begin + states + width - 1].unfold(1, width, 1)
            lags, weights = lags.flip(2), weights.flip(2)
            delta = (potentials[:, :, None] - starts).where((here >= lags) & (here <= lengths), 0.0)
            gradient += (weights * residual.slope(delta)).sum(2)
        return values, gradient


class _Mean(torch.autograd.Function):
    """Saves the gradient, one number for each state, instead of the residuals of all pairs of states."""

    @staticmethod
    def forward(ctx, potentials, sub_trajectories, residual):
        values, gradient = sub_trajectories.value_and_gradient(potentials.detach(), residual)
        ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx, d_values):
        (gradient,) = ctx.saved_tensors
        with torch.no_grad():
            d_potentials = d_values[:, None] * gradient
        return refuse_second_derivative("subtb", d_potentials), None, None
