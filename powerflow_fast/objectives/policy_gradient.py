"""Policy-gradient objectives: REINFORCE towards the α-power of the base model, its token-level ablation, and GRPO.

Each is a function of :class:`~powerflow_fast.objectives.Trajectories`. Advantages are constants to autograd; the
value of such a loss means nothing, its gradient does. T = |y|, and log R(y) = α (log p_base(y) + |y| ψ).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..ops.segments import segment_sum
from .trajectories import ObjectiveOutput, Trajectories

Baseline = Literal["group", "leave_one_out"]


def rl_trajectory(trajectories: Trajectories, *, baseline: Baseline = "group") -> ObjectiveOutput:
    """REINFORCE with the reward whose optimum is the α-power of the base model, whole completions:

        reward_i = log R(y_i) − log π(y_i)          A_i = reward_i − baseline_i
        L = −mean_i w_i A_i log π(y_i)

    Target: p_base(y)^α / Z. E_π[reward] = log Z − KL(π‖target), and on-policy E[∇L] = ∇KL(π‖target) with
    ``baseline="leave_one_out"``: the mean reward of the *other* completions of the prompt. ``"group"``, the mean of all
    K, gives (1 − 1/K) times that. Both are w-weighted.

    Needs ``group_ids``; ``log_z`` and ``rewards`` are not used.

    Source: REINFORCE, Williams 1992; leave-one-out, Kool et al. 2019; the equivalence with TB, Malkin et al. 2023
    (arXiv 2210.00580). Identities: with "group" half the gradient of log_variance_tb.
    """
    t, op = trajectories, "rl_trajectory"
    policy = segment_sum(t.logps.double(), t.cu_seqlens)
    reward = segment_sum(t.target_logps, t.cu_seqlens) - policy.detach()
    weight = t.importance_weight().double()
    advantage = reward - _baseline(op, t, reward, weight, baseline)
    return _output(t, weight, -weight * advantage * policy, advantage)


def rl_token(trajectories: Trajectories, *, baseline: Baseline = "group") -> ObjectiveOutput:
    """The token-level ablation of rl_trajectory: each token is paid its own reward at once, nothing for what follows.

        reward_it = α (log p_base,it + ψ_i) − log π_it          A_it = reward_it − baseline_i
        L = −mean_i w_i mean_t A_it log π_it

    with baseline_i the w-weighted mean over the prompt's completions (``"leave_one_out"``: the other ones) of
    mean_t reward_it: one number for all tokens of a completion.

    Target: π(a|state) ∝ p_base(a|state)^α at every token (exactly so for completions of one length), which is sampling
    at temperature 1/α and not p_base(y)^α.

    Needs ``group_ids``; ``log_z`` and ``rewards`` are not used. ``advantage`` of the output is the mean of A_it over t.

    Source: the token-level ablation of PowerFlow (arXiv 2603.18363). Identities: with "group" half the gradient of
    token_tb with log_z=None.
    """
    t, op = trajectories, "rl_token"
    policy = t.logps.double()
    reward = t.target_logps - policy.detach()
    mean = t.means(reward)
    weight = t.importance_weight().double()
    level = _baseline(op, t, mean, weight, baseline)
    surrogate = t.means((t.per_token(level) - reward) * policy)
    return _output(t, weight, weight * surrogate, mean - level)


def grpo(
    trajectories: Trajectories,
    *,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    aggregation: Literal["dapo", "sequence"] = "dapo",
    scale_rewards: Literal["group", "none"] = "group",
    kl_coefficient: float = 0.0,
) -> ObjectiveOutput:
    """GRPO: the group's advantage on every token, under a clipped token ratio.

        ρ_it = π_it / π_old,it          l_it = −min(ρ_it Â_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) Â_i) + κ KL_it
        "dapo": L = Σ_it l_it / num_tokens          "sequence": L = mean_i mean_t l_it

    with Â the advantage of ``Trajectories.group_advantages(scale_rewards)``: (reward − mean) / (std + 1e-4) within the
    group, or without the division if ``"none"``; and KL_it = e^d − d − 1, d = log p_base,it − log π_it (the k3
    estimator of KL(π‖p_base)), κ = ``kl_coefficient``. On-policy (``old_logps=None``) ρ = 1.

    Target: the policy of the largest expected reward (κ > 0: held near p_base); no distribution is matched.

    Needs ``rewards`` and ``group_ids``; alpha, psi, log_z, clip and importance_level are not used. ``weight`` of the
    output is the mean over t of the clipped ratio. ``num_tokens`` = sequences × max_completion_length with "dapo" and
    scale_rewards="none" is Dr. GRPO (arXiv 2503.20783).

    Source: Shao et al. 2024 (arXiv 2402.03300); token aggregation and ε_high from DAPO (arXiv 2503.14476); constants
    as in TRL 1.16. Identities: see la_tb.
    """
    t, op = trajectories, "grpo"
    for name, value in (
        ("epsilon_low", epsilon_low),
        ("epsilon_high", epsilon_high),
        ("kl_coefficient", kl_coefficient),
    ):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{op}: {name} must be finite and >= 0, got {value}")
    if epsilon_low > 1:
        raise ValueError(f"{op}: epsilon_low must be <= 1, got {epsilon_low}")
    if aggregation not in ("dapo", "sequence"):
        raise ValueError(f"{op}: aggregation must be 'dapo' or 'sequence', got {aggregation!r}")
    advantage = t.group_advantages(scale_rewards, op=op)
    policy = t.logps.double()
    old = policy if t.old_logps is None else t.old_logps.double()
    ratio = (policy - old.detach()).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    token_advantage = t.per_token(advantage.double())
    losses = -torch.minimum(ratio * token_advantage, clipped * token_advantage)
    if kl_coefficient:
        gap = t.base_logps.detach().double() - policy
        losses = losses + kl_coefficient * (gap.expm1() - gap)
    loss = t.token_mean(losses) if aggregation == "dapo" else t.sequence_mean(t.means(losses))
    dtype = t.logps.dtype
    return ObjectiveOutput(loss.to(dtype), t.means(clipped.detach()).to(dtype), t.logp_mean, advantage=advantage)


def _baseline(op: str, t: Trajectories, reward: Tensor, weight: Tensor, baseline: str) -> Tensor:
    """(B,) fp64: the w-weighted mean reward over the group, or over its other members."""
    if baseline not in ("group", "leave_one_out"):
        raise ValueError(f"{op}: baseline must be 'group' or 'leave_one_out', got {baseline!r}")
    t.require_groups(op, "the baseline")
    if baseline == "group":
        return t.group_mean(reward, weight)
    own = (weight * reward).where(t.has_tokens, 0.0)
    others = t.group_sum(weight) - weight
    # the only one with tokens has nothing to be compared with, and no advantage
    return ((t.group_sum(own) - own) / others).where(others > 0, reward)


def _output(t: Trajectories, weight: Tensor, values: Tensor, advantage: Tensor) -> ObjectiveOutput:
    dtype = t.logps.dtype
    advantage = advantage.where(t.has_tokens, 0.0).to(dtype)
    return ObjectiveOutput(t.sequence_mean(values).to(dtype), weight.to(dtype), t.logp_mean, advantage=advantage)
