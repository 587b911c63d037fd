"""Sums over packed sequences, and what is said of bad offsets."""

from __future__ import annotations

import pytest
import torch

from powerflow_fast.ops import segment_sum, sequence_logprobs

H, W, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


def test_segment_sum_keeps_the_digits_of_long_sequences():
    values = -torch.rand(8192) * 3
    total = segment_sum(values, torch.tensor([0, 8192], dtype=torch.int32))
    assert abs(float(total) - float(values.double().sum())) <= 5e-4  # half a unit in the last place of the result
    assert segment_sum(values, torch.tensor([0], dtype=torch.int32)).shape == (0,)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 4]), TypeError, "cu_seqlens must be torch.int32, got torch.int64"),
        (torch.tensor([0, 3], dtype=torch.int32), ValueError, "must rise from 0 to N=4"),
        (torch.tensor([0, 3, 2, 4], dtype=torch.int32), ValueError, "without decreasing"),
        (torch.tensor([[0, 4]], dtype=torch.int32), ValueError, r"must have shape \(B\+1,\), got \(1, 2\)"),
    ],
)
def test_bad_cu_seqlens_is_named(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        sequence_logprobs(H, W, Y, cu_seqlens)
