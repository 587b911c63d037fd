"""How close a policy is to p_base^α, from log-probs of its samples: the order that it puts them in, α, and the tilt.

At LA-TB's optimum log π(y|q) = α log p_base(y|q) − λ|y| + c_q (arXiv 2603.18363): it orders completions of one length
as the base model does, and λ, the tilt, is what it charges for a token.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy

from .statistics import Measure, percentiles, resampled_means

_COLLINEAR = 1e-10  # 1 − r² of log p_base and length within groups, below which α and λ can't be told apart
_EQUAL = 1e-12  # numbers that differ by this share of their size are equal


def inversion_rate(
    policy_logps: Sequence[float],
    base_logps: Sequence[float],
    group_ids: Sequence[Hashable],
    *,
    tolerance: float = 0.0,
) -> list[float]:
    """For each group the share of pairs of completions whose order under log π differs from that under log p_base,
    which for every α > 0 is the order of p_base^α.

    0: the same order. 1: the reverse. 1/2: no relation. A pair that is tied under one of the two counts 1/2. One that
    is tied under both has no order and is left out, as are the copies of a completion that was drawn twice among
    themselves.

    Args:
        policy_logps: log π of each completion, nats, finite; NaN where it was not scored leaves the completion out.
        base_logps: log p_base likewise.
        group_ids: equal for completions of one prompt, wherever they stand.
        tolerance: differences of up to this many nats are ties. A completion that was drawn twice and scored in two
            batches may have log-probs that differ in their last digits.

    Returns:
        One share per group in the order of first appearance; NaN for a group without pairs.

    Raises:
        ValueError: sequences of different lengths, an infinite log-prob, a negative tolerance.

    Source: arXiv 2603.18363, which reports about 0.09 for a trained model.
    """
    if not tolerance >= 0:
        raise ValueError(f"inversion_rate: tolerance must be at least 0 nats, got {tolerance}")
    groups = _groups("inversion_rate", group_ids, policy_logps=policy_logps, base_logps=base_logps)
    return [_inversions(group, tolerance) for group in groups]


def _inversions(group: numpy.ndarray, tolerance: float) -> float:
    first, second = numpy.triu_indices(group.shape[1], 1)
    difference = group[:, first] - group[:, second]
    order = numpy.where(abs(difference) <= tolerance, 0.0, numpy.sign(difference))
    order = order[:, (order != 0).any(0)]
    # the two signs differ by 0, by 1 with one tie, or by 2
    return float(abs(order[0] - order[1]).mean() / 2) if order.size else math.nan


@dataclass(frozen=True)
class LengthTilt:
    """What :func:`length_tilt` finds. The ``prompts`` of a :class:`Measure` are the groups that bear on it."""

    alpha: Measure
    """α; one that was given is its own interval."""
    tilt: Measure
    """λ, nats per token: above 0 the policy prefers shorter completions than p_base^α does."""
    r_squared: float
    """The share of log π's variance within groups that the fit explains; below 0 where a given α fits badly."""
    prompts: int
    """Groups with two or more scored completions."""
    left_out: int
    """Groups with fewer, which say nothing."""
    per_prompt: list[float]
    """λ of each group by itself at the overall α, in the order of first appearance; NaN without different lengths."""


def length_tilt(
    policy_logps: Sequence[float],
    base_logps: Sequence[float],
    lengths: Sequence[float],
    group_ids: Sequence[Hashable],
    *,
    alpha: float | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> LengthTilt:
    """α and λ from samples, by least squares within groups:

        log π(y|q) = α log p_base(y|q) − λ|y| + c_q

    over all groups at once, each with a free constant. They are exact, whatever was drawn, when π has this form. With
    ``alpha`` given only λ is fitted. The intervals are percentiles of a bootstrap over groups.

    What the sample doesn't determine is NaN: λ if no group has completions of different lengths, α if none has
    different log p_base, both if log p_base is linear in the length. An interval is NaN with fewer than two groups that
    bear on it; resampled groups that determine nothing are left out of it.

    Args:
        policy_logps: log π of each completion, nats, finite; NaN where it was not scored leaves the completion out.
        base_logps: log p_base likewise.
        lengths: tokens of each completion, its end token too.
        group_ids: equal for completions of one prompt, wherever they stand.
        alpha: the exponent, where it is known.
        confidence: of the intervals.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: sequences of different lengths, an infinite log-prob, a length below 0 or not finite, an alpha that
            is not finite.
    """
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"length_tilt: alpha must be finite, got {alpha}")
    for i, length in enumerate(lengths):
        if not 0 <= length < math.inf:
            raise ValueError(f"length_tilt: lengths must be finite and at least 0, got {length} at {i}")
    groups = _groups("length_tilt", group_ids, policy_logps=policy_logps, base_logps=base_logps, lengths=lengths)
    moments = numpy.array([_moments(group) for group in groups]).reshape(-1, 3, 3)
    used = moments[[group.shape[1] > 1 for group in groups]]
    total = used.sum(0)
    found = _solve(total, alpha)
    draws = (numpy.zeros(0), numpy.zeros(0))
    if len(used) > 1:
        means = resampled_means(used.reshape(-1, 9), resamples=resamples, seed=seed)
        draws = _solve(means.reshape(-1, 3, 3), alpha)
    of_alpha, of_tilt = (
        _measure(float(found[i]), draws[i], int((used[:, i + 1, i + 1] > 0).sum()), confidence) for i in range(2)
    )
    if alpha is not None:
        of_alpha = Measure(float(alpha), float(alpha), float(alpha), len(used))
    return LengthTilt(
        of_alpha,
        of_tilt,
        _r_squared(total, of_alpha.value, of_tilt.value),
        len(used),
        len(groups) - len(used),
        _solve(moments, of_alpha.value)[1].tolist(),
    )


def _moments(group: numpy.ndarray) -> numpy.ndarray:
    """Sums of products of log π, log p_base and length, each about its mean: all that the fit needs of a group."""
    if not group.size:
        return numpy.zeros((3, 3))
    centred = group - group.mean(1, keepdims=True)
    centred[abs(centred).max(1) <= _EQUAL * abs(group).max(1)] = 0.0  # equal numbers may miss their mean by a rounding
    return centred @ centred.T


def _solve(moments: numpy.ndarray, alpha: float | None) -> tuple[numpy.ndarray, numpy.ndarray]:
    """α (if None) and λ from moments of shape (..., 3, 3), NaN where these don't determine them."""
    yx, yl = moments[..., 0, 1], moments[..., 0, 2]
    xx, xl, ll = moments[..., 1, 1], moments[..., 1, 2], moments[..., 2, 2]
    with numpy.errstate(divide="ignore", invalid="ignore"):
        if alpha is None:
            determinant = xx * ll - xl * xl
            both = (yx * ll - yl * xl) / determinant
            alphas = numpy.where(determinant > _COLLINEAR * xx * ll, both, numpy.where(ll == 0, yx / xx, math.nan))
        else:
            alphas = numpy.full_like(xx, alpha)
        # Without a covariance of log p_base and length λ doesn't depend on α, which may be NaN.
        return alphas, (numpy.where(xl == 0, 0.0, alphas * xl) - yl) / ll


def _measure(value: float, draws: numpy.ndarray, groups: int, confidence: float) -> Measure:
    draws = draws[numpy.isfinite(draws)]
    if groups < 2 or not math.isfinite(value) or not len(draws):
        return Measure(value, math.nan, math.nan, groups)
    return Measure(value, *percentiles(draws, confidence), groups)


def _r_squared(total: numpy.ndarray, alpha: float, tilt: float) -> float:
    weights = numpy.array([1.0, -alpha if total[1, 1] else 0.0, tilt if total[2, 2] else 0.0])
    return float(1 - weights @ total @ weights / total[0, 0]) if total[0, 0] else math.nan


def _groups(op: str, group_ids: Sequence[Hashable], **columns: Sequence[float]) -> list[numpy.ndarray]:
    """For each group in the order of first appearance an array (columns, its completions without NaN)."""
    ids = (
        group_ids.tolist() if hasattr(group_ids, "tolist") else list(group_ids)
    )  # a tensor's elements hash by identity
    members: dict[Hashable, list[int]] = {}
    for i, group in enumerate(ids):
        members.setdefault(group, []).append(i)
    table = numpy.empty((len(columns), len(ids)))
    for row, (name, values) in zip(table, columns.items(), strict=True):
        values = numpy.asarray(values, dtype=float)
        if values.shape != row.shape:
            raise ValueError(f"{op}: {name} must have shape (N,)=({len(ids)},) as group_ids, got {values.shape}")
        if numpy.isinf(values).any():
            at = int(numpy.isinf(values).argmax())
            raise ValueError(f"{op}: {name} must be finite, or NaN where not scored, got {values[at]} at {at}")
        row[:] = values
    scored = ~numpy.isnan(table).any(0)
    return [table[:, [i for i in group if scored[i]]] for group in members.values()]
