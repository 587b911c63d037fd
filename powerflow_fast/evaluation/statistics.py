"""Numbers with their uncertainty: means over prompts with a bootstrap interval, paired changes, and pass@k."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy

_BLOCK = 1 << 22  # indices drawn at once: 32 MiB


@dataclass(frozen=True)
class Measure:
    """A mean over ``prompts`` prompts with a bootstrap interval; ``low`` and ``high`` are NaN with fewer than two."""

    value: float
    low: float
    high: float
    prompts: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields for JSON, with None for NaN, which JSON has not."""
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Measure:
        """What :meth:`to_dict` was made from."""
        value, low, high = (math.nan if fields[k] is None else float(fields[k]) for k in ("value", "low", "high"))
        return cls(value, low, high, int(fields["prompts"]))


@dataclass(frozen=True)
class Change:
    """A measure before and after, paired by prompt, with a bootstrap interval of the difference."""

    before: float
    after: float
    change: float
    low: float
    high: float
    prompts: int

    @property
    def moved(self) -> bool:
        """The interval excludes no change."""
        return self.low > 0 or self.high < 0


def resampled_means(values: numpy.ndarray, *, resamples: int = 10_000, seed: int = 0) -> numpy.ndarray:
    """Bootstrap distribution of the mean: ``values[i].mean(0)`` for ``resamples`` draws ``i`` of ``n`` rows each.

    Rows are drawn with replacement by ``numpy.random.default_rng(seed)``. ``values`` has shape (n,) or (n, d), n >= 1;
    the result (resamples,) or (resamples, d). The memory is bounded whatever ``n`` is.
    """
    if resamples < 1:
        raise ValueError(f"resampled_means: resamples must be at least 1, got {resamples}")
    n = len(values)
    if not n:
        raise ValueError("resampled_means: values must have at least one row, got none")
    generator, size = numpy.random.default_rng(seed), max(1, _BLOCK // values.size)
    counts = [min(size, resamples - start) for start in range(0, resamples, size)]
    return numpy.concatenate([values[generator.integers(n, size=(count, n))].mean(1) for count in counts])


def percentiles(draws: numpy.ndarray, confidence: float) -> tuple[float, float]:
    """Ends of the percentile interval: the quantiles (1 ∓ confidence) / 2 of bootstrap ``draws``, a 1-d array."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    low, high = numpy.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Measure:
    """The mean over prompts with its percentile bootstrap interval.

    Whole prompts are resampled, since completions of one prompt are alike: ``values`` has one number per prompt, the
    mean over its completions. NaN says that a prompt has no value; it is left out. With no values at all the mean is
    NaN, and the interval is NaN with fewer than two.

    Args:
        values: one per prompt, finite or NaN.
        confidence: of the interval, between 0 and 1.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError: an infinite value (its index is named), a confidence or number of resamples out of range.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, section 13.3.
    """
    column = _column("mean_interval", "values", values)
    kept = column[~numpy.isnan(column)]
    if not len(kept):
        return Measure(math.nan, math.nan, math.nan, 0)
    return Measure(float(kept.mean()), *_interval(kept, confidence, resamples, seed), len(kept))


def paired_change(
    before: Sequence[float],
    after: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Change:
    """Means over the prompts that have both values, and their difference with its percentile bootstrap interval.

    The difference of each prompt is resampled, so what makes one prompt harder than another drops out. ``before`` and
    ``after`` are of the same prompts in the same order; options and errors as in :func:`mean_interval`, and a
    ValueError for sequences of different lengths.
    """
    if len(before) != len(after):
        raise ValueError(
            f"paired_change: before and after must be of the same prompts, got {len(before)} and {len(after)} values"
        )
    pairs = numpy.stack([_column("paired_change", "before", before), _column("paired_change", "after", after)])
    pairs = pairs[:, ~numpy.isnan(pairs).any(0)]
    if not pairs.size:
        return Change(*[math.nan] * 5, 0)
    difference = pairs[1] - pairs[0]
    means = [float(x.mean()) for x in (*pairs, difference)]
    return Change(*means, *_interval(difference, confidence, resamples, seed), len(difference))


def _column(op: str, name: str, values: Sequence[float]) -> numpy.ndarray:
    """``values`` as a 1-d array, finite or NaN."""
    column = numpy.asarray(values, dtype=float)
    if column.ndim != 1:
        raise ValueError(f"{op}: {name} must have one number per prompt, got shape {column.shape}")
    if numpy.isinf(column).any():
        at = int(numpy.isinf(column).argmax())
        raise ValueError(f"{op}: {name} must be finite, or NaN where a prompt has none, got {column[at]} at {at}")
    return column


def _interval(values: numpy.ndarray, confidence: float, resamples: int, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return math.nan, math.nan
    return percentiles(resampled_means(values, resamples=resamples, seed=seed), confidence)


def pass_at_k(correct: Sequence[int], samples: Sequence[int] | int, k: int) -> list[float]:
    """For each prompt the unbiased estimate of the chance that at least one of ``k`` samples is correct:

        pass@k = 1 − C(n − c, k) / C(n, k)

    the share of all k-subsets of its ``n`` samples that hold one of the ``c`` correct ones. In whole numbers, rounded
    once: pass@1 is c / n to the last bit, and no ``n`` overflows.

    Args:
        correct: c of each prompt.
        samples: n of each prompt, or one number for all.
        k: from 1 to n.

    Raises:
        ValueError: k below 1 or above n, c outside 0..n, or other numbers of prompts in ``correct`` and ``samples``.
        TypeError: a count that is no whole number.

    Source: Chen et al. 2021, arXiv 2107.03374, section 2.1.
    """
    k, correct = _whole("k", k), [_whole("correct", c) for c in correct]
    sizes = [_whole("samples", n) for n in (samples if hasattr(samples, "__len__") else [samples] * len(correct))]
    if len(sizes) != len(correct):
        raise ValueError(f"pass_at_k: samples must have one number per prompt ({len(correct)}), got {len(sizes)}")
    if k < 1:
        raise ValueError(f"pass_at_k: k must be at least 1, got {k}")
    for i, (c, n) in enumerate(zip(correct, sizes, strict=True)):
        if not 0 <= c <= n:
            raise ValueError(f"pass_at_k: correct must be from 0 to the prompt's n={n} samples, got {c} at {i}")
        if k > n:
            raise ValueError(f"pass_at_k: k={k} is more than the n={n} samples of prompt {i}; draw more or lower k")
    return [_pass_at_k(c, n, k) for c, n in zip(correct, sizes, strict=True)]


@functools.lru_cache(maxsize=4096)
def _pass_at_k(c: int, n: int, k: int) -> float:
    if c + k > n:  # fewer wrong ones than k
        return 1.0
    few, many = sorted((c, k))  # C(n−c, k) / C(n, k) is symmetric in c and k: the smaller one makes smaller numbers
    subsets = math.comb(n, few)
    return (subsets - math.comb(n - many, few)) / subsets


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"pass_at_k: {name} must be whole numbers, got {value!r}") from None
