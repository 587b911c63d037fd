"""Policy gradients against loops in fp64, and in exact expectation over an enumerable policy."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from objective_oracle import change, exact, leaves, make, oracle

from powerflow_fast.objectives import Trajectories
from powerflow_fast.objectives import policy_gradient as family

CASES = [
    ("rl_trajectory", {}),
    ("rl_trajectory", {"baseline": "leave_one_out"}),
    ("rl_token", {}),
    ("rl_token", {"baseline": "leave_one_out"}),
    ("grpo", {}),
    ("grpo", {"aggregation": "sequence", "scale_rewards": "none"}),
    ("grpo", {"epsilon_low": 0.02, "epsilon_high": 0.05, "kl_coefficient": 0.3}),
    ("grpo", {"aggregation": "sequence", "kl_coefficient": 0.1, "epsilon_low": 0.0}),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join([c[0], *map(str, c[1].values())]))


def run(name, t, options):
    out = getattr(family, name)(t, **options)
    return out, torch.autograd.grad(out.loss, t.logps)[0]


@cases
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matches_the_oracle(case, old, dtype, poisoned_memory):
    name, options = case
    t = make(old=old, dtype=dtype, clip=(0.9, 1.05), num_sequences=11, num_tokens=50)
    same = exact(t)
    loss, _ = oracle(name, same, **options)
    out, gradient = run(name, t, options)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    for ours, theirs in ((out.loss, loss), (gradient, torch.autograd.grad(loss, leaves(same))[0])):
        assert ours.dtype == dtype
        assert torch.allclose(ours.double(), theirs.detach(), rtol=tolerance, atol=tolerance)
    assert not any(x.requires_grad for x in out[1:] if x is not None) and gradient.abs().max() > 1e-4


@pytest.mark.parametrize("case", CASES[4:], ids=lambda c: str(c[1]))
def test_gradcheck(case):
    """Of GRPO, whose advantage is no function of the policy; one token is clipped above and one below."""
    t = make([4, 0, 3, 1], [1, 1, 2, 2], old=True, num_sequences=3)
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}

    def loss(logps):
        return family.grpo(Trajectories(**(fields | {"logps": logps})), **case[1]).loss

    assert torch.autograd.gradcheck(loss, (t.logps,))


@cases
def test_micro_batches_of_whole_groups_add_up(case):
    lengths, groups = [4, 2, 0, 7, 1, 3], [1, 1, 1, 2, 2, 2]
    whole = make(lengths, groups, old=True)
    out, gradient = run(*case[:1], whole, case[1])
    losses, gradients = [], []
    for first, last in ((0, 3), (3, 6)):
        a, b = int(whole.cu_seqlens[first]), int(whole.cu_seqlens[last])
        fields = {"alpha": whole.alpha, "num_sequences": 5, "num_tokens": 17}
        fields |= {k: getattr(whole, k).detach()[a:b] for k in ("base_logps", "old_logps")}
        fields |= {k: getattr(whole, k)[first:last] for k in ("psi", "rewards", "group_ids")}
        logps, cu_seqlens = whole.logps.detach()[a:b].requires_grad_(), whole.cu_seqlens[first : last + 1] - a
        part_out, part_gradient = run(case[0], Trajectories(logps=logps, cu_seqlens=cu_seqlens, **fields), case[1])
        losses.append(part_out.loss)
        gradients.append(part_gradient)
    torch.testing.assert_close(sum(losses), out.loss, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(torch.cat(gradients), gradient, rtol=1e-12, atol=1e-15)


@cases
@pytest.mark.parametrize("lengths", [[0, 3, 0, 5, 2], [0, 4], [0, 0], []])
def test_empty_completions_add_nothing(case, lengths):
    nan = torch.full((len(lengths),), math.nan).double().masked_fill(torch.tensor(lengths) > 0, -0.5)
    t = change(make(lengths, [1] * 5), psi=nan)
    out, gradient = run(case[0], t, case[1])
    empty = ~t.has_tokens
    for values in (out.weight, out.logp_mean, out.advantage):
        assert (values[empty] == 0).all() and values.isfinite().all()
    assert gradient.isfinite().all() and out.loss.isfinite()
    if len(lengths) == 2 and case[0] != "grpo":
        assert out.advantage.abs().max() < 1e-12, "the only one with tokens has nothing to be compared with"
    if not t.has_tokens.any():
        assert out.loss == 0


@cases
def test_non_finite_input_is_not_hidden(case):
    t = make()
    logps = t.logps.detach().clone()
    logps[3] = math.nan
    fields = {k: getattr(t, k) for k in t.__dataclass_fields__}
    assert not getattr(family, case[0])(Trajectories(**(fields | {"logps": logps})), **case[1]).loss.isfinite()


# Exact expectations: 3 letters, 2 tokens, all 9 completions; the policy is a table


class Table:
    def __init__(self, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_()
        self.base = torch.randn(4, 3, generator=g, dtype=torch.float64).log_softmax(1)
        self.words = list(itertools.product(range(3), repeat=2))

    def tokens(self, word, table):
        """(2,) log-probs of a completion; row 0 of the table is for its first letter, 1 + first for its second."""
        return torch.stack([table[0, word[0]], table[1 + word[0], word[1]]])

    def trajectories(self, words, alpha):
        logps = self.logits.log_softmax(1)
        return Trajectories(
            logps=torch.cat([self.tokens(w, logps) for w in words]),
            base_logps=torch.cat([self.tokens(w, self.base) for w in words]),
            cu_seqlens=torch.arange(0, 2 * len(words) + 1, 2, dtype=torch.int32),
            group_ids=torch.zeros(len(words), dtype=torch.int64),
            alpha=alpha,
        )

    def expected_gradient(self, objective, alpha, **options):
        """E[∇L] over all pairs of independent samples of the policy."""
        total = torch.zeros_like(self.logits)
        logps = self.logits.detach().log_softmax(1)
        for pair in itertools.product(self.words, repeat=2):
            probability = sum(self.tokens(w, logps).sum() for w in pair).exp()
            loss = objective(self.trajectories(pair, alpha), **options).loss
            total += probability * torch.autograd.grad(loss, self.logits)[0]
        return total

    def kl(self, alpha):
        logps = self.logits.log_softmax(1)
        pi = torch.stack([self.tokens(w, logps).sum() for w in self.words])
        target = torch.stack([alpha * self.tokens(w, self.base).sum() for w in self.words]).log_softmax(0)
        return (pi.exp() * (pi - target)).sum()


@pytest.mark.parametrize(("baseline", "factor"), [("leave_one_out", 1.0), ("group", 0.5)])
def test_rl_trajectory_descends_the_kl_to_the_power_of_the_base(baseline, factor):
    table = Table()
    expected = table.expected_gradient(family.rl_trajectory, 2.5, baseline=baseline)
    (kl,) = torch.autograd.grad(table.kl(2.5), table.logits)
    torch.testing.assert_close(expected, factor * kl, rtol=1e-11, atol=1e-14)
    assert kl.abs().max() > 0.05


def test_rl_token_is_blind_to_what_follows():
    """Its expected gradient is that of the KL to p_base(token|state)^α at each state, as often as the state is seen."""
    table, alpha = Table(), 2.5
    expected = table.expected_gradient(family.rl_token, alpha, baseline="leave_one_out")
    pi = table.logits.log_softmax(1)
    per_state = (pi.exp() * (pi - (alpha * table.base).log_softmax(1))).sum(1)
    visits = torch.cat([torch.ones(1).double(), pi[0].exp().detach()])
    (greedy,) = torch.autograd.grad((visits * per_state).sum() / 2, table.logits)
    torch.testing.assert_close(expected, greedy, rtol=1e-11, atol=1e-14)
    (kl,) = torch.autograd.grad(table.kl(alpha), table.logits)
    assert not torch.allclose(2 * expected, kl, rtol=0.1)


def test_grpo_weight_and_dr_grpo():
    t = make([4, 2, 3], [1, 1, 1], old=True)
    out = family.grpo(t, epsilon_low=0.01, epsilon_high=0.02)
    assert out.weight.min() > 0.99 - 1e-12 and out.weight.max() < 1.02 + 1e-12 and (out.weight != 1).all()
    assert torch.equal(family.grpo(make([4, 2], [1, 1])).weight, torch.ones(2, dtype=torch.float64))
    constant = make([4, 2, 3], [1, 1, 1], num_tokens=3 * 10)  # max_completion_length = 10
    dr = family.grpo(constant, scale_rewards="none").loss
    a = constant.rewards - constant.rewards.mean()
    torch.testing.assert_close(dr, -(a * constant.lengths).sum() / 30)


@pytest.mark.parametrize(
    ("name", "fields", "options", "error", "match"),
    [
        ("rl_trajectory", {}, {"baseline": "mean"}, ValueError, "must be 'group' or 'leave_one_out', got 'mean'"),
        ("rl_trajectory", {"group_ids": None}, {}, ValueError, r"the baseline needs group_ids \(B,\), got None"),
        ("rl_token", {"group_ids": torch.arange(8)}, {}, ValueError, "two completions of a prompt .* got one in gr"),
        ("grpo", {"rewards": None}, {}, ValueError, r"needs rewards \(B,\), got None"),
        ("grpo", {"group_ids": None}, {}, ValueError, "the advantage needs group_ids"),
        ("grpo", {"group_ids": torch.arange(8)}, {}, ValueError, "got one in group 0"),
        ("grpo", {}, {"aggregation": "token"}, ValueError, "must be 'dapo' or 'sequence', got 'token'"),
        ("grpo", {}, {"scale_rewards": "batch"}, ValueError, "scale_rewards must be 'group' or 'none'"),
        ("grpo", {}, {"epsilon_low": -0.1}, ValueError, "epsilon_low must be finite and >= 0, got -0.1"),
        ("grpo", {}, {"epsilon_low": 1.5}, ValueError, "epsilon_low must be <= 1, got 1.5"),
        ("grpo", {}, {"epsilon_high": math.inf}, ValueError, "epsilon_high must be finite"),
        ("grpo", {}, {"kl_coefficient": "0"}, TypeError, "kl_coefficient must be a number, got str"),
    ],
)
def test_bad_arguments(name, fields, options, error, match):
    with pytest.raises(error, match=f"^{name}: .*{match}|^{name}: {match}"):
        getattr(family, name)(change(make(), **fields), **options)
