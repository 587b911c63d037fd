"""PowerFlow's targets and policy loss in verl's shapes: padded (B, T) tensors and a response mask. No verl in here.

The residual of completion i, ``δ_i = log Z'_i + s_i − α (r_i + ψ_i)``, is split where verl splits a step. The driver
has whole groups and the log-probs of actor and reference, so it makes the constant ``α (r_i + ψ_i) − log Z'_i``, which
travels to the workers in the place of the advantage; a worker has the current ``s_i`` and makes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.checks import require_tensor
from ..ops.la_tb import group_log_z, la_tb_loss
from ..ops.segments import segment_sum
from .verl_settings import check_actor

__all__ = ["PowerFlowTargets", "powerflow_loss", "powerflow_targets"]


class PowerFlowTargets(NamedTuple):
    """Per completion, each (B,), in the dtype of the log-probs, detached; 0 for a completion without tokens."""

    target: Tensor
    """``α (r + ψ) − log Z'``: where the mean log-prob s of the policy is driven to, nats per token."""
    log_z: Tensor
    """log Z' of the completion's prompt, nats per token."""
    logp_mean: Tensor
    """s, the mean log-prob per token under the actor before the step."""
    base_mean: Tensor
    """r, the mean log-prob per token under the reference."""


@torch.no_grad()
def powerflow_targets(
    old_log_probs: Tensor,
    ref_log_prob: Tensor,
    response_mask: Tensor,
    group_ids: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
) -> PowerFlowTargets:
    """The constants of a step's residuals. In plain torch, for whole groups of completions:

        length = response_mask.sum(-1)
        s, r = ((x * response_mask).sum(-1) / length for x in (old_log_probs, ref_log_prob))
        log_z[group_ids == g] = (alpha * (r + psi) - s)[group_ids == g].mean()
        target = alpha * (r + psi) - log_z

    Args:
        old_log_probs: (B, T) fp32 or fp64, log-probs of the response tokens under the actor that is about to be
            trained, at the sampling temperature.
        ref_log_prob: (B, T), the same dtype: the same tokens under the reference, p_base, at the same temperature.
        response_mask: (B, T) bool or integer, 1 at the tokens of the completion. A row of zeros (verl's padding) has no
            part in any mean.
        group_ids: (B,) int64, equal for the completions of one prompt. A group must be in one call.
        alpha: exponent of the target distribution, finite and > 0.
        psi: (B,) format penalty, at most 0, in the dtype of the log-probs. None: 0.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or range.

    The log-partition is that of ``powerflow_fast.group_log_z`` at the start of the step, where every importance weight
    is 1; later updates of the same step keep it.
    """
    op = "powerflow_targets"
    mask = _check_mask(op, response_mask, "old_log_probs", old_log_probs)
    require_tensor(
        op, "ref_log_prob", ref_log_prob, shape=tuple(mask.shape), symbols="(B, T)", dtypes=(old_log_probs.dtype,)
    )
    offsets = _offsets(mask)
    base_logps = segment_sum(ref_log_prob[mask], offsets)
    logps = old_log_probs[mask]
    log_z = group_log_z(logps, base_logps, group_ids, offsets, alpha=alpha, psi=psi)
    length = offsets.diff()
    base_mean = base_logps / length.clamp(min=1)
    target = alpha * (base_mean if psi is None else base_mean + psi) - log_z
    logp_mean = segment_sum(logps, offsets) / length.clamp(min=1)
    has_tokens = length > 0
    return PowerFlowTargets(*(x.where(has_tokens, 0.0) for x in (target, log_z, logp_mean, base_mean)))


def powerflow_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Mapping[str, Any] | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The LA-TB loss of a micro-batch as a policy loss of verl. In plain torch:

        length = response_mask.sum(-1)
        logp, old = ((x * response_mask).sum(-1) for x in (log_prob, old_log_prob))
        delta = logp / length - target                                   # target: the advantage of any response token
        weight = (logp.detach() - old).exp().clamp(1 - clip_ratio_low, 1 + clip_ratio_high)
        loss = dp_size * (weight * delta**2).sum() / global_batch_size

    The losses of a mini-batch's micro-batches add up to the mean over its completions, whatever the split, and
    ``dp_size`` undoes the mean that data parallelism takes of the gradients. Rows without response tokens (verl's
    padding, which fills up a mini-batch where rollouts failed) add nothing, but ``global_batch_size`` counts them, as
    in verl's own losses.

    Args:
        old_log_prob: (B, T) log-probs under the actor at the start of the step.
        log_prob: (B, T) fp32 or fp64, under the current actor. The only input that gets a gradient.
        advantages: (B, T), the targets that PowerFlow's trainer wrote, the same for every token of a response.
        response_mask: (B, T) bool or integer.
        loss_agg_mode: not used: the loss is a mean over completions by definition.
        config: verl's ActorConfig: ``clip_ratio_low``, ``clip_ratio_high``, and ``global_batch_info`` with
            ``global_batch_size`` and ``dp_size``, which verl fills in. Without a ``global_batch_size`` the mean is over
            the completions of this call.
        rollout_is_weights: must be None.

    Returns:
        The scalar loss and detached means over the completions of the micro-batch, for verl's log.

    Raises:
        ConfigError: ``config`` is not as PowerFlow's trainer asks for it, which is how a run with another trainer
            shows, whose advantages are no targets.
        TypeError, ValueError: a tensor of the wrong type, shape or dtype.
    """
    op = "powerflow_loss"
    if config is None:
        raise ConfigError(f"{op}: config must be verl's ActorConfig, got None")
    clip = check_actor(config)
    if rollout_is_weights is not None:
        raise ConfigError(f"{op}: rollout_is_weights must be None: set algorithm.rollout_correction.rollout_is to null")
    mask = _check_mask(op, response_mask, "log_prob", log_prob)
    for name, tensor in (("old_log_prob", old_log_prob), ("advantages", advantages)):
        require_tensor(op, name, tensor, shape=tuple(mask.shape), symbols="(B, T)", dtypes=(log_prob.dtype,))
    info = config.get("global_batch_info") or {}
    size, dp_size = info.get("global_batch_size"), info.get("dp_size") or 1
    if size is None and dp_size > 1:
        raise ConfigError(f"{op}: global_batch_info.global_batch_size is needed with dp_size={dp_size}, got None")

    offsets = _offsets(mask)
    old = segment_sum(old_log_prob[mask], offsets).detach()
    target = advantages.gather(1, mask.int().argmax(-1, keepdim=True))[:, 0].detach()
    target = target.where(offsets.diff() > 0, 0.0)
    # la_tb_loss with p_base = 1 and log Z' = -target has the residual s - target
    out = la_tb_loss(
        *(log_prob[mask], torch.zeros_like(target), -target, offsets),
        alpha=1.0,
        old_logps=old,
        clip=clip,
        num_sequences=None if size is None else int(size),
    )
    return out.loss * dp_size, _metrics(out.delta, out.weight, out.logp_mean, old, offsets, clip)


@torch.no_grad()
def _metrics(
    delta: Tensor, weight: Tensor, logp_mean: Tensor, old: Tensor, offsets: Tensor, clip: tuple[float, float]
) -> dict[str, float]:
    length = offsets.diff()
    count = (length > 0).sum().clamp(min=1)
    log_ratio = logp_mean * length - old
    ratio = log_ratio.exp()
    clipped = (length > 0) & ((ratio < clip[0]) | (ratio > clip[1]))
    drift = -log_ratio / length.clamp(min=1)
    sums = torch.stack([delta.abs().sum(), delta.square().sum(), weight.sum(), clipped.sum(), drift.sum()]) / count
    names = ("delta_abs", "delta_squared", "weight", "weight_clipped", "old_minus_new_logp")
    return {f"actor/powerflow/{name}": value for name, value in zip(names, sums.tolist(), strict=True)}


def _check_mask(op: str, response_mask: Tensor, name: str, values: Tensor) -> Tensor:
    """The mask as bool, after a check that ``values`` are (B, T) floating point and the mask has their shape."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(values).__name__}")
    if values.dim() != 2:
        raise ValueError(f"{op}: {name} must have shape (B, T), got {tuple(values.shape)}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be torch.float32 or torch.float64, got {values.dtype}")
    masks = (torch.bool, torch.uint8, torch.int32, torch.int64)
    require_tensor(op, "response_mask", response_mask, shape=tuple(values.shape), symbols="(B, T)", dtypes=masks)
    return response_mask.bool()


def _offsets(mask: Tensor) -> Tensor:
    """(B+1,) int32 offsets of the rows of ``values[mask]``."""
    return torch.nn.functional.pad(mask.sum(-1).cumsum(0), (1, 0)).int()
