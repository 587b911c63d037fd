"""Which rows count, and which row tiles have one that does: lists that kernels walk over, made on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["N", "SIZE", "CHUNKS", "stride_tiles"])
def _sort_rows_kernel(
    p_label, o_rows, o_label, o_tiles, N, SIZE, CHUNKS, stride_tiles, ignore_index,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Numbers and labels of the rows that count, in order, and then of the others, in order. ``o_tiles[chunk]``: as
    `_active_tiles_kernel`'s list, of each ``SIZE`` of the rows as they are then. One program."""
    count = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        label = tl.load(p_label + n, mask=n < N, other=ignore_index)
        count += tl.sum((label != ignore_index).to(tl.int32), axis=0)
    for chunk in range(0, CHUNKS):
        tiles = tl.cdiv(tl.minimum(tl.maximum(count - chunk * SIZE, 0), SIZE), BLOCK_N)
        out = o_tiles + chunk * stride_tiles
        tl.store(out, tiles)
        for first in range(0, tiles, BLOCKS):
            tile = first + tl.arange(0, BLOCKS)
            tl.store(out + 1 + tile, tile, mask=tile < tiles)
    counted = 0
    others = count
    for first in range(0, N, BLOCK):
        i = tl.arange(0, BLOCK)
        label = tl.load(p_label + first + i, mask=first + i < N, other=ignore_index)
        active = label != ignore_index
        rank = tl.cumsum(active.to(tl.int32), axis=0)
        place = tl.where(active, counted + rank - 1, others + i - rank)
        tl.store(o_rows + place, (first + i).to(tl.int64), mask=first + i < N)
        tl.store(o_label + place, label, mask=first + i < N)
        found = tl.sum(active.to(tl.int32), axis=0)
        counted += found
        others += BLOCK - found


def sort_rows(labels: Tensor, ignore_index: int, size: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(numbers of the rows, those that count first, (N,) int64; their labels; `active_tiles` of each ``size`` of them),
    in one launch. No host sync."""
    n = labels.shape[0]
    chunks = triton.cdiv(n, size)
    labels = labels.contiguous()
    rows, ordered = torch.empty_like(labels), torch.empty_like(labels)
    # each list starts at a multiple of 16 bytes: the compiler makes a kernel of its own for those that don't
    tiles = labels.new_empty(chunks, triton.cdiv(1 + triton.cdiv(size, 128), 4) * 4, dtype=torch.int32)
    _sort_rows_kernel[(1,)](
        labels, rows, ordered, tiles, n, size, chunks, tiles.stride(0), ignore_index,
        BLOCK=2048, BLOCK_N=128, BLOCKS=64, num_warps=8,
    )  # fmt: skip
    return rows, ordered, list(tiles)


@triton.jit(do_not_specialize=["N"])
def _active_tiles_kernel(p_active, o_tiles, N, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr):
    """``o_tiles``: the number of row tiles with an active row, then their indices in order. One program."""
    count = 0
    for first in range(0, tl.cdiv(N, BLOCK_N), BLOCKS):
        tile = first + tl.arange(0, BLOCKS)
        n = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        some = tl.max(tl.load(p_active + n, mask=n < N, other=0), axis=1) != 0
        rank = tl.cumsum(some.to(tl.int32), axis=0)
        tl.store(o_tiles + count + rank, tile, mask=some)
        count += tl.sum(some.to(tl.int32), axis=0)
    tl.store(o_tiles, count)


def active_tiles(active: Tensor, tile_n: int = 128) -> Tensor:
    """``_active_tiles_kernel``'s list for ``active`` (N,) int32: (1 + ceil(N / tile_n),) int32. No host sync."""
    n = active.shape[0]
    blocks = triton.cdiv(n, tile_n)
    tiles = active.new_empty(1 + blocks)
    _active_tiles_kernel[(1,)](active, tiles, n, BLOCK_N=tile_n, BLOCKS=64, num_warps=8)
    return tiles
