"""Which row tiles have an active row: the list that persistent kernels walk over."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


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
