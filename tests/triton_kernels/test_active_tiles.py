"""The lists that kernels walk over: rows that count, and row tiles that have one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
import triton

from powerflow_fast.kernels.active_tiles import active_tiles, sort_rows

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="needs TRITON_INTERPRET=1")
IGNORE = -100


def test_active_tiles_are_listed_in_order():
    active = torch.zeros(70 * 128 - 5, dtype=torch.int32)
    assert int(active_tiles(active)[0]) == 0
    active[[3, 7, 128, 64 * 128 + 127, len(active) - 1]] = 1
    assert active_tiles(active)[:5].tolist() == [4, 0, 1, 64, 69]
    assert active_tiles(active, 64)[:5].tolist() == [4, 0, 2, 129, 139]


@pytest.mark.parametrize("n", [1, 5, 2048, 5000])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_rows_are_sorted_by_whether_they_count(n, share):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, 9, (2 * n,), generator=generator)[::2]  # not contiguous
    labels[torch.rand(n, generator=generator) < share] = IGNORE
    rows, ordered, lists = sort_rows(labels, IGNORE, 640)
    assert torch.equal(rows, torch.argsort((labels == IGNORE).to(torch.uint8), stable=True))
    assert torch.equal(ordered, labels[rows])
    parts = (ordered != IGNORE).to(torch.int32).split(640)
    assert len(lists) == len(parts)
    for found, part in zip(lists, parts, strict=True):
        expected = active_tiles(part)[: 1 + int(active_tiles(part)[0])]
        assert torch.equal(found[: len(expected)], expected) and found.data_ptr() % 16 == 0
