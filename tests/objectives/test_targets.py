"""Every objective trains an enumerable policy to the distribution that it says it trains to.

All completions are in every batch: the training is on-policy, exact and without noise. GRPO, whose ratio is of tokens,
is trained on samples.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from powerflow_fast.objectives import OBJECTIVES, RESIDUAL_LOSSES, resolve_objective

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
if not (STUDIES / "enumerable.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)

from enumerable import World  # noqa: E402

TOLERANCE = 0.01

FIXED, ENDING = World(ends=False), World(ends=True)


def distance(p, q):
    return float((p - q).abs().sum() / 2)


def check(world, table, target, *others):
    """The table is at ``target``, and further from where it began and from the targets of other objectives."""
    reached = world.logp(table).exp()
    torch.testing.assert_close(target.sum(), torch.ones((), dtype=torch.float64))
    assert distance(reached, target) <= TOLERANCE, distance(reached, target)
    for other in (world.logp(world.base).exp(), *others):
        assert distance(reached, other) > 2 * TOLERANCE


@pytest.mark.parametrize("alpha", [0.5, 3.0])
@pytest.mark.parametrize("learned", [False, True])
def test_la_tb(alpha, learned):
    log_z = torch.zeros(1, dtype=torch.float64).requires_grad_() if learned else None
    table = ENDING.train(OBJECTIVES["la_tb"], alpha, log_z=log_z)
    check(ENDING, table, ENDING.tilted(alpha), ENDING.power(alpha))
    if not learned:
        check(FIXED, FIXED.train(OBJECTIVES["la_tb"], alpha), FIXED.power(alpha), FIXED.tokenwise(alpha))


@pytest.mark.parametrize("name", ["tb", "log_variance_tb", "rl_trajectory"])
@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_whole_trajectories(name, alpha):
    table = ENDING.train(OBJECTIVES[name], alpha)
    check(ENDING, table, ENDING.power(alpha), ENDING.tilted(alpha), ENDING.tokenwise(alpha))


@pytest.mark.parametrize("residual_loss", RESIDUAL_LOSSES)
def test_every_residual_loss(residual_loss):
    for log_z in (None, torch.zeros(1, dtype=torch.float64).requires_grad_()):
        objective = resolve_objective("tb", {"residual_loss": residual_loss})
        check(ENDING, ENDING.train(objective, 2.0, log_z=log_z), ENDING.power(2.0))


@pytest.mark.parametrize("name", ["token_tb", "rl_token"])
def test_tokens_alone(name):
    table = FIXED.train(OBJECTIVES[name], 3.0)
    check(FIXED, table, FIXED.tokenwise(3.0), FIXED.power(3.0))


def test_subtb_with_learned_flows():
    flows = torch.zeros(len(ENDING.base), dtype=torch.float64).requires_grad_()
    table = ENDING.train(OBJECTIVES["subtb"], 3.0, steps=400, log_flows=flows)
    check(ENDING, table, ENDING.power(3.0), ENDING.tokenwise(3.0))
    log_z = torch.logsumexp(3.0 * ENDING.logp(ENDING.base), 0)
    assert abs(float(flows[0].detach() - log_z)) < 0.02, "the flow of the empty prefix is log Z"


def test_subtb_with_length_aware_flows_lies_between():
    ends = FIXED.tokenwise(3.0), FIXED.power(3.0)
    to_token, to_whole = [], []
    for lam in (0.0, 1.0, float("inf")):
        reached = FIXED.logp(FIXED.train(resolve_objective("subtb", {"lam": lam}), 3.0)).exp()
        to_token.append(distance(reached, ends[0]))
        to_whole.append(distance(reached, ends[1]))
    assert to_token[0] <= TOLERANCE and to_whole[2] <= TOLERANCE
    assert to_token == sorted(to_token) and to_whole == sorted(to_whole, reverse=True)


def test_relative_tb():
    objective = resolve_objective("relative_tb", {"beta": 3.0})
    check(ENDING, ENDING.train(objective, 1.0), ENDING.power(1.0, 3.0 * ENDING.rewards))
    check(ENDING, ENDING.train(objective, 2.0), ENDING.power(2.0, 3.0 * ENDING.rewards), ENDING.power(2.0))


def test_flowrl():
    objective = resolve_objective("flowrl", {"beta": 0.5})
    advantage = ENDING.batch(ENDING.base, 1.0).group_advantages()
    target = ENDING.tilted(1.0, 0.5 * advantage * ENDING.lengths)
    check(ENDING, ENDING.train(objective, 1.0), target)


def test_grpo():
    """The largest expected reward, whatever the base model, or a completion that is almost as good."""
    table = ENDING.train(OBJECTIVES["grpo"], 1.0, steps=150, samples=64, decay=False)
    before, after = (ENDING.mean(ENDING.logp(t).exp(), ENDING.rewards) for t in (ENDING.base, table))
    assert before < 0.6 * float(ENDING.rewards.max()) and after > 0.9 * float(ENDING.rewards.max())


def test_the_length_bias_of_tb():
    """A base model that ends with probability 1/4 and is undecided otherwise: at α = 4 almost all of p_base^α is one
    token long, and TB goes there. LA-TB keeps the lengths of the base model."""
    world = World(ends=True)
    world.base = torch.zeros_like(world.base).log_softmax(1)

    def mean_length(table):
        return world.mean(world.logp(table).exp(), world.lengths)

    base = mean_length(world.base)
    total, aware = (mean_length(world.train(OBJECTIVES[name], 4.0)) for name in ("tb", "la_tb"))
    assert base == pytest.approx(1 + 3 / 4 + 9 / 16) and abs(aware - base) < 0.02 and total < 1.1


def test_prompts_are_worlds_of_their_own():
    """Three prompts at once, each with its own log Z', reach what each should, exactly and from samples."""
    world = World(ends=True, prompts=3, seed=5)
    target = world.tilted(2.0)
    assert [len(part) for part in target.split(40)] == [40, 40, 40]
    torch.testing.assert_close(target.view(3, -1).sum(1), torch.ones(3, dtype=torch.float64))
    for log_z in (None, torch.zeros(3, dtype=torch.float64).requires_grad_()):
        reached = world.logp(world.train(OBJECTIVES["la_tb"], 2.0, log_z=log_z)).exp()
        assert (reached - target).abs().view(3, -1).sum(1).max() / 2 <= TOLERANCE
    sampled = world.train(OBJECTIVES["la_tb"], 2.0, samples=64)
    assert (world.logp(sampled).exp() - target).abs().sum() / 6 <= 4 * TOLERANCE


def test_the_batch_of_drawn_completions():
    world = World(ends=True, prompts=2)
    everything = world.batch(world.base, 2.0)
    torch.testing.assert_close(everything.sums(everything.logps), world.logp(world.base))
    drawn = torch.tensor([41, 3, 3, 0])
    batch = world.batch(world.base, 2.0, drawn)
    torch.testing.assert_close(batch.sums(batch.logps), world.logp(world.base)[drawn])
    assert batch.group_ids.tolist() == [1, 0, 0, 0] and batch.old_logps is None
    assert batch.lengths.tolist() == [len(world.words[i]) for i in drawn]
    often = world.draw(world.base, 20_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(often, minlength=len(world.words)) / 20_000
    assert distance(shares, world.logp(world.base).exp()) < 0.05
