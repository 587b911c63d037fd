"""SubTB(λ): the mean of a residual loss over all sub-trajectories of a completion."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops.checks import require_tensor
from ..ops.logprobs_autograd import refuse_second_derivative
from ..ops.segments import prefix_sums, segment_sum
from .residual_losses import ResidualLoss, ResidualLossName, resolve_residual_loss
from .trajectories import ObjectiveOutput, Trajectories
from .trajectory_balance import output

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


def subtb(
    trajectories: Trajectories,
    *,
    lam: float = 0.9,
    log_flows: Tensor | None = None,
    residual_loss: ResidualLossName = "squared",
) -> ObjectiveOutput:
    """Sub-trajectory balance: every run of tokens (i, j] of a completion balances the flows at its ends.

        δ_ij = f_i − f_j + Σ_{i<t≤j} (log π_t − α (log p_base,t + ψ))
        L = mean_i w_i Σ_{i<j} λ^(j−i) g(δ_ij) / Σ_{i<j} λ^(j−i)

    where f_i is the log-flow of the state after i tokens and f_T = 0. By default f_i = (T − i) log Z', the length-aware
    flow: λ = 0 is then token_tb and λ = ∞ is tb with log Z = T log Z' (T² times la_tb). With ``log_flows`` (N,), the
    flow of the state *before* each token, learned by some head, the first flow of a completion is its log Z.

    Target: p_base(y)^α / Z with free flows, where every δ_ij can be zero. With the default ones something between
    token_tb's and tb's.

    Args:
        lam: λ in [0, ∞], safe at any size; the paper uses 0.9 and less.
        log_flows: (N,) fp32 or fp64 like logps. Gradient: yes. ``log_z`` must then be None.
        residual_loss: with log_z=None and no log_flows only ``"squared"``: the others have no closed-form log Z'.

    ``log_z`` is log Z', nats per token. Cost: 2 B T² residuals for B completions padded to the longest, T tokens (at
    λ < 1 not more than 2 B T · 70 / log(1/λ)), in blocks of 8 MiB; twice that to estimate log Z'. The gradient is made
    in the forward pass, B (T + 1) fp64 numbers; a second derivative raises RuntimeError. The host waits for T once.

    Source: Madan et al. 2022 (arXiv 2209.12782).
    """
    t, op = trajectories, "subtb"
    g = resolve_residual_loss(op, residual_loss)
    if isinstance(lam, bool) or not isinstance(lam, (int, float)):
        raise TypeError(f"{op}: lam must be a number, got {type(lam).__name__}")
    if not lam >= 0:
        raise ValueError(f"{op}: lam must be >= 0 (inf is allowed), got {lam}")
    steps = int(t.lengths.max()) if len(t.lengths) else 0
    tokens = torch.arange(steps + 1, device=t.logps.device)
    to_go = (t.lengths[:, None] - tokens).clamp(min=0).double()
    runs = SubTrajectories(t.lengths, steps, float(lam))
    excess = t.logps.double() - t.target_logps
    potentials = torch.nn.functional.pad(prefix_sums(_padded(t, excess, steps)), (1, 0))
    weight = t.importance_weight().double()
    if log_flows is not None:
        shape, dtypes = tuple(t.logps.shape), (t.logps.dtype,)
        require_tensor(op, "log_flows", log_flows, shape=shape, symbols="(N,)", dtypes=dtypes)
        if t.log_z is not None:
            raise ValueError(f"{op}: log_z must be None where log_flows are given, since the first flow is log Z")
        flows = torch.nn.functional.pad(_padded(t, log_flows.double(), steps), (0, 1))
        log_z = flows[:, 0]
    else:
        if t.log_z is None:
            t.require_groups(op, "log_z=None")
            if g.name != "squared":
                raise ValueError(
                    f"{op}: residual_loss={residual_loss!r} needs log_z (B,) or log_flows (N,): only 'squared' has a "
                    "closed-form log Z' of a group"
                )
            log_z = _group_slope(t, runs, potentials.detach(), tokens, weight, g)
        else:
            log_z = t.log_z.double()
        flows = log_z[:, None] * to_go
    values = runs.mean(potentials - flows, g)
    whole = (segment_sum(excess, t.cu_seqlens) + flows[:, 0]) / t.lengths.clamp(min=1)
    return output(t, weight, values, whole, log_z)


def _group_slope(
    t: Trajectories, runs: SubTrajectories, sums: Tensor, tokens: Tensor, weight: Tensor, squared: ResidualLoss
) -> Tensor:
    """(B,) the log Z' that minimises a group's mean of (n log Z' + Σ excess)² over its sub-trajectories of n tokens."""
    steps = tokens[None].double()
    if runs.whole:
        cross = t.lengths * segment_sum((t.logps.detach().double() - t.target_logps), t.cu_seqlens)
    else:
        # half the derivative of the mean of squares along potentials that rise by one per token
        cross = (runs.value_and_gradient(sums, squared)[1] * steps).sum(1) / 2
    total = t.group_sum(weight * runs.mean_square_lag())
    return (-t.group_sum(weight * cross) / total).where(total != 0, 0.0)


def _padded(t: Trajectories, values: Tensor, steps: int) -> Tensor:
    """(N,) to (B, steps): one row for each completion, zeros after its end."""
    row = t.token_sequence
    column = torch.arange(values.shape[0], device=values.device) - t.cu_seqlens.long()[row]
    return values.new_zeros(len(t.lengths), steps).index_put((row, column), values)
