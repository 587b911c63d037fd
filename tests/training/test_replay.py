"""The replay buffer: what comes out is what went in, who is drawn and who is dropped, and its saved state."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter

import pytest
import torch

from powerflow_fast.checkpoints.folder import load_checkpoint, save_checkpoint
from powerflow_fast.errors import CheckpointError
from powerflow_fast.training.replay import ReplayBatch, ReplayBuffer


def make(groups, *, lengths=(2, 0, 3), rewards=True, seed=0) -> ReplayBatch:
    """One group of ``len(lengths)`` completions for each number in ``groups``; every value tells where it is from."""
    k, g = len(lengths), torch.Generator().manual_seed(seed)
    b, n = k * len(groups), sum(lengths) * len(groups)
    return ReplayBatch(
        prompt_ids=[[100 + group, 7] for group in groups for _ in lengths],
        completion_ids=[
            [1000 * group + 10 * i + t for t in range(length)] for group in groups for i, length in enumerate(lengths)
        ],
        finished=[i % 2 == 0 for _ in groups for i in range(k)],
        group_ids=torch.tensor(groups).repeat_interleave(k),
        psi=-torch.rand(b, generator=g),
        base_logps=-torch.rand(n, generator=g),
        old_logps=-torch.rand(n, generator=g),
        rewards=torch.tensor([float(group) for group in groups]).repeat_interleave(k) if rewards else None,
    )


def same(a: ReplayBatch, b: ReplayBatch) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def drawn(batch: ReplayBatch) -> list[int]:
    """The numbers of the groups in ``batch``."""
    return [p[0] - 100 for p in dict.fromkeys(map(tuple, batch.prompt_ids))]


@pytest.mark.parametrize("rewards", [True, False])
def test_what_comes_out_is_what_went_in(rewards):
    batch = make([4, 2, 9], rewards=rewards)
    # interleave the completions of the groups
    order = [0, 3, 6, 1, 4, 7, 2, 5, 8]
    starts = list(itertools.accumulate(batch.lengths, initial=0))
    tokens = [t for i in order for t in range(starts[i], starts[i + 1])]
    mixed = ReplayBatch(
        *[[values[i] for i in order] for values in (batch.prompt_ids, batch.completion_ids, batch.finished)],
        batch.group_ids[order],
        batch.psi[order],
        batch.base_logps[tokens],
        batch.old_logps[tokens],
        batch.rewards[order] if rewards else None,
    )
    buffer = ReplayBuffer(5, seed=1)
    buffer.add(mixed, step=12)
    mixed.psi.zero_()  # the buffer has copies
    assert len(buffer) == 3 and buffer.num_completions == 9
    out = buffer.sample(3)
    assert len(out) == 9 and out.lengths == [2, 0, 3] * 3
    assert out.group_ids.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and out.steps.tolist() == [12] * 9
    for place, group in enumerate(drawn(out)):
        source = [4, 2, 9].index(group)
        rows, span = slice(3 * source, 3 * source + 3), slice(5 * source, 5 * source + 5)
        got_rows, got_span = slice(3 * place, 3 * place + 3), slice(5 * place, 5 * place + 5)
        for name in ("prompt_ids", "completion_ids", "finished"):
            assert getattr(out, name)[got_rows] == getattr(batch, name)[rows]
        for name in ("base_logps", "old_logps"):
            assert torch.equal(getattr(out, name)[got_span], getattr(batch, name)[span])
        assert torch.equal(out.psi[got_rows], batch.psi[rows])
        assert torch.equal(out.rewards[got_rows], batch.rewards[rows]) if rewards else out.rewards is None
    assert same(out.to("cpu"), out)


def test_the_oldest_group_is_dropped():
    buffer = ReplayBuffer(3)
    for step in range(5):
        buffer.add(make([9 - step]), step=step)
    assert sorted(drawn(buffer.sample(3))) == [5, 6, 7]
    buffer.add(make([1, 2, 3, 4]), step=6)  # more than fit
    assert sorted(drawn(buffer.sample(3))) == [2, 3, 4]


def test_the_lowest_priority_is_dropped_and_the_older_of_equals():
    buffer = ReplayBuffer(3, prioritized=True)
    buffer.add(make([5, 1, 3]), step=0)  # the mean reward is the group's number
    buffer.add(make([4]), step=1)
    assert sorted(drawn(buffer.sample(3))) == [3, 4, 5]
    buffer.add(make([2]), step=2)  # lowest itself
    assert sorted(drawn(buffer.sample(3))) == [3, 4, 5]
    buffer.add(make([8, 9]), step=3, priorities=[3.0, 2.5])
    assert sorted(drawn(buffer.sample(3))) == [4, 5, 8], "8 has the priority of 3, which is older; 9 has less"


def test_drop_before():
    buffer = ReplayBuffer(9)
    for step in (3, 5, 4):
        buffer.add(make([step]), step=step)
    assert buffer.drop_before(4) == 1 and sorted(drawn(buffer.sample(2))) == [4, 5]
    assert buffer.drop_before(99) == 2 and len(buffer) == 0


def shares(buffer: ReplayBuffer, draws: int, size: int = 1) -> dict[tuple[int, ...], float]:
    counts = Counter(tuple(drawn(buffer.sample(size))) for _ in range(draws))
    return {key: count / draws for key, count in counts.items()}


def test_uniform_draws():
    buffer = ReplayBuffer(4, seed=3)
    buffer.add(make([0, 1, 2, 3], lengths=(1,)), step=0)
    share = shares(buffer, 2000)
    assert set(share) == {(i,) for i in range(4)}
    assert all(abs(s - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 2000) for s in share.values()), share


def test_draws_in_proportion_to_the_reward():
    temperature = 0.5
    weights = [1.0, 2.0, 5.0]
    buffer = ReplayBuffer(3, prioritized=True, seed=4, priority_temperature=temperature)
    log_rewards = [temperature * math.log(w) for w in weights]
    buffer.add(make([0, 1, 2], lengths=(1,)), step=0, priorities=log_rewards)
    share = shares(buffer, 2000)
    for group, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(share[(group,)] - p) < 4 * math.sqrt(p * (1 - p) / 2000), share
    # without replacement: the second draw is in proportion among those left
    pairs = shares(buffer, 2000, size=2)
    p = 5 / 8 * 2 / 3
    assert abs(pairs[(2, 1)] - p) < 4 * math.sqrt(p * (1 - p) / 2000), pairs
    assert all(len(set(pair)) == 2 for pair in pairs)


def test_log_rewards_of_any_size_can_be_drawn():
    buffer = ReplayBuffer(3, prioritized=True)
    buffer.add(make([0, 1, 2]), step=0, priorities=[-1e5, 0.0, -5e4])
    assert drawn(buffer.sample(3)) == [1, 2, 0], "exp(-5e4) is 0, but not in log space"


def test_mean_reward_is_the_priority():
    batch = make([0, 1])
    batch.rewards = torch.tensor([0.0, 0.0, 3000.0, 999.0, 999.0, 999.0])  # means 1000 and 999
    buffer = ReplayBuffer(1, prioritized=True)
    buffer.add(batch, step=0)
    assert drawn(buffer.sample(1)) == [0]


def test_draws_depend_on_the_seed_only():
    def draw(seed):
        buffer = ReplayBuffer(8, seed=seed)
        buffer.add(make(list(range(8))), step=0)
        torch.rand(3)  # the global generator plays no part
        return [drawn(buffer.sample(3)) for _ in range(4)]

    assert draw(0) == draw(0) != draw(1)


@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("rewards", [True, False])
def test_it_resumes_bit_equal(tmp_path, prioritized, rewards):
    def options(count):
        return {"priorities": [1.5] * count} if prioritized and not rewards else {}

    buffer = ReplayBuffer(4, prioritized=prioritized, seed=5)
    buffer.add(make([3, 1, 2], rewards=rewards), step=1, **options(3))
    buffer.add(make([6], lengths=(1, 4), rewards=rewards), step=2, **options(1))  # groups may differ in size
    buffer.sample(2)
    tensors, meta = buffer.state_dict()
    assert all(isinstance(t, torch.Tensor) for t in tensors.values()) and json.loads(json.dumps(meta)) == meta
    save_checkpoint(tmp_path / "checkpoint-1", tensors={"replay": tensors}, state={"replay": meta})
    loaded = load_checkpoint(tmp_path / "checkpoint-1")
    again = ReplayBuffer(4, prioritized=prioritized, seed=99)
    again.add(make([50], rewards=rewards), step=0, **options(1))
    again.load_state_dict(loaded.tensors["replay"], loaded.state["replay"])
    assert len(again) == 4 and again.num_completions == buffer.num_completions == 11
    for part in (buffer, again):
        part.add(make([8], rewards=rewards, seed=2), step=3, **options(1))
    for _ in range(3):
        assert same(buffer.sample(3), again.sample(3))
    after, _ = again.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in buffer.state_dict()[0].items())


def test_an_empty_buffer(tmp_path):
    buffer = ReplayBuffer(2, seed=7)
    assert len(buffer) == 0 and buffer.num_completions == 0
    with pytest.raises(ValueError, match=r"sample: num_groups must lie in \[1, 0\], the groups stored, got 1"):
        buffer.sample(1)
    tensors, meta = buffer.state_dict()
    save_checkpoint(tmp_path / "checkpoint-1", tensors={"replay": tensors}, state={"replay": meta})
    again = ReplayBuffer(2)
    again.add(make([1]), step=0)
    again.load_state_dict(load_checkpoint(tmp_path / "checkpoint-1").tensors["replay"], meta)
    assert len(again) == 0
    for part in (buffer, again):
        part.add(make([1, 2]), step=0)
    assert same(buffer.sample(1), again.sample(1))


def test_a_checkpoint_of_another_buffer_is_refused():
    state = ReplayBuffer(2).state_dict()
    with pytest.raises(
        CheckpointError, match="a buffer with capacity=2 instead of 3, prioritized=False instead of True"
    ):
        ReplayBuffer(3, prioritized=True).load_state_dict(*state)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"capacity": 0}, ValueError, "capacity must be >= 1, got 0"),
        ({"capacity": 2.0}, TypeError, "capacity must be an int, got float"),
        ({"capacity": 1, "seed": "0"}, TypeError, "seed must be an int, got str"),
        ({"capacity": 1, "prioritized": 1}, TypeError, "prioritized must be a bool, got int"),
        ({"capacity": 1, "priority_temperature": 0}, ValueError, "priority_temperature must be finite and > 0, got 0"),
    ],
)
def test_options_are_checked(options, error, match):
    with pytest.raises(error, match=f"ReplayBuffer: {match}"):
        ReplayBuffer(**options)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"finished": [True]}, ValueError, "finished must have B=6 entries, as many as completion_ids, got 1"),
        ({"prompt_ids": [[1]] * 5}, ValueError, "prompt_ids must have B=6 entries"),
        (
            {"prompt_ids": [[1]] * 5 + [[2]]},
            ValueError,
            "prompt_ids must be equal within a group, completions 3 and 5 of group 1 have",
        ),
        (
            {"group_ids": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            r"group_ids must have shape \(B,\)=\(6,\), got \(5,\)",
        ),
        ({"psi": torch.zeros(6, dtype=torch.float64)}, TypeError, "psi must be torch.float32, got torch.float64"),
        ({"psi": [0.0] * 6}, TypeError, "psi must be a torch.Tensor, got list"),
        ({"base_logps": torch.zeros(6)}, ValueError, r"base_logps must have shape \(N,\)=\(10,\), got \(6,\)"),
        ({"old_logps": torch.zeros(11)}, ValueError, r"old_logps must have shape \(N,\)=\(10,\), got \(11,\)"),
        ({"rewards": torch.zeros(2)}, ValueError, r"rewards must have shape \(B,\)=\(6,\), got \(2,\)"),
        (
            {"rewards": None},
            ValueError,
            "rewards must be given for all groups or for none; those in the buffer have rewards",
        ),
    ],
)
def test_batches_are_checked(change, error, match):
    buffer = ReplayBuffer(9)
    buffer.add(make([5]), step=0)
    with pytest.raises(error, match=rf"ReplayBuffer\.add: {match}"):
        buffer.add(ReplayBatch(**(vars(make([0, 1])) | change)), step=1)
    assert len(buffer) == 1, "a batch is added whole or not at all"


def test_priorities_are_checked():
    plain, ranked = ReplayBuffer(9), ReplayBuffer(9, prioritized=True)
    for buffer, rewards, priorities, match in [
        (plain, True, [1.0, 2.0], "priorities must be None in a buffer with prioritized=False"),
        (ranked, False, None, "rewards or priorities must be given in a buffer with prioritized=True"),
        (ranked, True, [1.0], r"one entry per group \(2\), got 1"),
        (ranked, True, [1.0, math.nan], r"priorities must be finite, got \[1\.0, nan\]"),
    ]:
        with pytest.raises(ValueError, match=match):
            buffer.add(make([0, 1], rewards=rewards), step=0, priorities=priorities)
    with pytest.raises(TypeError, match="step must be an int, got float"):
        plain.add(make([0]), step=1.0)
    with pytest.raises(TypeError, match="num_groups must be an int, got float"):
        plain.sample(1.0)
    assert len(plain) == len(ranked) == 0
