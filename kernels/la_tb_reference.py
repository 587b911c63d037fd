"""Oracles of the LA-TB loss and of the group log-partition: one sequence, one group at a time, any floating dtype.

Differentiable plain torch for tests and benchmarks; nothing in the library calls them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def _sequence_terms(logps, base_logps, cu_seqlens, alpha, psi, old_logps, clip, importance_level):
    """(length, s, α(r+ψ), w) of each sequence; an empty one gives zeros."""
    bounds = cu_seqlens.tolist()
    for i, (begin, end) in enumerate(pairwise(bounds)):
        length = end - begin
        if length == 0:
            yield 0, logps.new_zeros(()), logps.new_zeros(()), logps.new_zeros(())
            continue
        logp_sum = logps[begin:end].sum()
        target = alpha * (base_logps[i] / length + (0 if psi is None else psi[i]))
        weight = logps.new_ones(())
        if old_logps is not None:
            log_ratio = logp_sum.detach() - old_logps[i]
            ratio = torch.exp(log_ratio / length if importance_level == "length_normalized" else log_ratio)
            weight = ratio.clamp(*clip)
        yield length, logp_sum / length, target, weight


def la_tb_loss_ref(
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: str = "sequence",
    num_sequences: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(loss (), delta (B,), weight (B,), logp_mean (B,))``; the loss is ``Σ w δ² / n``."""
    loss, with_tokens, deltas, weights, means = logps.sum() * 0 + log_z.sum() * 0, 0, [], [], []
    terms = _sequence_terms(logps, base_logps, cu_seqlens, alpha, psi, old_logps, clip, importance_level)
    for i, (length, mean, target, weight) in enumerate(terms):
        delta = log_z[i] + mean - target if length else mean
        loss = loss + weight * delta**2
        with_tokens += length > 0
        for values, value in ((deltas, delta), (weights, weight), (means, mean)):
            values.append(value.detach())
    stack = [torch.stack(values) if values else log_z.detach()[:0] for values in (deltas, weights, means)]
    return loss / (num_sequences or max(with_tokens, 1)), *stack


def group_log_z_ref(
    logps: Tensor,
    base_logps: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: str = "sequence",
) -> Tensor:
    """(B,): for each sequence the w-weighted mean of ``α(r+ψ) − s`` over its group's members with tokens."""
    total: dict[int, Tensor] = {}
    weight_sum: dict[int, Tensor] = {}
    terms = _sequence_terms(logps.detach(), base_logps, cu_seqlens, alpha, psi, old_logps, clip, importance_level)
    for group, (_, mean, target, weight) in zip(group_ids.tolist(), terms, strict=True):
        total[group] = total.get(group, 0) + weight * (target - mean)
        weight_sum[group] = weight_sum.get(group, 0) + weight
    values = [total[g] / weight_sum[g] if weight_sum[g] > 0 else total[g] * 0 for g in group_ids.tolist()]
    return torch.stack(values) if values else logps.detach()[:0]
