"""Means with bootstrap intervals, paired changes, and pass@k against counting."""

from __future__ import annotations

import itertools
import json
import math
from fractions import Fraction

import numpy
import pytest

from powerflow_fast.evaluation import Measure, mean_interval, paired_change, pass_at_k
from powerflow_fast.evaluation import statistics as estimates
from powerflow_fast.evaluation.statistics import percentiles, resampled_means

# pass@k


def test_pass_at_k_counts_subsets():
    for n in range(1, 8):
        for c in range(n + 1):
            outcomes = [1] * c + [0] * (n - c)
            for k in range(1, n + 1):
                hits = [any(s) for s in itertools.combinations(outcomes, k)]
                closed = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
                assert closed == Fraction(sum(hits), len(hits))
                assert pass_at_k([c], n, k) == [float(closed)], (n, c, k)


def test_pass_at_k_edges():
    assert pass_at_k([0, 16, 5], 16, 1) == [0.0, 1.0, 5 / 16]
    assert pass_at_k([0, 1, 15, 16], 16, 16) == [0.0, 1.0, 1.0, 1.0]
    assert pass_at_k([9], 16, 8) == [1.0], "fewer wrong ones than k"
    assert pass_at_k([], 16, 8) == []
    assert pass_at_k([2, 3], [4, 6], 2) == [1 - 1 / 6, 1 - 3 / 15]
    assert pass_at_k(numpy.array([2, 3]), numpy.array([4, 6]), numpy.int64(2)) == pass_at_k([2, 3], [4, 6], 2)


def test_pass_at_k_of_many_samples():
    n = 10**6
    for c, k in ((1, 1), (7, 1000), (200, 7), (3, n // 2)):
        log_miss = sum(math.log1p(-k / (n - i)) for i in range(c))  # a product of c factors, by logarithms
        assert pass_at_k([c], n, k)[0] == pytest.approx(-math.expm1(log_miss), rel=1e-9)
    assert pass_at_k([n // 2], n, n // 2 + 1) == [1.0]
    assert pass_at_k([5000], 10_000, 5000) == [1.0]  # the miss, 1e-3009, is no float


def test_pass_at_k_estimates_the_chance():
    p, n, k = 0.2, 10, 4
    correct = numpy.random.default_rng(0).binomial(n, p, size=20_000)
    estimates = numpy.array(pass_at_k(correct.tolist(), n, k))
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - (1 - (1 - p) ** k)) < 4 * error
    plug_in = 1 - (1 - correct / n) ** k
    assert abs(plug_in.mean() - (1 - (1 - p) ** k)) > 4 * error, "the test must tell the biased estimate apart"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([1, 1], [8, 4], 8), ValueError, r"pass_at_k: k=8 is more than the n=4 samples of prompt 1"),
        (([1], 0, 1), ValueError, r"correct must be from 0 to the prompt's n=0 samples, got 1 at 0"),
        (([0], 0, 1), ValueError, "k=1 is more than the n=0 samples"),
        (([1], 4, 0), ValueError, "k must be at least 1, got 0"),
        (([0, 5], 4, 1), ValueError, "n=4 samples, got 5 at 1"),
        (([-1], 4, 1), ValueError, "got -1 at 0"),
        (([1, 2], [4], 1), ValueError, r"one number per prompt \(2\), got 1"),
        (([0.5], 4, 1), TypeError, "correct must be whole numbers, got 0.5"),
        (([math.nan], 4, 1), TypeError, "correct must be whole numbers, got nan"),
        (([1], 4.0, 1), TypeError, "samples must be whole numbers, got 4.0"),
        (([1], 4, "2"), TypeError, "k must be whole numbers, got '2'"),
    ],
)
def test_pass_at_k_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        pass_at_k(*arguments)


# Means


def test_mean_interval():
    values = [0.0, 0.25, math.nan, 1.0, 0.5]
    got = mean_interval(values)
    assert got.value == 0.4375 and got.prompts == 4
    assert 0.0 <= got.low < 0.4375 < got.high <= 1.0
    assert got == mean_interval(values), "the resampling must repeat"
    assert got != mean_interval(values, seed=1, resamples=10)
    narrow = mean_interval(values, confidence=0.5)
    assert got.low < narrow.low < narrow.high < got.high
    same = mean_interval([0.3] * 5)
    assert (same.low, same.high) == pytest.approx((0.3, 0.3))


def test_mean_interval_of_few_prompts():
    one = mean_interval([math.nan, 2.0])
    assert (one.value, one.prompts) == (2.0, 1) and math.isnan(one.low) and math.isnan(one.high)
    for none in ([], [math.nan]):
        empty = mean_interval(none)
        assert empty.prompts == 0 and all(map(math.isnan, (empty.value, empty.low, empty.high)))


@pytest.mark.parametrize("law", ["normal", "shares of 16", "skewed"])
def test_interval_covers_the_mean(law):
    generator = numpy.random.default_rng(7)
    truth, cases = {
        "normal": (0.3, generator.normal(0.3, 0.5, (400, 30))),
        "shares of 16": (0.5, generator.binomial(16, generator.beta(1, 1, (400, 30))) / 16),
        "skewed": (1.0, generator.exponential(1.0, (400, 30))),
    }[law]
    for confidence in (0.95, 0.8):
        found = [mean_interval(row, confidence=confidence, resamples=400) for row in cases]
        inside = sum(m.low <= truth <= m.high for m in found) / len(found)
        # the percentile interval of 30 values is a little short; 400 cases tell a share to 2 %
        assert confidence - 0.07 < inside < confidence + 0.04, (law, confidence, inside)


def test_many_prompts_are_resampled_in_blocks(monkeypatch):
    values = numpy.random.default_rng(0).normal(size=(37, 2))
    whole = resampled_means(values, resamples=50)
    monkeypatch.setattr(estimates, "_BLOCK", 37 * 2 * 7)
    assert numpy.array_equal(resampled_means(values, resamples=50), whole), "blocks must not change a number"
    monkeypatch.setattr(estimates, "_BLOCK", 1)
    assert numpy.array_equal(resampled_means(values, resamples=50), whole)
    assert whole.shape == (50, 2) and resampled_means(values[:, 0], resamples=3).shape == (3,)


def test_measure_as_json():
    measure = mean_interval([math.nan, 2.0])
    written = json.dumps(measure.to_dict(), allow_nan=False)
    assert written == '{"value": 2.0, "low": null, "high": null, "prompts": 1}'
    read = Measure.from_dict(json.loads(written))
    assert repr(read) == repr(measure)
    full = mean_interval([0.0, 1.0, 1.0])
    assert Measure.from_dict(json.loads(json.dumps(full.to_dict()))) == full


# Changes


def test_change_pairs_prompts():
    # The prompts differ by far more than the change: only a paired interval can see it.
    before = [1.0, 5.0, 9.0, math.nan, 2.0]
    after = [0.5, 4.4, 8.6, 1.0, 1.5]
    change = paired_change(before, after)
    assert (change.before, change.after, change.prompts) == (pytest.approx(4.25), pytest.approx(3.75), 4)
    assert change.change == pytest.approx(-0.5)
    assert -0.6 <= change.low < -0.5 < change.high <= -0.4
    assert change.moved
    assert change == paired_change(before, after), "the resampling must repeat"
    assert not paired_change([1.0, 2.0, 3.0], [1.5, 1.5, 3.1]).moved
    one = paired_change([1.0, math.nan], [2.0, 1.0])
    assert (one.change, one.prompts, one.moved) == (1.0, 1, False) and math.isnan(one.low)
    assert paired_change([math.nan], [1.0]).prompts == 0
    assert paired_change([], []).prompts == 0


def test_change_resamples_pairs_by_hand():
    before, after = [1.0, 5.0, 9.0, 2.0], [0.5, 4.4, 8.6, 1.7]
    difference = numpy.array(after) - numpy.array(before)
    drawn = numpy.random.default_rng(0).integers(4, size=(10_000, 4))
    low, high = numpy.quantile(difference[drawn].mean(1), [0.025, 0.975])
    change = paired_change(before, after)
    assert (change.low, change.high) == pytest.approx((low, high), abs=1e-12)


def test_interval_covers_the_true_change():
    generator = numpy.random.default_rng(0)
    hardness = generator.normal(0.0, 5.0, (300, 12))
    cases = hardness + generator.normal(0.3, 0.5, (300, 12))
    found = [paired_change(b, a, resamples=500) for b, a in zip(hardness, cases, strict=True)]
    inside = [c.low <= 0.3 <= c.high for c in found]
    assert 0.86 < sum(inside) / len(inside) < 0.98


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([1.0, math.inf]), "mean_interval: values must be finite, .* got inf at 1"),
        (lambda: mean_interval([[1.0, 2.0]]), r"mean_interval: values must have one number per prompt, got shape \(1"),
        (lambda: mean_interval([1.0, 2.0], confidence=95), "confidence must be between 0 and 1, got 95"),
        (lambda: mean_interval([1.0, 2.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: paired_change([1.0], [1.0, 2.0]), "paired_change: .* same prompts, got 1 and 2 values"),
        (lambda: paired_change([1.0], [-math.inf]), "paired_change: after must be finite.* got -inf at 0"),
        (lambda: resampled_means(numpy.zeros(0)), "values must have at least one row"),
        (lambda: percentiles(numpy.zeros(3), math.nan), "confidence must be between 0 and 1, got nan"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
