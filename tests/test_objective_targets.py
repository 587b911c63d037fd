"""Every objective trains an enumerable policy to the distribution that it says it trains to.

The policy is a table of next-token logits, one row for each prefix. All completions are in every batch, with behaviour
probability 1/n each, so that the importance weight π(y) n turns means over the batch into expectations under π: the
training is on-policy, exact and without noise. GRPO, whose ratio is of tokens, is trained on samples.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from powerflow_fast.objective_registry import OBJECTIVES, resolve_objective
from powerflow_fast.residuals import RESIDUAL_LOSSES
from powerflow_fast.trajectories import Trajectories

END, LETTERS, LONGEST = 0, 4, 3
TOLERANCE = 0.01


class World:
    """All completions over 4 letters: of exactly 3, or ended by the first or by the limit of 3."""

    def __init__(self, *, ends: bool, seed: int = 1):
        g = torch.Generator().manual_seed(seed)
        self.words = [
            word
            for length in range(1, LONGEST + 1)
            for word in itertools.product(range(LETTERS), repeat=length)
            if (END not in word[:-1] and (word[-1] == END or length == LONGEST) if ends else length == LONGEST)
        ]
        prefixes = sorted({word[:k] for word in self.words for k in range(len(word))})
        at = {prefix: i for i, prefix in enumerate(prefixes)}
        self.rows = torch.tensor([at[w[:k]] for w in self.words for k in range(len(w))])
        self.letters = torch.tensor([letter for w in self.words for letter in w])
        self.lengths = torch.tensor([len(w) for w in self.words])
        self.cu_seqlens = torch.cat([torch.zeros(1), self.lengths.cumsum(0)]).int()
        self.base = torch.randn(len(prefixes), LETTERS, generator=g, dtype=torch.float64).log_softmax(1)
        self.rewards = torch.rand(len(self.words), generator=g, dtype=torch.float64)

    def tokens(self, table):
        return table.log_softmax(1)[self.rows, self.letters]

    def logp(self, table):
        return torch.stack([part.sum() for part in self.tokens(table.detach()).split(self.lengths.tolist())])

    def trajectories(self, table, alpha, **fields):
        n = len(self.words)
        uniform = -math.log(n) / self.lengths.double()
        return Trajectories(
            logps=self.tokens(table),
            base_logps=self.tokens(self.base),
            cu_seqlens=self.cu_seqlens,
            alpha=alpha,
            group_ids=torch.zeros(n, dtype=torch.int64),
            rewards=self.rewards,
            old_logps=uniform.repeat_interleave(self.lengths),
            clip=(0.0, 1e9),
            **fields,
        )

    def train(self, objective, alpha, *, steps=250, rate=0.1, start=None, **learned):
        """The policy's table; the tensors in ``learned`` are fields or options that train along."""
        table = (self.base if start is None else start).clone().requires_grad_()
        optimizer = torch.optim.Adam([table, *learned.values()], lr=rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        flows = learned.pop("log_flows", None)
        if flows is not None:
            objective = resolve_objective(objective, {"log_flows": None})
        for _ in range(steps):
            if flows is not None:  # one flow for each prefix
                objective.bound["log_flows"] = flows[self.rows]
            fields = {name: value.expand(len(self.words)) for name, value in learned.items()}
            loss = objective(self.trajectories(table, alpha, **fields)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return table.detach()

    def power(self, alpha, bonus=0.0):
        """p_base^α · exp(bonus) / Z."""
        return (alpha * self.logp(self.base) + bonus).softmax(0)

    def tilted(self, alpha, bonus=0.0):
        """p_base^α · exp(bonus − λ|y|) with the λ that normalises it."""
        low, high = -50.0, 50.0
        scores = alpha * self.logp(self.base) + bonus
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if (scores - middle * self.lengths.double()).exp().sum() > 1 else (low, middle)
        return (scores - low * self.lengths.double()).exp()

    def tokenwise(self, alpha):
        """p_base(token|state)^α normalised at every state."""
        return self.logp(alpha * self.base).exp()


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
    fields = {"log_z": torch.zeros(1, dtype=torch.float64).requires_grad_()} if learned else {}
    table = ENDING.train(OBJECTIVES["la_tb"], alpha, **fields)
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
    for log_z in ({}, {"log_z": torch.zeros(1, dtype=torch.float64).requires_grad_()}):
        objective = resolve_objective("tb", {"residual_loss": residual_loss})
        check(ENDING, ENDING.train(objective, 2.0, **log_z), ENDING.power(2.0))


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
    advantage = ENDING.trajectories(ENDING.base, 1.0).group_advantages()
    target = ENDING.tilted(1.0, 0.5 * advantage * ENDING.lengths)
    check(ENDING, ENDING.train(objective, 1.0), target)


def test_grpo():
    """The largest expected reward, whatever the base model, or a completion that is almost as good."""
    torch.manual_seed(0)
    table = ENDING.base.clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.1)
    before = float(ENDING.logp(table).exp() @ ENDING.rewards)
    parts = [torch.arange(a, b) for a, b in itertools.pairwise(ENDING.cu_seqlens.tolist())]
    for _ in range(150):
        drawn = torch.multinomial(ENDING.logp(table).exp(), 64, replacement=True)
        tokens = torch.cat([parts[i] for i in drawn])
        lengths = ENDING.lengths[drawn]
        loss = OBJECTIVES["grpo"](
            Trajectories(
                logps=ENDING.tokens(table)[tokens],
                base_logps=ENDING.tokens(ENDING.base)[tokens],
                cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
                group_ids=torch.zeros(64, dtype=torch.int64),
                rewards=ENDING.rewards[drawn],
            )
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = float(ENDING.logp(table).exp() @ ENDING.rewards)
    assert before < 0.6 * float(ENDING.rewards.max()) and after > 0.9 * float(ENDING.rewards.max())


def test_the_length_bias_of_tb():
    """A base model that ends with probability 1/4 and is undecided otherwise: at α = 4 almost all of p_base^α is one
    token long, and TB goes there. LA-TB keeps the lengths of the base model."""
    world = World(ends=True)
    world.base = torch.zeros_like(world.base).log_softmax(1)

    def mean_length(table):
        return float(world.logp(table).exp() @ world.lengths.double())

    base = mean_length(world.base)
    total, aware = (mean_length(world.train(OBJECTIVES[name], 4.0)) for name in ("tb", "la_tb"))
    assert base == pytest.approx(1 + 3 / 4 + 9 / 16) and abs(aware - base) < 0.02 and total < 1.1
