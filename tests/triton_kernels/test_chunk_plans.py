"""How many rows or columns a chunk of the Triton backend has."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from powerflow_fast.kernels import launch


def test_row_plan_is_even_and_within_its_budget():
    tile = launch.tile_for(torch.bfloat16, (9, 0), heavy=False)
    assert launch.plan_rows(0, 64, tile) == 0
    for n, v in ((8192, 151936), (100_000, 128256), (8192, 49152), (1792, 151936), (300, 8_000_000), (1, 32)):
        rows = launch.plan_rows(n, 2 * v, tile)
        assert rows == n or rows % tile.block_n == 0
        assert rows <= tile.block_n or rows * 2 * v <= launch.SCRATCH_BYTES
        chunks = -(-n // rows)
        assert chunks == 1 or n - (chunks - 1) * rows > rows - chunks * tile.block_n
    assert launch.plan_rows(1792, 2 * 151936, tile) == 896, "not 1664 + 128"


def test_column_plan_is_even_and_within_its_budget():
    tile = launch.tile_for(torch.bfloat16, (9, 0), heavy=False)
    for v, n in ((151936, 8192), (49152, 1), (32000, 65536), (1000, 2**22)):
        columns = launch.plan_columns(v, 2 * n, tile)
        assert columns % tile.block_v == 0
        assert columns == tile.block_v or columns * 2 * n <= launch.SCRATCH_BYTES
        chunks = -(-v // columns)
        assert chunks == 1 or v - (chunks - 1) * columns > columns - chunks * tile.block_v
