"""Trajectories: sums, means, ratios and group statistics against loops, and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from powerflow_fast.objectives import Trajectories
from powerflow_fast.ops import la_tb_loss

LENGTHS = [4, 0, 7, 1, 3, 0]
GROUPS = [9, 9, -3, 9, -3, 5]  # interleaved, negative, one without any token


def make(lengths=LENGTHS, *, dtype=torch.float64, seed=0, **fields):
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    draws = [(-3 * torch.rand(n, generator=g, dtype=torch.float64)).to(dtype) for _ in range(3)]
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    fields = {"alpha": 2.5, "group_ids": torch.tensor((GROUPS * 9)[: len(lengths)], dtype=torch.int64)} | fields
    if fields.pop("old", False):
        fields["old_logps"] = draws[0] + (draws[2] + 1.5) / 10
    return Trajectories(logps=draws[0].requires_grad_(), base_logps=draws[1], cu_seqlens=cu, **fields)


def parts(t, values):
    return values.split(t.lengths.tolist())


def test_sums_means_and_their_gradients(poisoned_memory):
    t = make()
    assert t.lengths.tolist() == LENGTHS and t.has_tokens.tolist() == [length > 0 for length in LENGTHS]
    sums = torch.stack([p.sum() for p in parts(t, t.logps)])
    means = torch.stack([p.mean() if len(p) else p.sum() for p in parts(t, t.logps)])
    torch.testing.assert_close(t.sums(t.logps), sums)
    torch.testing.assert_close(t.means(t.logps), means)
    torch.testing.assert_close(t.logp_mean, means.detach())
    values = torch.arange(6, dtype=torch.float64).requires_grad_()
    spread = torch.cat([v.expand(n) for v, n in zip(values, LENGTHS, strict=True)])
    assert torch.equal(t.per_token(values), spread)
    for function, inputs in ((t.sums, t.logps), (t.means, t.logps), (t.per_token, values), (t.token_mean, t.logps)):
        assert torch.autograd.gradcheck(function, (inputs.detach().requires_grad_(),))
    assert torch.autograd.gradcheck(t.sequence_mean, (values,))


def test_means_over_the_step():
    values, tokens = torch.arange(6.0, dtype=torch.float64), torch.arange(15.0, dtype=torch.float64)
    values[1] = math.nan  # of a completion without tokens
    t = make()
    assert t.sequence_mean(values) == (0 + 2 + 3 + 4) / 4 and t.token_mean(tokens) == 7
    t = make(num_sequences=10, num_tokens=210)
    assert t.sequence_mean(values) == pytest.approx(0.9, rel=1e-15) and t.token_mean(tokens) == 0.5


def test_long_sums_keep_their_digits():
    t = make([8192, 8192], dtype=torch.float32)
    exact = torch.stack([p.double().sum() for p in parts(t, t.logps.detach())])
    assert torch.equal(t.sums(t.logps), exact.float()) and torch.equal(t.means(t.logps), (exact / 8192).float())


@pytest.mark.parametrize("level", ["sequence", "length_normalized"])
@pytest.mark.parametrize("clip", [(0.8, 1.2), (0.0, 1.0), (0.95, 3.0)])
def test_weight_is_that_of_la_tb(level, clip):
    t = make(old=True, clip=clip, importance_level=level)
    out = la_tb_loss(
        t.logps,
        t.sums(t.base_logps),
        torch.zeros(6, dtype=torch.float64),
        t.cu_seqlens,
        alpha=1.0,
        old_logps=t.sums(t.old_logps),
        clip=clip,
        importance_level=level,
    )
    torch.testing.assert_close(t.importance_weight(), out.weight, rtol=1e-12, atol=0)
    assert not t.importance_weight().requires_grad and t.importance_weight()[1] == 0
    assert make().importance_weight().tolist() == [float(length > 0) for length in LENGTHS]


def test_huge_ratios_are_clipped_before_they_overflow():
    t = make()
    far = Trajectories(logps=t.logps, base_logps=t.base_logps, cu_seqlens=t.cu_seqlens, old_logps=t.base_logps - 1e4)
    assert far.importance_weight().tolist() == [1.2 if length else 0.0 for length in LENGTHS]


def test_target_logps():
    psi = torch.tensor([0.0, -1, -0.5, 0, -2, 0], dtype=torch.float64)
    t = make(psi=psi)
    expected = torch.cat([2.5 * (p + v) for p, v in zip(parts(t, t.base_logps), psi, strict=True)])
    torch.testing.assert_close(t.target_logps, expected)
    torch.testing.assert_close(make().target_logps, 2.5 * t.base_logps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_statistics(dtype, poisoned_memory):
    t = make(dtype=dtype)
    values = torch.tensor([1.0, math.nan, 3, 4, 7, math.nan], dtype=dtype)
    weights = torch.tensor([1.0, 9, 0, 3, 0, 1], dtype=dtype)
    assert t.group_sum(values).tolist() == [5, 5, 10, 5, 10, 0]
    assert t.group_mean(values).tolist() == [2.5, 2.5, 5, 2.5, 5, 0]
    assert t.group_mean(values, weights).tolist() == [3.25, 3.25, 0, 3.25, 0, 0]
    assert t.group_max(values).tolist() == [4, 4, 7, 4, 7, -math.inf]
    assert t.group_sizes.tolist() == [2, 2, 2, 2, 2, 0]
    assert t.group_mean(values).dtype == dtype and not t.group_mean(t.sums(t.logps)).requires_grad
    broken = torch.tensor([1.0, 0, math.nan, 4, 7, 0], dtype=dtype)
    assert t.group_mean(broken).isnan().tolist() == [False, False, True, False, True, False]


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_nothing_at_all(lengths):
    t = make(lengths, old=True)
    zero = torch.zeros(len(lengths), dtype=torch.float64)
    for values in (t.sums(t.logps), t.means(t.logps), t.importance_weight(), t.group_mean(zero), t.group_sizes):
        assert torch.equal(values, zero)
    assert t.group_max(zero).shape == zero.shape and t.per_token(zero).shape == (0,)
    assert t.sequence_mean(zero) == 0 and t.token_mean(t.logps) == 0


def test_group_advantages():
    ids = torch.tensor([9, 9, -3, 9, -3, 9])
    t = make(group_ids=ids, rewards=torch.tensor([1.0, 5, 2, 3, 2, 7], dtype=torch.float64))
    assert t.group_advantages("none").tolist() == [-1, 0, 0, 1, 0, 0]
    std = 2**0.5 + 1e-4
    torch.testing.assert_close(t.group_advantages(), torch.tensor([-1 / std, 0, 0, 1 / std, 0, 0]).double())
    alone = make([2, 0], group_ids=torch.zeros(2, dtype=torch.int64), rewards=torch.ones(2, dtype=torch.float64))
    assert alone.group_advantages().tolist() == [0, 0]


def test_bad_groups():
    rewards = torch.ones(6, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^x: the advantage needs two completions .* got one in group 5"):
        make(rewards=rewards).group_advantages(op="x")
    with pytest.raises(ValueError, match=r"^x: the advantage needs group_ids \(B,\), got None"):
        make(rewards=rewards, group_ids=None).group_advantages(op="x")
    with pytest.raises(ValueError, match=r"^x: needs rewards \(B,\), got None"):
        make().group_advantages(op="x")
    with pytest.raises(ValueError, match="scale_rewards must be 'group' or 'none', got 'batch'"):
        make(rewards=rewards).group_advantages("batch")


def test_frozen():
    with pytest.raises(AttributeError):
        make().alpha = 3.0


def bad(name, value, error, match):
    return pytest.param(name, value, error, match, id=f"{name}-{match[:30]}")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        bad("logps", [0.0], TypeError, "must be a torch.Tensor, got list"),
        bad("logps", torch.zeros(2, 3), ValueError, r"must have shape \(N,\), got \(2, 3\)"),
        bad("logps", torch.zeros(6, dtype=torch.bfloat16), TypeError, "torch.float32 or torch.float64, got torch.bfl"),
        bad("base_logps", torch.zeros(2), ValueError, r"must have shape \(N,\)=\(6,\), got \(2,\)"),
        bad("base_logps", torch.zeros(6, dtype=torch.float64), TypeError, "must be torch.float32.*float64"),
        bad("base_logps", None, TypeError, "must be a torch.Tensor, got NoneType"),
        bad("old_logps", torch.zeros(2), ValueError, r"must have shape \(N,\)=\(6,\), got \(2,\)"),
        bad("log_z", torch.zeros(()), ValueError, r"must have shape \(B,\)=\(2,\), got \(\)"),
        bad("log_z", 1.0, TypeError, "must be a torch.Tensor, got float"),
        bad("psi", torch.zeros(6), ValueError, r"must have shape \(B,\)=\(2,\), got \(6,\)"),
        bad("rewards", torch.zeros(3), ValueError, r"must have shape \(B,\)=\(2,\), got \(3,\)"),
        bad("rewards", torch.tensor([0.0, math.nan]), ValueError, "must be finite, got nan at 1"),
        bad("rewards", torch.tensor([math.inf, 0]), ValueError, "must be finite, got inf at 0"),
        bad("group_ids", torch.zeros(2), TypeError, "must be torch.int64.*float32"),
        bad("group_ids", torch.zeros(2, dtype=torch.int64, device="meta"), ValueError, "must be on logps' device cpu"),
        bad("cu_seqlens", torch.tensor([0, 2, 6]), TypeError, "must be torch.int32"),
        bad("cu_seqlens", torch.tensor([0, 7, 6], dtype=torch.int32), ValueError, "rise from 0 to N=6"),
        bad("cu_seqlens", torch.tensor([0, 6], dtype=torch.int32, device="meta"), ValueError, "device"),
        bad("alpha", 0.0, ValueError, "alpha"),
        bad("alpha", math.nan, ValueError, "nan"),
        bad("clip", (1.2, 0.8), ValueError, "0 <= low <= 1 <= high"),
        bad("importance_level", "token", ValueError, "must be 'sequence' or 'length_normalized', got 'token'"),
        bad("num_sequences", -1, ValueError, "must be >= 0, got -1"),
        bad("num_tokens", 2.0, TypeError, "must be an int or None, got float"),
        bad("num_tokens", True, TypeError, "must be an int or None, got bool"),
    ],
)
def test_bad_arguments(name, value, error, match):
    good = {"logps": torch.zeros(6), "base_logps": torch.zeros(6), "cu_seqlens": torch.tensor([0, 2, 6]).int()}
    Trajectories(**good)
    with pytest.raises(error, match=f"^Trajectories: .*{name}.*{match}|^Trajectories: {match}"):
        Trajectories(**(good | {name: value}))


def test_bad_values():
    t = make()
    with pytest.raises(ValueError, match=r"^Trajectories.means: values must have shape \(N,\)=\(15,\), got \(6,\)"):
        t.means(torch.zeros(6))
    with pytest.raises(TypeError, match=r"^Trajectories.per_token: values must be torch.float32 .*int64"):
        t.per_token(t.group_ids)
    with pytest.raises(ValueError, match=r"group statistics need group_ids \(B,\), got None"):
        make(group_ids=None).group_mean(torch.zeros(6))
