"""How products and what becomes of them overlap in Hopper's own tile kernels: a ring of operand stages in shared
memory, one partition that fills it and two that multiply.

One program per multiprocessor walks over logit tiles of 128 x 256. A producer warp keeps the ring full through the copy
engine, across tiles. Two consumer warpgroups, 64 rows of a tile apiece, multiply and make results of the products. The
second starts each tile ``stagger`` steps after the first, and the ring holds that distance: so the first's epilogue,
bound by the exponentials' unit, lies under products of the second, and the second's under the first's.

How the barriers go together (all mbarriers; "arrival" is one thread of a partition, once, after all its threads):

* Step ``g = tile * steps + k`` counts the stages of a program in the order in which the producer fills them. Its slot
  is ``g % STAGES`` and it is the slot's use number ``q = g // STAGES``. All three partitions derive the number of tiles
  and of steps from the same numbers, so every step is filled once and emptied once by each of its consumers.
* full[slot]: one arrival a use, the producer's announcement of the bytes of the full boxes (the copy engine fills with
  zeros what lies outside of a matrix, and counts it). Use q completes phase q: consumers wait for parity q & 1. A
  parity is ambiguous if a barrier may be two phases off. It can't be ahead, since use q + 1 needs the consumer's own
  release of use q. It can't be behind: a consumer has waited for every earlier step.
* empty[slot]: one arrival a use from each consumer. Before use q the producer waits for phase q - 1, parity
  (q & 1) ^ 1, which a new barrier passes at q = 0. A consumer arrives once the product that reads the stage has
  finished: with at most one product in flight, that is the one before the newest.
* turn: the first consumer arrives once in each tile, after ``stagger`` products; the second waits for it before its
  first step, parity tile & 1. The first needs ``stagger + 1 <= STAGES`` slots to get there. They were last used by
  steps of earlier tiles, and those the second releases without waiting for anything but loads. With
  ``steps >= STAGES`` the first can't be there a second time before the second has left the wait.

tests/test_hopper_tiles.py walks through every order in which these events can happen.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until triton 3.6, and since
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
TILE_N, TILE_V = 128, 256
ROWS = gl.constexpr(TILE_N // 2)  # one consumer's
WIDTH = gl.constexpr(TILE_V)
HALF = gl.constexpr(TILE_V // 2)
LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_V, 16]))
HALF_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_V // 2, 16]))


class Plan(NamedTuple):
    """Depth of a step (64: the widest swizzle), stages of the ring, steps between consumers, row tiles in a sweep."""

    depth: int = 64
    stages: int = 4
    stagger: int = 2
    group: int = 16

    def fit(self, hidden_size: int) -> Plan:
        """With the stagger that so many steps allow (the turn barrier's condition in the module's docstring)."""
        return self if triton.cdiv(hidden_size, self.depth) > self.stages else self._replace(stagger=0)


class Ring(NamedTuple):
    """Shared memory of a program: each stage's two boxes of rows and one of columns, and the barriers."""

    rows: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


@gluon.jit
def make_ring(hidden, weight, STAGES: gl.constexpr):
    """The stages and their barriers, before any partition starts."""
    DEPTH: gl.constexpr = hidden.block_type.shape[1]
    rows = gl.allocate_shared_memory(hidden.dtype, [2 * STAGES, ROWS, DEPTH], hidden.layout)
    columns = gl.allocate_shared_memory(weight.dtype, [STAGES, WIDTH, DEPTH], weight.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(turn, count=1)
    fence_async_shared()  # the copy engine signals these barriers
    return Ring(rows, columns, full, empty, turn)


@gluon.jit
def tile_origin(i, p_tiles, count, V, GROUP: gl.constexpr):
    """First row and column of tile i; as `launch.tile_origin`, over the active row tiles only."""
    blocks_v = gl.cdiv(V, WIDTH)
    first = i // (GROUP * blocks_v) * GROUP
    height = gl.minimum(count - first, GROUP)
    inside = i % (GROUP * blocks_v)
    return gl.load(p_tiles + 1 + first + inside % height) * (2 * ROWS), inside // height * WIDTH


@gluon.jit
def tiles_of_program(count, V):
    """How many tiles this program has: pid, pid + programs, ..."""
    return gl.cdiv(gl.maximum(count * gl.cdiv(V, WIDTH) - gl.program_id(0), 0), gl.num_programs(0))


@gluon.jit
def produce(hidden, weight, p_tiles, V, H, ring, GROUP: gl.constexpr):
    """The producer: for each tile and step, each consumer's box of rows and the box of columns that they share."""
    STAGES: gl.constexpr = ring.full.shape[0]
    DEPTH: gl.constexpr = ring.columns.shape[2]
    BYTES: gl.constexpr = (2 * ROWS + WIDTH) * DEPTH * 2
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, DEPTH)
    g = 0
    for j in range(tiles_of_program(count, V)):
        row, col = tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        for k in range(steps):
            slot = g % STAGES
            mbarrier.wait(ring.empty.index(slot), ((g // STAGES) & 1) ^ 1)
            bar = ring.full.index(slot)
            mbarrier.expect(bar, BYTES)
            for w in gl.static_range(2):
                box = ring.rows.index(slot * 2 + w)
                tma.async_copy_global_to_shared(hidden, [row + w * ROWS, k * DEPTH], bar, box)
            tma.async_copy_global_to_shared(weight, [col, k * DEPTH], bar, ring.columns.index(slot))
            g += 1


@gluon.jit
def _issue(g, acc, ring, w: gl.constexpr):
    """Waits for step g's stage and starts its product, added to ``acc``; the one before has finished on return."""
    STAGES: gl.constexpr = ring.full.shape[0]
    slot = g % STAGES
    mbarrier.wait(ring.full.index(slot), (g // STAGES) & 1)
    columns = ring.columns.index(slot).permute((1, 0))
    acc = warpgroup_mma(ring.rows.index(slot * 2 + w), columns, acc, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def first_step(j, steps, ring, w: gl.constexpr, STAGGER: gl.constexpr):
    """Starts the product of the first step of this program's tile j, once it is warpgroup w's turn.

    Not a part of the loop: with a constant zero to add to, wgmma needs no registers to be cleared.
    """
    if STAGGER > 0 and w == 1:
        mbarrier.wait(ring.turn, j & 1)
    return _issue(j * steps, gl.zeros((ROWS, WIDTH), gl.float32, LAYOUT), ring, w)


@gluon.jit
def _steps(acc, begin, end, ring, w: gl.constexpr):
    """The products of steps ``begin .. end``, counted over all tiles; releases all stages from ``begin - 1`` on but the
    last one's, whose product is left in flight."""
    STAGES: gl.constexpr = ring.full.shape[0]
    for g in range(begin, end):
        acc = _issue(g, acc, ring, w)
        mbarrier.arrive(ring.empty.index((g - 1) % STAGES))
    return acc


@gluon.jit
def other_steps(acc, j, steps, ring, w: gl.constexpr, STAGGER: gl.constexpr):
    """The products of tile j's steps 1 and on; the last one stays in flight, and its stage unreleased (`finish`)."""
    first = j * steps
    if STAGGER > 0 and w == 0:
        acc = _steps(acc, first + 1, first + 1 + STAGGER, ring, w)
        mbarrier.arrive(ring.turn)
        acc = _steps(acc, first + 1 + STAGGER, first + steps, ring, w)
    else:
        acc = _steps(acc, first + 1, first + steps, ring, w)
    return acc


@gluon.jit
def finish(acc, j, steps, ring):
    """The left and the right half of the tile's finished products; releases its last stage."""
    STAGES: gl.constexpr = ring.full.shape[0]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index((j * steps + steps - 1) % STAGES))
    left, right = acc.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()  # no data moves
    left = gl.convert_layout(left, HALF_LAYOUT, assert_trivial=True)
    return left, gl.convert_layout(right, HALF_LAYOUT, assert_trivial=True)


@gluon.jit
def send(x, row, col, out, box):
    """Writes x at (row, col) of the matrix behind ``out``, through ``box`` in shared memory. The copy engine leaves out
    what lies more than 16 bytes beyond a row's end. All threads of the warpgroup come here."""
    tma.store_wait(0)  # the thread that sent the last box returns once that has been read
    _barrier()
    box.store(x)
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(out, [row, col], box)


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a box in shared memory; kept, since making it costs the host as much as a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])


def boxes_of(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``rows x columns`` boxes of ``x``: 0 outside of ``x`` to read, cut off at 16 bytes to write."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(rows, columns, x.dtype))
