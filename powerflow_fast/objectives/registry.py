"""The objectives by name, what each needs, and how one with its options bound is called."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import suggest
from .policy_gradient import grpo, rl_token, rl_trajectory
from .sub_trajectory_balance import subtb
from .trajectories import ObjectiveOutput, Trajectories
from .trajectory_balance import flowrl, la_tb, log_variance_tb, relative_tb, tb, token_tb

Partition = Literal["per_token", "total"]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """An objective and what must be there to call it: a function of Trajectories and keyword options."""

    name: str
    function: Callable[..., ObjectiveOutput | Tensor]
    formula: str
    """What is minimised, in one line."""
    target: str
    """The distribution that it trains to."""
    when: str
    partition: Partition | None
    """What ``log_z`` means: log Z' in nats per token, log Z in nats, or None for an objective that learns none."""
    needs_groups: bool = False
    """Whether the loss has statistics of a prompt's completions even with ``log_z`` given. With ``log_z=None`` and a
    partition, every objective needs them."""
    needs_rewards: bool = False
    uses_alpha: bool = True
    """Whether its target depends on the exponent."""
    needs_old_logps: bool = False
    """Whether it fails without ``old_logps``; all take them as the reason for an importance weight."""
    bound: Mapping[str, Any] = field(default_factory=dict)
    """Options that every call gets."""

    @property
    def options(self) -> tuple[str, ...]:
        """Names of the function's keyword-only parameters."""
        return tuple(p.name for p in _parameters(self.function) if p.kind is p.KEYWORD_ONLY)

    def __call__(self, trajectories: Trajectories) -> ObjectiveOutput:
        """The function's output; a scalar loss gets weight and logp_mean of the trajectories."""
        if self.needs_old_logps and trajectories.old_logps is None:
            raise ValueError(f"objective {self.name!r} needs old_logps (N,), got None")
        out = self.function(trajectories, **self.bound)
        if isinstance(out, ObjectiveOutput):
            loss = out.loss
        else:
            loss, out = out, None
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"objective {self.name!r} must return an ObjectiveOutput or a scalar tensor, got {type(loss).__name__}"
            )
        if loss.dim() != 0 or not loss.is_floating_point():
            raise ValueError(
                f"objective {self.name!r} must return a floating loss of shape (), got {loss.dtype} {tuple(loss.shape)}"
            )
        if trajectories.logps.requires_grad and torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(
                f"objective {self.name!r} must return a loss that depends on logps, got one without a gradient: was it "
                "detached? (Trajectories.group_* are constants)"
            )
        return out or ObjectiveOutput(loss, trajectories.importance_weight(), trajectories.logp_mean)


OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Objective(
            name="la_tb",
            function=la_tb,
            formula="mean w g(log Z' + s − α(r + ψ))",
            target="p_base(y)^α · exp(−λ|y|)",
            when="the default: PowerFlow's loss, far less drift in length than tb",
            partition="per_token",
        ),
        Objective(
            name="tb",
            function=tb,
            formula="mean w g(log Z + log π(y) − α(log p_base(y) + |y|ψ))",
            target="p_base(y)^α / Z",
            when="short completions, or to show the length bias",
            partition="total",
        ),
        Objective(
            name="log_variance_tb",
            function=log_variance_tb,
            formula="group variance of log π(y) − α(log p_base(y) + |y|ψ)",
            target="p_base(y)^α / Z",
            when="tb without anything to learn beside the policy",
            partition=None,
            needs_groups=True,
        ),
        Objective(
            name="subtb",
            function=subtb,
            formula="mean w Σ_{i<j} λ^(j−i) g(δ_ij) / Σ_{i<j} λ^(j−i)",
            target="p_base(y)^α / Z with learned flows; else between token_tb's and tb's",
            when="credit for parts of a completion; λ from token_tb (0) to tb (∞)",
            partition="per_token",
        ),
        Objective(
            name="token_tb",
            function=token_tb,
            formula="mean w mean_t g(log Z' + log π_t − α(log p_base,t + ψ))",
            target="p_base(token|state)^α at every token",
            when="an ablation: repetition at α < 1, decay at α > 1",
            partition="per_token",
        ),
        Objective(
            name="relative_tb",
            function=relative_tb,
            formula="mean w g(log Z + log π(y) − α(log p_base(y) + |y|ψ) − β reward)",
            target="p_base(y)^α · exp(β reward(y)) / Z",
            when="a posterior: the base model as prior, a reward as likelihood",
            partition="total",
            needs_rewards=True,
        ),
        Objective(
            name="flowrl",
            function=flowrl,
            formula="mean w g(log Z' + s − α(r + ψ) − βÂ)",
            target="p_base(y)^α · exp(|y|(βÂ(y) − λ))",
            when="rewards to match in proportion, long completions (FlowRL: α = 1, β = 15)",
            partition="per_token",
            needs_groups=True,
            needs_rewards=True,
        ),
        Objective(
            name="rl_trajectory",
            function=rl_trajectory,
            formula="−mean w A log π(y), A = α(log p_base(y) + |y|ψ) − log π(y) − baseline",
            target="p_base(y)^α / Z",
            when="the same target by REINFORCE; half of log_variance_tb's gradient",
            partition=None,
            needs_groups=True,
        ),
        Objective(
            name="rl_token",
            function=rl_token,
            formula="−mean w mean_t A_t log π_t, A_t = α(log p_base,t + ψ) − log π_t − baseline",
            target="p_base(token|state)^α at every token",
            when="an ablation: half of token_tb's gradient",
            partition=None,
            needs_groups=True,
        ),
        Objective(
            name="grpo",
            function=grpo,
            formula="mean of −min(ρ_t Â, clip(ρ_t) Â) + κ KL_t over tokens",
            target="the largest expected reward",
            when="a verifiable reward, and diversity is not wanted",
            partition=None,
            uses_alpha=False,
            needs_groups=True,
            needs_rewards=True,
        ),
    )
}


def resolve_objective(
    objective: str | Callable[..., ObjectiveOutput | Tensor], options: Mapping[str, Any] | None = None
) -> Objective:
    """An objective with its options bound, ready to be called with Trajectories.

    Args:
        objective: a name in ``OBJECTIVES``, one of its values, or a function of Trajectories. Such a function gets
            whole groups, no rewards and no learned log Z, unless its attributes ``needs_groups``, ``needs_rewards``,
            ``needs_old_logps`` and ``partition`` say otherwise (``my_loss.partition = "per_token"``).
        options: keyword options of the function.

    Raises:
        ValueError: an unknown name or option, or a value that the objective refuses; TypeError: not a function.
    """
    if isinstance(objective, str):
        if objective not in OBJECTIVES:
            names = ", ".join(map(repr, OBJECTIVES))
            hint = suggest(objective, OBJECTIVES)
            raise ValueError(f"resolve_objective: objective must be one of {names}, got {objective!r}{hint}")
        found = OBJECTIVES[objective]
    elif isinstance(objective, Objective):
        found = objective
    elif isinstance(objective, type):
        raise TypeError(
            f"resolve_objective: objective must be a function or an instance, got the class {objective.__name__}"
        )
    elif callable(objective):
        found = _of_user(objective)
    else:
        raise TypeError(
            f"resolve_objective: objective must be a name or a function of Trajectories, got {type(objective).__name__}"
        )
    options = dict(options or {})
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(found.function))
    for name in options:
        if name not in found.options and not takes_any:
            known = ", ".join(map(repr, found.options)) or "none"
            hint = suggest(name, found.options)
            raise ValueError(f"resolve_objective: {found.name} has the options {known}, got {name!r}{hint}")
    found = dataclasses.replace(found, bound={**found.bound, **options})
    ours = found.name in OBJECTIVES and found.function is OBJECTIVES[found.name].function
    if ours and options and not any(isinstance(v, Tensor) for v in found.bound.values()):
        _call_once(found)
    return found


def _of_user(function: Callable[..., Any]) -> Objective:
    partition = getattr(function, "partition", None)
    if partition not in ("per_token", "total", None):
        raise ValueError(
            f"resolve_objective: the attribute partition must be 'per_token', 'total' or None, got {partition!r}"
        )
    name = getattr(function, "__name__", type(function).__name__)
    kinds = [p.kind for p in _parameters(function)]
    if not any(k in (k.POSITIONAL_ONLY, k.POSITIONAL_OR_KEYWORD, k.VAR_POSITIONAL) for k in kinds):
        raise TypeError(f"resolve_objective: objective {name!r} must take Trajectories as its first argument")
    return Objective(
        name=name,
        function=function,
        formula="",
        target="",
        when="",
        partition=partition,
        needs_groups=bool(getattr(function, "needs_groups", True)),
        needs_rewards=bool(getattr(function, "needs_rewards", False)),
        needs_old_logps=bool(getattr(function, "needs_old_logps", False)),
    )


def _parameters(function: Callable[..., Any]) -> tuple[inspect.Parameter, ...]:
    return tuple(inspect.signature(function).parameters.values())


@torch.no_grad()
def _call_once(objective: Objective) -> None:
    """Raise for a bad option value now and not in the first step: two completions of a token each show it."""
    zero = torch.zeros(2)
    objective(
        Trajectories(
            logps=zero,
            base_logps=zero,
            cu_seqlens=torch.arange(3, dtype=torch.int32),
            log_z=zero,
            group_ids=torch.zeros(2, dtype=torch.int64),
            rewards=zero,
        )
    )
