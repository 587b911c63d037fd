"""Inversion rate against pairs counted one by one; the length tilt against distributions that have one."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from powerflow_fast.evaluation.alpha_fit import inversion_rate, length_tilt

# Inversions


def counted(policy, base, groups, tolerance=0.0):
    """Pair by pair, from the definition."""

    def order(a, b):
        return 0 if abs(a - b) <= tolerance else 1 if a > b else -1

    rates = []
    for group in dict.fromkeys(groups):
        members = [i for i, g in enumerate(groups) if g == group and not math.isnan(policy[i] + base[i])]
        inverted = pairs = 0.0
        for i in members:
            for j in members:
                one, other = order(policy[i], policy[j]), order(base[i], base[j])
                if i < j and (one or other):
                    pairs += 1
                    inverted += 0.5 if not one or not other else float(one != other)
        rates.append(inverted / pairs if pairs else math.nan)
    return rates


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_inversion_rate_is_the_count_of_pairs(tolerance):
    generator = numpy.random.default_rng(3)
    groups = [f"q{g}" for g in generator.integers(5, size=60)] + ["alone"]
    base = generator.normal(-20, 5, 61).round(1)  # rounded: some are tied
    policy = (2 * base + generator.normal(0, 8, 61)).round(1)
    policy[4], base[9], base[10] = math.nan, base[8], base[8]
    got = inversion_rate(policy.tolist(), base.tolist(), groups, tolerance=tolerance)
    assert got == pytest.approx(counted(policy, base, groups, tolerance), nan_ok=True)
    assert len(got) == 6 and math.isnan(got[-1]) and all(0 < rate < 1 for rate in got[:-1])


def test_inversion_rate_of_known_orders():
    base = [-1.0, -2.0, -3.0, -4.0]
    assert inversion_rate([4 * b - 7 for b in base], base, [0] * 4) == [0.0]
    assert inversion_rate(base[::-1], base, [0] * 4) == [1.0]
    assert inversion_rate([-5.0] * 4, base, [0] * 4) == [0.5], "tied under the policy only"
    assert inversion_rate(base, [-5.0] * 4, [0] * 4) == [0.5], "tied under the base only"
    assert inversion_rate([-2.0, -1.0, -3.0, -4.0], base, [0] * 4) == [1 / 6], "one swap of neighbours"
    assert all(map(math.isnan, inversion_rate([-5.0] * 2, [-3.0] * 2, [0, 0])))
    assert inversion_rate([], [], []) == []


def test_repeated_completions_do_not_count():
    once = inversion_rate([-1.0, -3.0, -2.0], [-1.0, -2.0, -3.0], [0] * 3)
    assert once == [1 / 3]
    # The first completion three times, the copies scored in other batches: 4 more pairs with the others, none inverted
    policy, base = [-1.0, -1.00001, -1.0, -3.0, -2.0], [-1.0, -1.0, -0.99999, -2.0, -3.0]
    assert inversion_rate(policy, base, [0] * 5, tolerance=1e-3) == [1 / 7]
    assert inversion_rate(policy, base, [0] * 5) != [1 / 7], "the test must need the tolerance"


def test_groups_may_be_anything_and_lie_anywhere():
    policy, base = torch.tensor([-1.0, -5.0, -2.0, -4.0]), torch.tensor([-1.0, -4.0, -2.0, -5.0])
    assert inversion_rate(policy, base, torch.tensor([7, 3, 7, 3])) == [0.0, 1.0]
    assert inversion_rate(policy, base, ["b", "a", "b", "a"]) == [0.0, 1.0]


# The tilt


def language(seed, *, letters=3, longest=4):
    """Log-prob and length of every string that a random model can write: at each token a letter or the end."""
    next_token = {}  # after each prefix the log-probs of the letters, and last that of the end

    def after(prefix):
        if prefix not in next_token:
            table = numpy.random.default_rng([seed, *prefix]).dirichlet([5.0] * letters + [2.0])
            next_token[prefix] = numpy.log(table) if len(prefix) < longest - 1 else [-math.inf] * letters + [0.0]
        return next_token[prefix]

    strings = [s for n in range(longest) for s in itertools.product(range(letters), repeat=n)]
    logps = [sum(after(s[:i])[t] for i, t in enumerate((*s, -1))) for s in strings]
    return numpy.array(logps), numpy.array([len(s) + 1 for s in strings])


def drawn(alpha, tilts, *, samples=12, seed=0):
    """Samples of p^alpha exp(−λ|y|) / Z for each λ of ``tilts``, each with its own p: the columns of length_tilt."""
    generator = numpy.random.default_rng(seed)
    columns = [[], [], [], []]
    for q, tilt in enumerate(tilts):
        base, lengths = language(q)
        assert numpy.exp(base).sum() == pytest.approx(1.0)
        policy = alpha * base - tilt * lengths
        policy -= numpy.logaddexp.reduce(policy)
        chosen = generator.choice(len(base), size=samples, p=numpy.exp(policy))
        for column, values in zip(columns, (policy, base, lengths, numpy.full(len(base), q)), strict=True):
            column += values[chosen].tolist()
    return columns


@pytest.mark.parametrize("alpha", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("tilt", [-0.8, 0.0, 0.3])
def test_tilt_of_an_exact_target(alpha, tilt):
    found = length_tilt(*drawn(alpha, [tilt] * 8), resamples=200)
    for measure, truth in ((found.alpha, alpha), (found.tilt, tilt)):
        assert measure.value == pytest.approx(truth, abs=1e-9)
        assert (measure.low, measure.high) == pytest.approx((truth, truth), abs=1e-9)
    assert found.r_squared == pytest.approx(1.0) and found.prompts == 8 and found.left_out == 0
    known = length_tilt(*drawn(alpha, [tilt] * 8), alpha=alpha, resamples=200)
    assert known.tilt.value == pytest.approx(tilt, abs=1e-9) and known.alpha.low == known.alpha.value == alpha
    one = [t for t in known.per_prompt if not math.isnan(t)]
    assert one == pytest.approx([tilt] * len(one), abs=1e-8) and len(one) == known.tilt.prompts >= 4


def test_tilts_that_differ_by_prompt():
    truth = numpy.random.default_rng(1).normal(0.5, 0.3, 40)
    columns = drawn(2.0, truth, samples=40)
    found = length_tilt(*columns, alpha=2.0, resamples=500)
    assert found.per_prompt == pytest.approx(truth.tolist(), abs=1e-8)
    assert found.tilt.low < 0.5 < found.tilt.high and 0.1 < found.tilt.high - found.tilt.low < 0.4
    free = length_tilt(*columns, resamples=500)
    assert free.alpha.low < 2.0 < free.alpha.high and free.r_squared < 1 - 1e-4


def test_interval_covers_a_noisy_tilt():
    generator = numpy.random.default_rng(5)
    inside, cases = numpy.zeros(2), 150
    for _ in range(cases):
        groups = numpy.repeat(numpy.arange(25), 6)
        lengths = generator.integers(5, 40, 150)
        base = -1.3 * lengths + generator.normal(0, 4, 150)
        # each prompt has a slope of its own: a bootstrap over completions would not see it
        tilt = generator.normal(0.2, 0.15, 25)[groups]
        policy = 3.0 * base - tilt * lengths + generator.normal(0, 1.0, 150) + 10.0 * groups
        found = length_tilt(policy, base, lengths, groups, resamples=300)
        inside += [found.alpha.low <= 3.0 <= found.alpha.high, found.tilt.low <= 0.2 <= found.tilt.high]
    assert (inside / cases > 0.85).all() and (inside / cases < 0.99).all()


def test_same_as_least_squares_with_a_constant_per_group():
    policy, base, lengths, groups = drawn(1.5, [0.1, 0.7, 0.4], samples=9, seed=2)
    policy = (numpy.array(policy) + numpy.random.default_rng(0).normal(0, 0.5, 27)).tolist()
    policy[3] = math.nan
    keep = [i for i in range(27) if i != 3]
    constants = numpy.eye(3)[numpy.array(groups, dtype=int)]
    design = numpy.column_stack([base, numpy.negative(lengths), constants])[keep]
    y = numpy.array(policy)[keep]
    fitted, residue, *_ = numpy.linalg.lstsq(design, y, rcond=None)
    within = y - (constants[keep] @ numpy.linalg.lstsq(constants[keep], y, rcond=None)[0])
    found = length_tilt(policy, base, lengths, groups, resamples=50)
    assert (found.alpha.value, found.tilt.value) == pytest.approx(fitted[:2].tolist())
    assert found.r_squared == pytest.approx(1 - residue[0] / (within @ within))


def test_a_wrong_alpha_shows_in_the_fit():
    base, lengths = [-1.0, -2.0, -3.0, -4.0], [1, 2, 2, 1]  # uncorrelated: the tilt can't make up for α
    assert length_tilt(base, base, lengths, [0] * 4, alpha=-1.0).r_squared == pytest.approx(-3.0)


def isnan(measure):
    return [math.isnan(x) for x in (measure.value, measure.low, measure.high)]


def test_what_cannot_be_told_is_nan_and_counted():
    base, lengths = [-1.0, -2.0, -4.0, -3.0, -7.0], [3, 3, 3, 5, 5]
    groups = ["a", "a", "a", "b", "b"]
    policy = [2 * b - 0.5 * n for b, n in zip(base, lengths, strict=True)]

    same_length = length_tilt(policy, base, lengths, groups, resamples=50)
    assert same_length.alpha.value == pytest.approx(2.0) and same_length.alpha.prompts == 2
    assert isnan(same_length.tilt) == [True] * 3 and same_length.tilt.prompts == 0
    assert same_length.r_squared == pytest.approx(1.0) and all(map(math.isnan, same_length.per_prompt))

    alone = length_tilt(policy, base, [1, 2, 3, 4, 5], list("abcde"), resamples=50)
    assert (alone.prompts, alone.left_out) == (0, 5) and math.isnan(alone.r_squared)
    assert isnan(alone.alpha) == isnan(alone.tilt) == [True] * 3 and len(alone.per_prompt) == 5

    one_group = length_tilt([-2.5, -5.0, -10.0], [-1.0, -2.0, -4.0], [1, 2, 4], ["a"] * 3, alpha=2.0)
    assert isnan(one_group.tilt) == [False, True, True] and one_group.tilt.prompts == 1
    assert one_group.tilt.value == pytest.approx(0.5)

    linear = length_tilt([-3.0, -6.0, -9.0] * 2, [-1.0, -2.0, -3.0] * 2, [1, 2, 3] * 2, [0] * 3 + [1] * 3)
    assert isnan(linear.alpha) == isnan(linear.tilt) == [True] * 3 and linear.prompts == 2
    given = length_tilt([-3.0, -6.0, -9.0] * 2, [-1.0, -2.0, -3.0] * 2, [1, 2, 3] * 2, [0] * 3 + [1] * 3, alpha=2.0)
    assert given.tilt.value == pytest.approx(1.0)

    flat = length_tilt([-0.3, -0.6] * 2, [-0.1] * 4, [1, 2] * 2, [0, 0, 1, 1], resamples=50)
    assert isnan(flat.alpha) == [True] * 3 and flat.alpha.prompts == 0
    assert isnan(flat.tilt) == [False] * 3 and flat.tilt.value == pytest.approx(0.3)

    nothing = length_tilt([], [], [], [])
    assert (nothing.prompts, nothing.left_out, nothing.per_prompt) == (0, 0, []) and isnan(nothing.tilt) == [True] * 3
    unscored = length_tilt([math.nan, -1.0], [-1.0, -2.0], [1, 2], [0, 0])
    assert (unscored.prompts, unscored.left_out) == (0, 1)
    assert length_tilt([-1.0, math.nan], [math.nan, -2.0], [1, 2], [0, 0]).left_out == 1


def test_some_groups_say_nothing_about_the_tilt():
    policy, base, lengths, groups = drawn(2.0, [0.4] * 5, samples=40)
    more = [-3.0, -4.0, -5.0]
    policy += [*(2 * b - 0.4 * 3 + 9 for b in more), -1.0]
    base, lengths, groups = [*base, *more, -1.0], [*lengths, 3, 3, 3, 2], [*groups, 50, 50, 50, 60]
    found = length_tilt(policy, base, lengths, groups, resamples=200)
    assert (found.prompts, found.left_out, found.alpha.prompts) == (6, 1, 6) and found.tilt.prompts == 5
    assert found.tilt.high == pytest.approx(0.4, abs=1e-8) and found.alpha.low == pytest.approx(2.0, abs=1e-8)
    assert [math.isnan(t) for t in found.per_prompt[-2:]] == [True, True]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: inversion_rate([1.0], [1.0, 2.0], [0, 0]), r"policy_logps must have shape \(N,\)=\(2,\).*got \(1,\)"),
        (lambda: inversion_rate([1.0, 2.0], [1.0, -math.inf], [0, 0]), "base_logps must be finite.* got -inf at 1"),
        (lambda: inversion_rate([], [], [], tolerance=-1), "tolerance must be at least 0 nats, got -1"),
        (lambda: inversion_rate([], [], [], tolerance=math.nan), "tolerance must be at least 0 nats, got nan"),
        (lambda: length_tilt([1.0], [1.0], [1, 2], [0]), r"length_tilt: lengths must have shape \(N,\)=\(1,\)"),
        (lambda: length_tilt([1.0, 1.0], [1.0, 1.0], [1, -2], [0, 0]), "lengths must be finite and .*got -2 at 1"),
        (lambda: length_tilt([1.0], [1.0], [math.nan], [0]), "lengths must be finite and .*got nan at 0"),
        (lambda: length_tilt([1.0], [1.0], [1], [0], alpha=math.inf), "alpha must be finite, got inf"),
    ],
)
def test_refuses(call, words):
    with pytest.raises(ValueError, match=words):
        call()
