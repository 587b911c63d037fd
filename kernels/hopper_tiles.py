"""Hopper's own versions of the three logit tile kernels, in Gluon: persistent and warp-specialised.

One program per multiprocessor walks over logit tiles of 128 x 256. A producer warp keeps a ring of operand stages full
through the copy engine, across tiles. Two consumer warpgroups, 64 rows of a tile apiece, multiply and make results of
the products. The second starts each tile ``stagger`` steps after the first, and the ring holds that distance: so the
first's epilogue, bound by the exponentials' unit, lies under products of the second, and the second's under the
first's.

What is computed, and the layout of the results, are those of `_rest_tile_kernel`, `_exp_tile_kernel` and
`_logit_gradient_kernel` without bias and softcap (`supported`).

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
import triton.language as tl
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

from . import launch
from .types import LogitTransform

_barrier = getattr(gl, "thread_barrier", None) or gl.barrier  # its name until triton 3.6, and since
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}
LOG2E = gl.constexpr(1.4426950408889634)
TILE_N, TILE_V = 128, 256
ROWS = gl.constexpr(TILE_N // 2)  # one consumer's
WIDTH = gl.constexpr(TILE_V)
HALF = gl.constexpr(TILE_V // 2)
LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_V, 16]))
HALF_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_V // 2, 16]))
ROW_LAYOUT = gl.constexpr(gl.SliceLayout(1, HALF_LAYOUT.value))
COLUMN_LAYOUT = gl.constexpr(gl.SliceLayout(0, HALF_LAYOUT.value))
# Of 64K registers the consumers' 2 x 128 threads get 240 each and the producer's (four warps are allotted) 24 each.
WARPS = gl.constexpr([4, 1])
REGISTERS = gl.constexpr([240, 24])


class Plan(NamedTuple):
    """Depth of a step (64: the widest swizzle), stages of the ring, steps between consumers, row tiles in a sweep."""

    depth: int = 64
    stages: int = 4
    stagger: int = 2
    group: int = 16

    def fit(self, hidden_size: int) -> Plan:
        """With the stagger that so many steps allow (the turn barrier's condition in the module's docstring)."""
        return self if triton.cdiv(hidden_size, self.depth) > self.stages else self._replace(stagger=0)


PLAN = Plan()  # a launch's, where it names none


class Ring(NamedTuple):
    """Shared memory of a program: each stage's two boxes of rows and one of columns, and the barriers."""

    rows: gl.shared_memory_descriptor
    columns: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


def supported(hidden: Tensor, bias: Tensor | None, transform: LogitTransform, *, stats: bool = False) -> bool:
    """Whether these kernels can stand in for the Triton tile kernels: two-byte floats on sm_90, a factor above 0, and
    no bias, softcap or statistics."""
    plain = bias is None and transform.logit_softcap is None and not stats
    if not plain or hidden.dtype not in DTYPES or not launch.logit_factors(transform)[0] > 0:
        return False
    return launch.capability_of(hidden.device) == (9, 0)


@gluon.jit
def _exp2(x):
    """2^x in one instruction: results below 2^-126 are 0. (`gl.exp2` spends four on keeping those.)"""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _tile_origin(i, p_tiles, count, V, GROUP: gl.constexpr):
    """First row and column of tile i; as `launch.tile_origin`, over the active row tiles only."""
    blocks_v = gl.cdiv(V, WIDTH)
    first = i // (GROUP * blocks_v) * GROUP
    height = gl.minimum(count - first, GROUP)
    inside = i % (GROUP * blocks_v)
    return gl.load(p_tiles + 1 + first + inside % height) * (2 * ROWS), inside // height * WIDTH


@gluon.jit
def _tiles_of_program(count, V):
    """How many tiles this program has: pid, pid + programs, ..."""
    return gl.cdiv(gl.maximum(count * gl.cdiv(V, WIDTH) - gl.program_id(0), 0), gl.num_programs(0))


@gluon.jit
def _produce(hidden, weight, p_tiles, V, H, ring, GROUP: gl.constexpr):
    """The producer: for each tile and step, each consumer's box of rows and the box of columns that they share."""
    STAGES: gl.constexpr = ring.full.shape[0]
    DEPTH: gl.constexpr = ring.columns.shape[2]
    BYTES: gl.constexpr = (2 * ROWS + WIDTH) * DEPTH * 2
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, DEPTH)
    g = 0
    for j in range(_tiles_of_program(count, V)):
        row, col = _tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
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
def _first_step(j, steps, ring, w: gl.constexpr, STAGGER: gl.constexpr):
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
def _other_steps(acc, j, steps, ring, w: gl.constexpr, STAGGER: gl.constexpr):
    """The products of tile j's steps 1 and on; the last one stays in flight, and its stage unreleased (`_finish`)."""
    first = j * steps
    if STAGGER > 0 and w == 0:
        acc = _steps(acc, first + 1, first + 1 + STAGGER, ring, w)
        mbarrier.arrive(ring.turn)
        acc = _steps(acc, first + 1 + STAGGER, first + steps, ring, w)
    else:
        acc = _steps(acc, first + 1, first + steps, ring, w)
    return acc


@gluon.jit
def _finish(acc, j, steps, ring):
    """The left and the right half of the tile's finished products; releases its last stage."""
    STAGES: gl.constexpr = ring.full.shape[0]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(ring.empty.index((j * steps + steps - 1) % STAGES))
    left, right = acc.reshape([ROWS, 2, HALF]).permute((0, 2, 1)).split()  # no data moves
    left = gl.convert_layout(left, HALF_LAYOUT, assert_trivial=True)
    return left, gl.convert_layout(right, HALF_LAYOUT, assert_trivial=True)


@gluon.jit
def _columns(col):
    """The columns of half a tile that starts at ``col``."""
    return (col + gl.arange(0, HALF, layout=COLUMN_LAYOUT))[None, :]


@gluon.jit
def _without_labels(u, label, col, V):
    """u with -inf in the labels' columns and beyond the last one."""
    cols = _columns(col)
    return gl.where((cols != label[:, None]) & (cols < V), u, float("-inf"))


@gluon.jit
def _holds_label(label, col):
    """1 in rows whose label lies in the tile's columns."""
    return ((label >= col) & (label < col + WIDTH)).to(gl.int32)


@gluon.jit
def _send(x, row, col, out, box):
    """Writes x at (row, col) of the matrix behind ``out``, through ``box`` in shared memory. The copy engine leaves out
    what lies more than 16 bytes beyond a row's end. All threads of the warpgroup come here."""
    tma.store_wait(0)  # the thread that sent the last box returns once that has been read
    _barrier()
    box.store(x)
    fence_async_shared()
    _barrier()
    tma.async_copy_shared_to_global(out, [row, col], box)


@gluon.jit
def _consume_rest(inputs, ring, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr):
    """Warpgroup w of `_rest_tile_sm90_kernel`."""
    p_label, p_tiles, o_partial, N, V, H, plane, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    for j in range(_tiles_of_program(count, V)):
        acc = _first_step(j, steps, ring, w, STAGGER)
        # What the reduction needs to know is looked up while the products are running.
        row, col = _tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        n = row + w * ROWS + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        acc = _other_steps(acc, j, steps, ring, w, STAGGER)
        # Most tiles hold no row's label: those spend nothing on masks.
        special = gl.max(_holds_label(label, col), axis=0)
        left, right = _finish(acc, j, steps, ring)
        if (special != 0) | (col + WIDTH > V):
            left = _without_labels(left, label, col, V)
            right = _without_labels(right, label, col + HALF, V)
        top = gl.maximum(gl.max(left, axis=1), gl.max(right, axis=1))
        shift = gl.where(top == float("-inf"), 0.0, top * to_log2)[:, None]
        total = gl.sum(_exp2(left * to_log2 - shift), axis=1) + gl.sum(_exp2(right * to_log2 - shift), axis=1)
        at = o_partial + (col // WIDTH).to(gl.int64) * N + n
        gl.store(at, top * pre, mask=n < N)
        gl.store(at + plane, total, mask=n < N)


@gluon.jit
def _consume_exps(inputs, ring, out_boxes, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr):
    """Warpgroup w of `_exp_tile_sm90_kernel`. Half a tile at a time goes out through ``out_boxes[w]``."""
    p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    box = out_boxes.index(w)
    for j in range(_tiles_of_program(count, V)):
        acc = _first_step(j, steps, ring, w, STAGGER)
        row, col = _tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        row += w * ROWS
        n = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        active = gl.load(p_active + n, mask=n < N, other=0) != 0
        anchor = gl.load(p_anchor + n, mask=n < N, other=0.0) * LOG2E
        acc = _other_steps(acc, j, steps, ring, w, STAGGER)
        # Most tiles hold no row's label, and most have no row to spare: those spend nothing on masks.
        spared = ((n < N) & (active == 0)).to(gl.int32)
        flags = gl.reduce_or(_holds_label(label, col) + 2 * spared, axis=0)
        halves = _finish(acc, j, steps, ring)
        top = gl.full((ROWS,), float("-inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros((ROWS,), gl.float32, ROW_LAYOUT)
        for side in gl.static_range(2):
            u = halves[side]
            edge = col + side * HALF
            if ((flags & 1) != 0) | (edge + HALF > V):
                u = _without_labels(u, label, edge, V)
            top = gl.maximum(top, gl.max(u, axis=1))
            e = _exp2(u * to_log2 - anchor[:, None])
            total += gl.sum(e, axis=1)
            e = e.to(box.dtype)
            if (flags & 2) == 0:
                _send(e, row, edge, exps, box)
            else:
                cols = _columns(edge)
                at = o_exp + n.to(gl.int64)[:, None] * stride_exp + cols
                gl.store(at, e, mask=active[:, None] & (cols < V))
        at = o_partial + (col // WIDTH).to(gl.int64) * N + n
        gl.store(at, top * pre, mask=active)
        gl.store(at + plane, total, mask=active)
    tma.store_wait(0)  # shared memory must outlive the copies


@gluon.jit
def _consume_gradients(inputs, ring, out_boxes, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr):
    """Warpgroup w of `_gradient_tile_sm90_kernel`. Half a tile at a time goes out through ``out_boxes[w]``."""
    p_label, p_factor, p_max, p_sum, p_tiles, grad, N, V, H, first, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    box = out_boxes.index(w)
    for j in range(_tiles_of_program(count, V)):
        acc = _first_step(j, steps, ring, w, STAGGER)
        row, col = _tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        row += w * ROWS
        n = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        factor = gl.load(p_factor + n, mask=n < N, other=0.0)
        label = (gl.load(p_label + n, mask=n < N, other=-1) - first).to(gl.int32)
        top = gl.load(p_max + n, mask=factor != 0.0, other=float("inf")) * LOG2E  # e^(z - inf) = 0
        others = -factor / gl.load(p_sum + n, mask=factor != 0.0, other=1.0)
        acc = _other_steps(acc, j, steps, ring, w, STAGGER)
        special = gl.max(_holds_label(label, col), axis=0)
        halves = _finish(acc, j, steps, ring)
        for side in gl.static_range(2):
            value = others[:, None] * _exp2(halves[side] * to_log2 - top[:, None])
            if special != 0:
                value = gl.where(_columns(col + side * HALF) == label[:, None], factor[:, None], value)
            _send(value.to(box.dtype), row, col + side * HALF, grad, box)
    tma.store_wait(0)


@gluon.jit
def _ring(hidden, weight, STAGES: gl.constexpr):
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


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _rest_tile_sm90_kernel(
    hidden, weight, p_label, p_tiles, o_partial, N, V, H, plane, pre,
    STAGES: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of logits z = pre * u, pre > 0, reduced over their columns other than the labels' to m = max z and
    s = sum e^(z - m), at ``o_partial[quantity, column tile, row]``; of the row tiles listed in ``p_tiles``.

    2NVH FLOP; reads hidden and weight once per tile, mostly from L2; writes 8 bytes a row and tile.
    """
    ring = _ring(hidden, weight, STAGES)
    inputs = (p_label, p_tiles, o_partial, N, V, H, plane, pre)
    gl.warp_specialize(
        [
            (_consume_rest, (inputs, ring, 0, GROUP, STAGGER)),
            (_consume_rest, (inputs, ring, 1, GROUP, STAGGER)),
            (_produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
        ],
        WARPS,
        REGISTERS,
    )


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _exp_tile_sm90_kernel(
    hidden, weight, exps, p_label, p_active, p_anchor, p_tiles, o_exp, o_partial, N, V, H, plane, stride_exp, pre,
    STAGES: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of E = e^(z - anchor), 0 in the label's column, for z = pre * u, pre > 0; and their row maxima of z and
    float32 row sums of E, at ``o_partial[quantity, column tile, row]``. Rows that are not active are left as they were.

    2NVH FLOP; writes NV elements. ``exps`` and ``o_exp`` are the same memory.
    """
    ring = _ring(hidden, weight, STAGES)
    out_boxes = gl.allocate_shared_memory(exps.dtype, [2, ROWS, HALF], exps.layout)
    inputs = (p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre)
    gl.warp_specialize(
        [
            (_consume_exps, (inputs, ring, out_boxes, 0, GROUP, STAGGER)),
            (_consume_exps, (inputs, ring, out_boxes, 1, GROUP, STAGGER)),
            (_produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
        ],
        WARPS,
        REGISTERS,
    )


@gluon.jit(do_not_specialize=["N", "V", "H", "first"])
def _gradient_tile_sm90_kernel(
    hidden, weight, grad, p_label, p_factor, p_max, p_sum, p_tiles, N, V, H, first, pre,
    STAGES: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of the gradient by u, as `_logit_gradient_kernel` has them: ``f`` in the label's column and
    ``-f e^(z - M) / S`` in the others, for the vocabulary entries first .. first + V that ``weight`` holds and the row
    tiles listed in ``p_tiles``. 0 where f is 0. 2NVH FLOP; writes NV elements."""
    ring = _ring(hidden, weight, STAGES)
    out_boxes = gl.allocate_shared_memory(grad.dtype, [2, ROWS, HALF], grad.layout)
    inputs = (p_label, p_factor, p_max, p_sum, p_tiles, grad, N, V, H, first, pre)
    gl.warp_specialize(
        [
            (_consume_gradients, (inputs, ring, out_boxes, 0, GROUP, STAGGER)),
            (_consume_gradients, (inputs, ring, out_boxes, 1, GROUP, STAGGER)),
            (_produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
        ],
        WARPS,
        REGISTERS,
    )


@triton.jit(do_not_specialize=["N", "V"])
def _zero_tiles_kernel(p_factor, o_grad, N, V, stride_grad, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """0 in the row tiles whose factors are all 0, which `_gradient_tile_sm90_kernel` leaves out. A program per row tile
    and share of the columns; most return at once."""
    row = tl.program_id(0) * BLOCK_N
    n = row + tl.arange(0, BLOCK_N)
    if tl.max((tl.load(p_factor + n, mask=n < N, other=0.0) != 0.0).to(tl.int32), axis=0) == 0:
        nothing = tl.zeros((8, BLOCK_V), dtype=o_grad.dtype.element_ty)
        for top in range(row, tl.minimum(row + BLOCK_N, N), 8):
            i = top + tl.arange(0, 8)
            out = o_grad + i.to(tl.int64)[:, None] * stride_grad
            for col in range(tl.program_id(1) * BLOCK_V, V, tl.num_programs(1) * BLOCK_V):
                cols = col + tl.arange(0, BLOCK_V)
                tl.store(out + cols[None, :], nothing, mask=(i < N)[:, None] & (cols < V)[None, :])


@functools.cache
def _layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Of a box in shared memory; kept, since making it costs the host as much as a launch."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], DTYPES[dtype])


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``rows x columns`` boxes of ``x``: 0 outside of ``x`` to read, cut off at 16 bytes to write."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(rows, columns, x.dtype))


def _prepared(hidden: Tensor, weight: Tensor, plan: Plan | None, sms: int) -> tuple[tuple, tuple, dict[str, int]]:
    """Grid, operands and options of a launch: a program for each multiprocessor that has a tile."""
    (n, h), v = hidden.shape, weight.shape[0]
    plan = (plan or PLAN).fit(h)
    grid = (min(sms, triton.cdiv(n, TILE_N) * triton.cdiv(v, TILE_V)),)
    operands = _box(hidden, ROWS.value, plan.depth), _box(weight, WIDTH.value, plan.depth)
    return grid, operands, {"STAGES": plan.stages, "STAGGER": plan.stagger, "GROUP": plan.group, "num_warps": 4}


def rest_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, tiles: Tensor, partial: Tensor, pre: float,
    *, sms: int, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills ``partial`` (2, ceil(V / 256), N or more) as `_rest_tile_kernel` does in the row tiles of the list
    ``tiles`` (`active_tiles`), for operands whose rows start at multiples of 16 bytes (`launch.readable`)."""
    (n, h), v = hidden.shape, weight.shape[0]
    grid, operands, options = _prepared(hidden, weight, plan, sms)
    _rest_tile_sm90_kernel[grid](*operands, labels, tiles, partial, n, v, h, partial.stride(0), pre, **options)


def exp_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, active: Tensor, tiles: Tensor, anchor: Tensor, exps: Tensor,
    partial: Tensor, pre: float, *, sms: int, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills ``exps`` (N or more, V or more; rows at multiples of 16 bytes) and ``partial`` (2, ceil(V / 256), N or
    more) as `_exp_tile_kernel` does. ``tiles`` is `active_tiles` of ``active``."""
    (n, h), v = hidden.shape, weight.shape[0]
    grid, operands, options = _prepared(hidden, weight, plan, sms)
    _exp_tile_sm90_kernel[grid](
        *operands, _box(exps[:n, :v], ROWS.value, HALF.value), labels, active, anchor, tiles, exps, partial,
        n, v, h, partial.stride(0), exps.stride(0), pre, **options,
    )  # fmt: skip


def gradient_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, factor: Tensor, tiles: Tensor, top: Tensor, others_sum: Tensor,
    grad: Tensor, first: int, pre: float, *, sms: int, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills ``grad`` (N, V; rows at multiples of 16 bytes) as `_logit_gradient_kernel` does for the V entries from
    ``first`` on that ``weight`` holds. ``tiles`` is `active_tiles` of ``factor != 0``; the other row tiles get 0."""
    (n, h), v = hidden.shape, weight.shape[0]
    grid, operands, options = _prepared(hidden, weight, plan, sms)
    _gradient_tile_sm90_kernel[grid](
        *operands, _box(grad, ROWS.value, HALF.value), labels, factor, top, others_sum, tiles,
        n, v, h, first, pre, **options,
    )  # fmt: skip
    _zero_tiles_kernel[(triton.cdiv(n, TILE_N), 8)](
        factor, grad, n, v, grad.stride(0), BLOCK_N=TILE_N, BLOCK_V=1024, num_warps=4
    )
