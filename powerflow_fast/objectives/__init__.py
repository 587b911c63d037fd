"""Losses over packed log-probs."""

from .log_z import LogZHead, LogZTable
from .policy_gradient import grpo, rl_token, rl_trajectory
from .registry import OBJECTIVES, Objective, resolve_objective
from .residual_losses import RESIDUAL_LOSSES, ResidualLoss, resolve_residual_loss
from .sub_trajectory_balance import subtb
from .trajectories import ObjectiveOutput, Trajectories
from .trajectory_balance import flowrl, la_tb, log_variance_tb, relative_tb, tb, token_tb

__all__ = [
    "OBJECTIVES",
    "RESIDUAL_LOSSES",
    "LogZHead",
    "LogZTable",
    "Objective",
    "ObjectiveOutput",
    "ResidualLoss",
    "Trajectories",
    "flowrl",
    "grpo",
    "la_tb",
    "log_variance_tb",
    "relative_tb",
    "resolve_objective",
    "resolve_residual_loss",
    "rl_token",
    "rl_trajectory",
    "subtb",
    "tb",
    "token_tb",
]
