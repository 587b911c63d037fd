from __future__ import annotations

import pytest
import torch

from powerflow_fast.packing import pad_batch, repeat_by_segment, segment_sum


def test_pad_batch_by_hand():
    batch = pad_batch([[5, 6, 7], [8]], [[9], [10, 11, 12]], pad_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 9], [8, 10, 11, 12]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 1]]
    # Token 9 is predicted at place 2 of row 0; 10, 11, 12 at places 0, 1, 2 of row 1, which starts at 4.
    assert batch.positions.tolist() == [2, 4, 5, 6]
    assert batch.labels.tolist() == [9, 10, 11, 12]
    assert batch.cu_seqlens.tolist() == [0, 1, 4] and batch.cu_seqlens.dtype == torch.int32
    assert len(batch) == 2


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


def test_pad_token_inside_the_text_is_not_padding():
    batch = pad_batch([[1, 2, 3], [1]], [[2, 0, 2], [0]], pad_id=0)
    assert batch.attention_mask.sum(1).tolist() == [6, 2]
    assert batch.labels.tolist() == [2, 0, 2, 0]


def test_all_completions_empty():
    batch = pad_batch([[1, 2], [3]], [[], []], pad_id=0)
    assert batch.positions.shape == batch.labels.shape == (0,)
    assert batch.cu_seqlens.tolist() == [0, 0, 0]


def test_pad_batch_refuses():
    with pytest.raises(ValueError, match=r"prompt_ids\[1\] is empty"):
        pad_batch([[1], []], [[2], [3]], pad_id=0)
    with pytest.raises(ValueError, match="equally long"):
        pad_batch([[1]], [[2], [3]], pad_id=0)
    with pytest.raises(ValueError, match="not empty"):
        pad_batch([], [], pad_id=0)


def test_to_moves_every_tensor():
    batch = pad_batch([[1, 2]], [[3]], pad_id=0).to("meta")
    assert {t.device.type for t in vars(batch).values()} == {"meta"}


def test_segment_sum_and_repeat():
    values = torch.tensor([1.0, 2.0, float("inf"), 4.0, 5.0])
    cu = torch.tensor([0, 2, 2, 3, 5], dtype=torch.int32)
    assert segment_sum(values, cu).tolist() == [3.0, 0.0, float("inf"), 9.0]  # infinity stays in its segment
    assert repeat_by_segment(torch.arange(4), cu).tolist() == [0, 0, 2, 3, 3]
    assert repeat_by_segment(torch.arange(4), cu, total=5).tolist() == [0, 0, 2, 3, 3]
    # 2^24 + 1 is lost when each addition is rounded to fp32.
    long = torch.tensor([2.0**24, 1.0, 1.0])
    assert segment_sum(long, torch.tensor([0, 3], dtype=torch.int32)).item() == 2.0**24 + 2
