from __future__ import annotations

import pytest
import torch

from powerflow_fast.models import pack_batch, pad_batch
from powerflow_fast.models.batches import token_batches
from powerflow_fast.ops import segment_sum


def test_pad_batch_by_hand():
    batch = pad_batch([[5, 6, 7], [8]], [[9], [10, 11, 12]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9], [8, 10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    # Token 9 is predicted at place 2 of row 0; 10, 11, 12 at places 0, 1, 2 of row 1, which starts at 4.
    assert batch.positions.tolist() == [2, 4, 5, 6]
    assert batch.labels.tolist() == [9, 10, 11, 12]
    assert batch.cu_seqlens.tolist() == [0, 1, 4] and batch.cu_seqlens.dtype == torch.int32
    assert batch.prompt_positions.tolist() == [0, 1, 2, 4]
    assert len(batch) == 2


def test_pack_batch_by_hand():
    batch = pack_batch([[5, 6, 7], [4, 4], [8]], [[9], [], [10, 11, 12]])
    assert batch.input_ids.tolist() == [[5, 6, 7, 9, 4, 4, 8, 10, 11, 12]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]]
    assert batch.positions.tolist() == [2, 6, 7, 8]
    assert batch.labels.tolist() == [9, 10, 11, 12]
    assert batch.prompt_positions.tolist() == [0, 1, 2, 4, 5, 6]
    assert batch.cu_seqlens.tolist() == [0, 1, 1, 4] and batch.cu_seqlens.dtype == torch.int32
    assert len(batch) == 3 and set(batch.model_inputs()) == {"input_ids", "position_ids"}


def test_rows_are_as_short_as_is_cheap():
    lengths = [40, 10, 10, 20, 38, 1]  # 119 tokens
    prompts, completions = [[7]] * 6, [[8] * (n - 1) for n in lengths]

    def shape(**options):
        batch = pack_batch(prompts, completions, **options)
        row = batch.input_ids.shape[1]
        for b, n in enumerate(lengths):  # each whole, in one row, its positions from 0
            start = int(batch.prompt_positions[b])  # prompts are of one token
            assert start // row == (start + n - 1) // row
            assert batch.position_ids.flatten()[start : start + n].tolist() == list(range(n))
        assert int((batch.input_ids != 0).sum()) == 119 and bool((batch.position_ids[batch.input_ids == 0] == 0).all())
        assert batch.labels.tolist() == [8] * (119 - 6)
        return tuple(batch.input_ids.shape)

    assert shape() == (1, 119)
    assert shape(break_even=1e9) == (1, 119), "where attention is free, gaps are all that costs"
    assert shape(break_even=0.0) == shape(break_even=0.0, max_tokens=120) == (3, 40)
    assert shape(break_even=0.0, max_tokens=119) == (1, 119), "3 x 40 would exceed the budget"
    batch = pack_batch([[7]] * 4, [[8] * 29] * 4, break_even=1e3)
    assert batch.input_ids.shape == (4, 30), "equal lengths are rows of their own"


def test_pad_batch_matches_a_loop():
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(1, 9, (n,), generator=generator).tolist() for n in (1, 7, 3, 2, 5)]
    completions = [torch.randint(1, 9, (n,), generator=generator).tolist() for n in (4, 0, 6, 1, 2)]
    batch = pad_batch(prompts, completions, pad_id=0)
    positions, labels = [], []
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        row = prompt + completion
        assert batch.input_ids[b].tolist() == row + [0] * (batch.input_ids.shape[1] - len(row))
        assert int(batch.attention_mask[b].sum()) == len(row)
        positions += [b * batch.input_ids.shape[1] + t - 1 for t in range(len(prompt), len(row))]
        labels += completion
    assert batch.positions.tolist() == positions
    assert batch.labels.tolist() == labels
    assert batch.prompt_lengths.tolist() == [1, 7, 3, 2, 5]
    assert batch.completion_lengths.tolist() == [4, 0, 6, 1, 2]
    assert batch.input_ids.flatten()[batch.prompt_positions].tolist() == [t for ids in prompts for t in ids]
    packed = pack_batch(prompts, completions)
    assert packed.input_ids[0].tolist() == batch.input_ids[batch.attention_mask.bool()].tolist()
    assert packed.input_ids.flatten()[packed.prompt_positions].tolist() == [t for ids in prompts for t in ids]
    for name in ("labels", "cu_seqlens", "prompt_lengths", "completion_lengths"):
        assert torch.equal(getattr(packed, name), getattr(batch, name)), name


def test_pad_token_inside_the_text_is_not_padding():
    batch = pad_batch([[1, 2, 3], [1]], [[2, 0, 2], [0]], pad_id=0)
    assert batch.attention_mask.sum(1).tolist() == [6, 2]
    assert batch.labels.tolist() == [2, 0, 2, 0]


def test_all_completions_empty():
    for batch in (pad_batch([[1, 2], [3]], [[], []], pad_id=0), pack_batch([[1, 2], [3]], [[], []])):
        assert batch.positions.shape == batch.labels.shape == (0,)
        assert batch.cu_seqlens.tolist() == [0, 0, 0]


@pytest.mark.parametrize("make", [lambda p, c: pad_batch(p, c, pad_id=0), pack_batch])
def test_bad_lists_are_refused(make):
    with pytest.raises(ValueError, match=r"pa(d|ck)_batch: prompt_ids\[1\] is empty"):
        make([[1], []], [[2], [3]])
    with pytest.raises(ValueError, match="equally long"):
        make([[1]], [[2], [3]])
    with pytest.raises(ValueError, match="not empty"):
        make([], [])


def test_to_moves_every_tensor():
    for batch in (pad_batch([[1, 2]], [[3]], pad_id=0), pack_batch([[1, 2]], [[3]])):
        moved = batch.to("meta")
        assert type(moved) is type(batch) and {t.device.type for t in vars(moved).values()} == {"meta"}


@pytest.mark.parametrize("padded", [False, True])
def test_token_batches_stay_within_the_budget(padded):
    generator = torch.Generator().manual_seed(3)
    for trial in range(40):
        lengths = torch.randint(1, 60, (1 + trial,), generator=generator).tolist()
        budget = 40 + 10 * (trial % 12)
        batches = token_batches(lengths, budget, padded=padded)
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        for batch in batches:
            of = [lengths[i] for i in batch]
            assert len(of) == 1 or (max(of) * len(of) if padded else sum(of)) <= budget
        assert batches == token_batches(lengths, budget, padded=padded)
        for more in (len(batches) + 1, len(lengths)):
            asked = token_batches(lengths, budget, padded=padded, at_least=more)
            assert len(asked) == min(more, len(lengths)) and all(asked)
            assert sorted(i for batch in asked for i in batch) == list(range(len(lengths)))


def test_token_batches_are_balanced_and_few():
    lengths = [100, 90, 50, 40, 40, 30, 30, 20]  # 400 tokens
    sums = [sum(lengths[i] for i in batch) for batch in token_batches(lengths, 210)]
    assert sums == [200, 200]
    assert token_batches([7, 500, 9], 100) == [[1], [2, 0]]
    assert token_batches([30, 10, 28, 9], 60, padded=True) == [[0, 2], [1, 3]]
    assert token_batches([5], 1) == [[0]]


def test_segment_sum():
    values = torch.tensor([1.0, 2.0, float("inf"), 4.0, 5.0])
    cu = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    assert segment_sum(values, cu).tolist() == [3.0, 0.0, float("inf"), 9.0]  # infinity stays in its segment
    # 2^24 + 1 is lost when each addition is rounded to fp32.
    long = torch.tensor([2.0**24, 1.0, 1.0])
    assert segment_sum(long, torch.tensor([0, 3], dtype=torch.int32)).item() == 2.0**24 + 2
