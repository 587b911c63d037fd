"""Objectives of the trajectory-balance family: a residual that is zero at the target, and a loss on it.

Each is a function of :class:`~powerflow_fast.objectives.Trajectories`. Throughout, π is the policy, T = |y|, and

    log R(y) = Σ_t α (log p_base,t + ψ) = α (log p_base(y) + |y| ψ)          δ = log Z + log π(y) − log R(y)

With ``log_z=None`` the log-partition is the value that minimises the loss of the completions of one prompt. It is
detached and still gives the gradient of that minimum (envelope theorem). ``residual_loss`` is the name of a g in
``residuals.py``; ``"squared"`` is g(δ) = δ², the form in the papers.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..ops.la_tb import group_log_z, la_tb_loss
from ..ops.segments import segment_max, segment_sum
from .residual_losses import ResidualLoss, ResidualLossName, resolve_residual_loss
from .trajectories import ObjectiveOutput, Trajectories


def la_tb(trajectories: Trajectories, *, residual_loss: ResidualLossName = "squared") -> ObjectiveOutput:
    """Length-aware trajectory balance: whole completions, the residual per token. With s the mean of logps over y:

        δ = log Z' + s − α (r + ψ)          L = mean_i w_i g(δ_i)

    Target: p_base(y)^α · exp(−λ|y|); exactly p_base^α among completions of one length.

    ``log_z`` is log Z', nats per token. The squared loss runs as the one-pass ``la_tb_loss`` (with its fp32 base and
    old sums); another ``residual_loss`` in plain torch.

    Source: PowerFlow (arXiv 2603.18363). Identities: at equal lengths tb's loss / T²; with log_z=None twice the
    gradient of grpo(aggregation="sequence", scale_rewards="none") with rewards α (r + ψ) − s.
    """
    t, op = trajectories, "la_tb"
    g = resolve_residual_loss(op, residual_loss)
    if g.name != "squared":
        return _balance(op, t, _excess(t) / t.lengths.clamp(min=1), g)
    inputs = (t.logps, t.sums(t.base_logps))
    options = {
        "alpha": t.alpha,
        "psi": t.psi,
        "old_logps": None if t.old_logps is None else t.sums(t.old_logps),
        "clip": t.clip,
        "importance_level": t.importance_level,
    }
    log_z = t.log_z
    if log_z is None:
        t.require_groups(op, "log_z=None")
        log_z = group_log_z(*inputs, t.group_ids, t.cu_seqlens, **options)
    out = la_tb_loss(*inputs, log_z, t.cu_seqlens, **options, num_sequences=t.num_sequences)
    return ObjectiveOutput(out.loss, out.weight, out.logp_mean, out.delta, log_z.detach())


def tb(trajectories: Trajectories, *, residual_loss: ResidualLossName = "squared") -> ObjectiveOutput:
    """Trajectory balance of whole completions:

        δ = log Z + log π(y) − α (log p_base(y) + |y| ψ)          L = mean_i w_i g(δ_i)

    Target: p_base(y)^α / Z, of any length. On-policy its expected gradient is 2∇KL(π‖target). Its variance grows with
    the square of the length, and training drifts in length at α > 1; ``la_tb`` is the remedy.

    ``log_z`` is log Z, nats.

    Source: Malkin et al. 2022 (arXiv 2201.13259). Identities: see la_tb, subtb, relative_tb, log_variance_tb.
    """
    return _balance("tb", trajectories, _excess(trajectories), resolve_residual_loss("tb", residual_loss))


def log_variance_tb(trajectories: Trajectories, *, residual_loss: ResidualLossName = "squared") -> ObjectiveOutput:
    """TB with the group's own log Z in place of a learned one: the variance of log π − log R over a prompt's K samples.

        L = mean_i w_i g(δ_i)          log Z = argmin over the group, detached: mean_w(log R − log π) for δ²

    Target: as tb. Needs ``group_ids``. A ``log_z`` that is given is taken as the estimate of the whole group made
    beforehand (where a group spans several calls) and detached; nothing is ever learned.

    Source: VarGrad, Richter et al. 2020 (arXiv 2010.10436); for GFlowNets Zhang et al. 2023 (arXiv 2302.05446).
    Identities: squared, twice the gradient of rl_trajectory(baseline="group"); the value is tb's with log_z=None.
    """
    t, op = trajectories, "log_variance_tb"
    g = resolve_residual_loss(op, residual_loss)
    if t.group_ids is None:
        t.require_groups(op, "the loss")
    return _balance(op, t, _excess(t), g, learned=False)


def relative_tb(
    trajectories: Trajectories, *, beta: float = 1.0, residual_loss: ResidualLossName = "squared"
) -> ObjectiveOutput:
    """Relative trajectory balance: the posterior of a prior p_base^α and a reward, from log-ratios to the prior.

        δ = log Z + log π(y) − α (log p_base(y) + |y| ψ) − β reward(y)          L = mean_i w_i g(δ_i)

    Target: p_base(y)^α · exp(β reward(y)) / Z. The paper has α = 1 and a likelihood exp(β reward).

    ``log_z`` is log Z, nats. Needs ``rewards``.

    Source: Venkatraman et al. 2024 (arXiv 2405.20971). Identities: zero at π = p_base with α = 1, no reward and
    log_z = 0; without a reward it is tb.
    """
    t, op = trajectories, "relative_tb"
    g = resolve_residual_loss(op, residual_loss)
    beta = _require_number(op, "beta", beta)
    return _balance(op, t, _excess(t) - beta * _rewards(op, t), g)


def flowrl(
    trajectories: Trajectories,
    *,
    beta: float = 15.0,
    scale_rewards: str = "group",
    residual_loss: ResidualLossName = "squared",
) -> ObjectiveOutput:
    """FlowRL: length-normalised TB towards an external reward, with the base model as prior.

        δ = log Z' + s − α (r + ψ) − β Â          L = mean_i w_i g(δ_i)

    with Â the advantage of ``Trajectories.group_advantages(scale_rewards)``: the reward normalised within the group.

    Target: p_base(y)^α · exp(|y| (β Â(y) − λ)), where Â is relative to the policy's own mean and deviation. FlowRL has
    α = 1 and ψ = 0; α is this library's generalisation.

    ``log_z`` is log Z', nats per token. Needs ``rewards`` and ``group_ids``.

    Source: Zhu et al. 2025 (arXiv 2509.15207). Identities: la_tb with β = 0.
    """
    t, op = trajectories, "flowrl"
    g = resolve_residual_loss(op, residual_loss)
    beta = _require_number(op, "beta", beta)
    advantage = t.group_advantages(scale_rewards, op=op)
    excess = _excess(t) / t.lengths.clamp(min=1) - beta * advantage.double()
    return _balance(op, t, excess, g)._replace(advantage=advantage)


def token_tb(trajectories: Trajectories, *, residual_loss: ResidualLossName = "squared") -> ObjectiveOutput:
    """Balance of each token alone, the ablation of la_tb:

        δ_t = log Z' + log π_t − α (log p_base,t + ψ)          L = mean_i w_i mean_t g(δ_it)

    Target: π(a|state) ∝ p_base(a|state)^α at every token (exactly so for completions of one length), which is sampling
    at temperature 1/α and not p_base(y)^α: a token is blind to what follows it.

    ``log_z`` is log Z', nats per token.

    Source: the token-level ablation of PowerFlow (arXiv 2603.18363). Identities: subtb(lam=0); squared with log_z=None
    twice the gradient of rl_token.
    """
    t, op = trajectories, "token_tb"
    g = resolve_residual_loss(op, residual_loss)
    excess = t.logps.double() - t.target_logps
    weight = t.importance_weight().double()
    log_z = _log_z(op, t, excess, weight, g, per_token=True)
    delta = t.per_token(log_z) + excess
    return output(t, weight, t.means(g.value(delta)), t.means(delta), log_z)


def _excess(t: Trajectories) -> Tensor:
    """(B,) fp64: log π(y) − log R(y)."""
    return segment_sum(t.logps.double() - t.target_logps, t.cu_seqlens)


def _rewards(op: str, t: Trajectories) -> Tensor:
    if t.rewards is None:
        raise ValueError(f"{op}: needs rewards (B,), got None")
    return t.rewards.detach().double()


def _require_number(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return float(value)


class _GroupMoments:
    """Weighted means over a prompt's completions of x (B,), or of the mean over their tokens of x (N,)."""

    def __init__(self, t: Trajectories, x: Tensor, weight: Tensor, per_token: bool):
        self.t, self.x, self.weight, self.per_token = t, x, weight, per_token

    def _mean(self, values: Tensor) -> Tensor:
        return self.t.group_mean(self.t.means(values) if self.per_token else values, self.weight)

    def mean(self) -> Tensor:
        return self._mean(self.x)

    def log_mean_exp(self, scale: float) -> Tensor:
        t, x = self.t, scale * self.x
        top = segment_max(x, t.cu_seqlens) if self.per_token else x
        # of those that count; a group without any gets 0, as does the mean
        top = t.group_max(top.where(self.weight > 0, -math.inf))
        top = top.where(top.isfinite(), 0.0)
        # clamped: those that don't count may be larger, and inf · 0 is NaN
        mean = self._mean((x - (t.per_token(top) if self.per_token else top)).clamp(max=0).exp())
        return (top + mean.log()).where(t.group_sum(self.weight) != 0, 0.0)


def _log_z(
    op: str, t: Trajectories, excess: Tensor, weight: Tensor, g: ResidualLoss, *, per_token: bool = False
) -> Tensor:
    """(B,) fp64: what is given, or the minimiser of each group's loss on ``log Z + excess``, (B,) or (N,)."""
    if t.log_z is not None:
        return t.log_z.double()
    t.require_groups(op, "log_z=None")
    return g.centre(_GroupMoments(t, -excess.detach(), weight, per_token))


def _balance(op: str, t: Trajectories, excess: Tensor, g: ResidualLoss, *, learned: bool = True) -> ObjectiveOutput:
    """The objective with residual ``log Z + excess`` (B,) for each completion."""
    weight = t.importance_weight().double()
    log_z = _log_z(op, t, excess, weight, g)
    if not learned:
        log_z = log_z.detach()
    delta = (log_z + excess).where(t.has_tokens, 0.0)
    return output(t, weight, g.value(delta), delta, log_z)


def output(t: Trajectories, weight: Tensor, values: Tensor, delta: Tensor, log_z: Tensor) -> ObjectiveOutput:
    dtype = t.logps.dtype
    delta, log_z = delta.detach().where(t.has_tokens, 0.0), log_z.detach()
    loss = t.sequence_mean(weight * values)
    return ObjectiveOutput(loss.to(dtype), weight.to(dtype), t.logp_mean, delta.to(dtype), log_z.to(dtype))
