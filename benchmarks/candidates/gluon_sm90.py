"""Hopper's own versions of the logit tile kernels of `linear_logprob_fwd`, in Gluon: persistent and warp-specialised.

One program per multiprocessor walks over logit tiles. A producer warp keeps a ring of operand stages full through the
copy engine, across tile boundaries; two consumer warpgroups multiply (wgmma) and reduce. What is computed, and the
layout of the results, are those of ``_rest_tile_kernel`` and ``_exp_tile_kernel`` without bias and softcap.

Variants (`Plan`), which differ in how one warpgroup's reduction, bound by the exponentials' unit, hides behind the
other's products:

* ``shared``: both warpgroups work on one 128 x 256 tile, 64 rows each, and share its stages. The second starts each
  tile ``stagger`` steps after the first, and the ring holds that distance; so the first reduces while the second still
  multiplies, and the other way round at the next tile's start. 0 steps: no such order.
* ``turns``: each warpgroup has 128 x 128 tiles of its own, and they take turns in multiplying (ping-pong). All of a
  reduction is hidden, at 4/3 of the operand traffic.

How the barriers go together (all mbarriers; "arrival" is one thread of a partition, once):

* Step ``g = tile * steps + k`` counts the stages of a program in the order in which the producer fills them; its slot
  is ``g % STAGES`` and it is the slot's use number ``q = g // STAGES``. All three partitions derive the number of tiles
  and of steps from the same numbers, so every step is filled once and emptied once by each of its consumers.
* full[slot]: one arrival a use, the producer's announcement of the bytes of the full boxes (the copy engine fills with
  zeros what lies outside of a matrix, and counts it). Use q completes phase q: consumers wait for parity q & 1. A
  parity is ambiguous if a barrier may be two phases off. It can't be ahead, since use q + 1 needs the consumer's own
  release of use q. It can't be behind: a consumer has waited for, or in turns knows that the other one has waited for,
  every earlier step.
* empty[slot]: one arrival a use from each consumer of the stage: 2 if shared, 1 in turns. Before use q the producer
  waits for phase q - 1, parity (q & 1) ^ 1, which a new barrier passes at q = 0. A consumer arrives once the product
  that reads the stage has finished: with at most one product in flight, that is the one before the newest.
* order[w], shared and staggered: the first warpgroup arrives at order[1] once in each tile, after ``stagger`` products;
  the second waits for it before its first step, parity tile & 1. The first needs ``stagger + 1 <= STAGES`` slots to get
  there. They were last used by steps of earlier tiles, and those the second releases without waiting for anything but
  loads. With ``steps >= STAGES`` the first can't be there a second time before the second has left the wait.
* order[w], turns: before the first step of its j-th tile w waits for the other one's arrival, made after that one's
  last product was issued: parity j & 1 for the second, (j & 1) ^ 1 for the first, which passes at j = 0.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
from active_tiles import TILE_N, active_tiles
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
BLOCK_H = 64  # depth of a stage: 128 bytes, the copy engine's and wgmma's widest swizzle


class Plan(NamedTuple):
    """One variant: width of its tiles, stages of the ring, whether warpgroups take turns, and steps between them."""

    block_v: int
    stages: int
    turns: bool
    stagger: int

    def fit(self, hidden_size: int) -> Plan:
        """With the stagger that so many steps allow (the order barrier's condition in the module's docstring)."""
        return self if triton.cdiv(hidden_size, BLOCK_H) > self.stages else self._replace(stagger=0)


PLANS = {
    "shared": Plan(256, 4, False, 0),
    "staggered": Plan(256, 4, False, 2),
    "staggered3": Plan(256, 4, False, 3),
    "turns": Plan(128, 6, True, 0),
}


@gluon.jit
def _exp2(x):
    """2^x in one instruction: results below 2^-126 are 0. (`gl.exp2` spends four on keeping those.)"""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _tile_origin(i, p_tiles, count, V, TILE_N: gl.constexpr, BLOCK_V: gl.constexpr, GROUP: gl.constexpr):
    """First row and column of tile i; as `launch.tile_origin`, over the active row tiles only."""
    blocks_v = gl.cdiv(V, BLOCK_V)
    first = i // (GROUP * blocks_v) * GROUP
    height = gl.minimum(count - first, GROUP)
    inside = i % (GROUP * blocks_v)
    return gl.load(p_tiles + 1 + first + inside % height) * TILE_N, inside // height * BLOCK_V


@gluon.jit
def _tiles_of_program(count, V, BLOCK_V: gl.constexpr):
    """How many tiles this program has: pid, pid + programs, ..."""
    return gl.cdiv(gl.maximum(count * gl.cdiv(V, BLOCK_V) - gl.program_id(0), 0), gl.num_programs(0))


@gluon.jit
def _produce(hidden, weight, p_tiles, V, H, a_bufs, b_bufs, full, empty, GROUP: gl.constexpr):
    """The producer: for each tile and step, the rows' boxes (one per consumer of the stage) and the columns' box."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    BOXES: gl.constexpr = a_bufs.shape[0] // STAGES
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_V: gl.constexpr = b_bufs.shape[1]
    DEPTH: gl.constexpr = b_bufs.shape[2]
    BYTES: gl.constexpr = (BOXES * ROWS + BLOCK_V) * DEPTH * 2
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, DEPTH)
    g = 0
    for j in range(_tiles_of_program(count, V, BLOCK_V)):
        tile = gl.program_id(0) + j * gl.num_programs(0)
        row, col = _tile_origin(tile, p_tiles, count, V, BOXES * ROWS, BLOCK_V, GROUP)
        for k in range(steps):
            slot = g % STAGES
            mbarrier.wait(empty.index(slot), ((g // STAGES) & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, BYTES)
            for box in gl.static_range(BOXES):
                a = a_bufs.index(slot * BOXES + box)
                tma.async_copy_global_to_shared(hidden, [row + box * ROWS, k * DEPTH], bar, a)
            tma.async_copy_global_to_shared(weight, [col, k * DEPTH], bar, b_bufs.index(slot))
            g += 1


@gluon.jit
def _issue(g, acc, a_bufs, b_bufs, full, w: gl.constexpr):
    """Waits for step g's stage and starts its product, added to ``acc``."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    BOXES: gl.constexpr = a_bufs.shape[0] // STAGES
    slot = g % STAGES
    mbarrier.wait(full.index(slot), (g // STAGES) & 1)
    a = a_bufs.index(slot * BOXES + w if BOXES == 2 else slot)
    acc = warpgroup_mma(a, b_bufs.index(slot).permute((1, 0)), acc, is_async=True)
    return warpgroup_mma_wait(1, deps=(acc,))


@gluon.jit
def _first_step(j, steps, a_bufs, b_bufs, full, order, w: gl.constexpr, STAGGER: gl.constexpr, LAYOUT: gl.constexpr):
    """Starts the product of the first step of this program's tile j, once it is warpgroup w's turn.

    A loop of its own for one step: with a constant zero to add to, wgmma needs no registers to be cleared.
    """
    TURNS: gl.constexpr = a_bufs.shape[0] == b_bufs.shape[0]
    if TURNS:
        mbarrier.wait(order.index(w), (j // 2 & 1) ^ (1 - w))
    elif STAGGER > 0 and w == 1:
        mbarrier.wait(order.index(1), j & 1)
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_V: gl.constexpr = b_bufs.shape[1]
    zero = gl.zeros((ROWS, BLOCK_V), gl.float32, LAYOUT)
    return _issue(j * steps, zero, a_bufs, b_bufs, full, w)


@gluon.jit
def _steps(acc, begin, end, a_bufs, b_bufs, full, empty, w: gl.constexpr):
    """The products of steps ``begin .. end``, counted over all tiles; releases all stages from ``begin - 1`` on but the
    last one's, whose product is left in flight."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    for g in range(begin, end):
        acc = _issue(g, acc, a_bufs, b_bufs, full, w)
        mbarrier.arrive(empty.index((g - 1) % STAGES))
    return acc


@gluon.jit
def _other_steps(
    acc, j, steps, a_bufs, b_bufs, full, empty, order, w: gl.constexpr, STAGGER: gl.constexpr
):  # fmt: skip
    """The products of tile j's steps 1 and on; the last one stays in flight, and its stage unreleased (`_finish`)."""
    first = j * steps
    if a_bufs.shape[0] == b_bufs.shape[0]:
        acc = _steps(acc, first + 1, first + steps, a_bufs, b_bufs, full, empty, w)
        mbarrier.arrive(order.index(1 - w))
    elif STAGGER > 0 and w == 0:
        acc = _steps(acc, first + 1, first + 1 + STAGGER, a_bufs, b_bufs, full, empty, w)
        mbarrier.arrive(order.index(1))
        acc = _steps(acc, first + 1 + STAGGER, first + steps, a_bufs, b_bufs, full, empty, w)
    else:
        acc = _steps(acc, first + 1, first + steps, a_bufs, b_bufs, full, empty, w)
    return acc


@gluon.jit
def _finish(acc, j, steps, empty):
    """The finished tile of products; releases its last stage."""
    STAGES: gl.constexpr = empty.shape[0]
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((j * steps + steps - 1) % STAGES))
    return acc


@gluon.jit
def _without_labels(u, label, col, V, LAYOUT: gl.constexpr):
    """u with -inf in the labels' columns and beyond the last one."""
    WIDTH: gl.constexpr = u.shape[1]
    cols = col + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.where((cols[None, :] != label[:, None]) & (cols < V)[None, :], u, float("-inf"))


@gluon.jit
def _consume_rest(
    p_label, p_tiles, o_partial, N, V, H, plane, pre, a_bufs, b_bufs, full, empty, order,
    w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr,
):  # fmt: skip
    """Warpgroup w of `_rest_tile_sm90_kernel`."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    BOXES: gl.constexpr = a_bufs.shape[0] // STAGES
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_V: gl.constexpr = b_bufs.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    count = gl.load(p_tiles)
    DEPTH: gl.constexpr = b_bufs.shape[2]
    steps = gl.cdiv(H, DEPTH)
    to_log2 = pre * 1.4426950408889634
    # In turns w has every second tile, else its rows of all.
    for j in range(w * (2 - BOXES), _tiles_of_program(count, V, BLOCK_V), 3 - BOXES):
        acc = _first_step(j, steps, a_bufs, b_bufs, full, order, w, STAGGER, LAYOUT)
        # What the reduction needs to know is looked up while the products are running.
        tile = gl.program_id(0) + j * gl.num_programs(0)
        row, col = _tile_origin(tile, p_tiles, count, V, BOXES * ROWS, BLOCK_V, GROUP)
        n = row + (w * ROWS if BOXES == 2 else 0) + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        acc = _other_steps(acc, j, steps, a_bufs, b_bufs, full, empty, order, w, STAGGER)
        # Most tiles hold no row's label: those spend nothing on masks.
        special = gl.max(((label >= col) & (label < col + BLOCK_V)).to(gl.int32), axis=0)
        u = _finish(acc, j, steps, empty)
        if (special != 0) | (col + BLOCK_V > V):
            u = _without_labels(u, label, col, V, LAYOUT)
        top = gl.max(u, axis=1)
        shift = gl.where(top == float("-inf"), 0.0, top * to_log2)
        total = gl.sum(_exp2(u * to_log2 - shift[:, None]), axis=1)
        at = o_partial + (col // BLOCK_V).to(gl.int64) * N + n
        gl.store(at, top * pre, mask=n < N)
        gl.store(at + plane, total, mask=n < N)


@gluon.jit
def _left_right(u, LAYOUT: gl.constexpr):
    """The two halves of u's columns; no data moves."""
    left, right = u.reshape([u.shape[0], 2, u.shape[1] // 2]).permute((0, 2, 1)).split()
    return gl.convert_layout(left, LAYOUT, assert_trivial=True), gl.convert_layout(right, LAYOUT, assert_trivial=True)


@gluon.jit
def _consume_exps(
    p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre,
    a_bufs, b_bufs, e_bufs, full, empty, order,
    w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr,
):  # fmt: skip
    """Warpgroup w of `_exp_tile_sm90_kernel`. Half a tile at a time goes out through ``e_bufs[w]``."""
    STAGES: gl.constexpr = b_bufs.shape[0]
    BOXES: gl.constexpr = a_bufs.shape[0] // STAGES
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_V: gl.constexpr = b_bufs.shape[1]
    HALF: gl.constexpr = BLOCK_V // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    HALF_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    count = gl.load(p_tiles)
    DEPTH: gl.constexpr = b_bufs.shape[2]
    steps = gl.cdiv(H, DEPTH)
    to_log2 = pre * 1.4426950408889634
    out = e_bufs.index(w)
    for j in range(w * (2 - BOXES), _tiles_of_program(count, V, BLOCK_V), 3 - BOXES):
        acc = _first_step(j, steps, a_bufs, b_bufs, full, order, w, STAGGER, LAYOUT)
        tile = gl.program_id(0) + j * gl.num_programs(0)
        row, col = _tile_origin(tile, p_tiles, count, V, BOXES * ROWS, BLOCK_V, GROUP)
        row += w * ROWS if BOXES == 2 else 0
        n = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, HALF_LAYOUT))
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        active = gl.load(p_active + n, mask=n < N, other=0) != 0
        anchor = gl.load(p_anchor + n, mask=n < N, other=0.0) * 1.4426950408889634
        acc = _other_steps(acc, j, steps, a_bufs, b_bufs, full, empty, order, w, STAGGER)
        # Most tiles hold no row's label, and most have no row to spare: those spend nothing on masks.
        flags = ((label >= col) & (label < col + BLOCK_V)).to(gl.int32)
        flags = gl.reduce_or(flags + 2 * ((n < N) & (active == 0)).to(gl.int32), axis=0)
        u = _finish(acc, j, steps, empty)
        halves = _left_right(u, HALF_LAYOUT)
        top = gl.full((ROWS,), float("-inf"), gl.float32, gl.SliceLayout(1, HALF_LAYOUT))
        total = gl.zeros((ROWS,), gl.float32, gl.SliceLayout(1, HALF_LAYOUT))
        for side in gl.static_range(2):
            v = halves[side]
            edge = col + side * HALF
            if ((flags & 1) != 0) | (edge + HALF > V):
                v = _without_labels(v, label, edge, V, HALF_LAYOUT)
            top = gl.maximum(top, gl.max(v, axis=1))
            e = _exp2(v * to_log2 - anchor[:, None])
            total += gl.sum(e, axis=1)
            e = e.to(gl.bfloat16)
            if (flags & 2) == 0:
                # the copy engine leaves out what lies beyond N and V; it must have read the half before this one
                tma.store_wait(0)
                _barrier()
                out.store(e)
                fence_async_shared()
                _barrier()
                tma.async_copy_shared_to_global(exps, [row, edge], out)
            else:
                cols = edge + gl.arange(0, HALF, layout=gl.SliceLayout(0, HALF_LAYOUT))
                at = o_exp + n.to(gl.int64)[:, None] * stride_exp + cols[None, :]
                gl.store(at, e, mask=active[:, None] & (cols < V)[None, :])
        at = o_partial + (col // BLOCK_V).to(gl.int64) * N + n
        gl.store(at, top * pre, mask=active)
        gl.store(at + plane, total, mask=active)
    tma.store_wait(0)


@gluon.jit
def _ring(hidden, weight, STAGES: gl.constexpr, TURNS: gl.constexpr):
    """The stages and their barriers: (rows' boxes, columns' boxes, full, empty, order)."""
    BOXES: gl.constexpr = 1 if TURNS else 2
    a_bufs = gl.allocate_shared_memory(hidden.dtype, [STAGES * BOXES] + hidden.block_type.shape, hidden.layout)  # noqa: RUF005
    b_bufs = gl.allocate_shared_memory(weight.dtype, [STAGES] + weight.block_type.shape, weight.layout)  # noqa: RUF005
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=BOXES)
    for i in gl.static_range(2):
        mbarrier.init(order.index(i), count=1)
    fence_async_shared()  # the copy engine signals these barriers
    return a_bufs, b_bufs, full, empty, order


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _rest_tile_sm90_kernel(
    hidden, weight, p_label, p_tiles, o_partial,
    N, V, H, plane, pre,
    STAGES: gl.constexpr, TURNS: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of logits z = pre * u, pre > 0, reduced over their columns other than the labels' to m = max z and
    s = sum e^(z - m), at ``o_partial[quantity, column tile, row]``; of the row tiles listed in ``p_tiles``.

    2NVH FLOP; reads hidden and weight once per tile, mostly from L2; writes 8 bytes a row and tile.
    """
    a_bufs, b_bufs, full, empty, order = _ring(hidden, weight, STAGES, TURNS)
    first = (
        p_label, p_tiles, o_partial, N, V, H, plane, pre, a_bufs, b_bufs, full, empty, order, 0, GROUP, STAGGER,
    )  # fmt: skip
    second = (
        p_label, p_tiles, o_partial, N, V, H, plane, pre, a_bufs, b_bufs, full, empty, order, 1, GROUP, STAGGER,
    )  # fmt: skip
    # 64K registers: 2 x 128 threads with 240 and a producer's (four warps are allotted) with 24
    gl.warp_specialize(
        [
            (_consume_rest, first),
            (_consume_rest, second),
            (_produce, (hidden, weight, p_tiles, V, H, a_bufs, b_bufs, full, empty, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _exp_tile_sm90_kernel(
    hidden, weight, exps, p_label, p_active, p_anchor, p_tiles, o_exp, o_partial,
    N, V, H, plane, stride_exp, pre,
    STAGES: gl.constexpr, TURNS: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Tiles of E = e^(z - anchor), 0 in the label's column, for z = pre * u, pre > 0; and their row maxima of z and
    float32 row sums of E, at ``o_partial[quantity, column tile, row]``. Rows that are not active are left as they were.

    2NVH FLOP; writes NV elements. ``exps`` and ``o_exp`` are the same memory.
    """
    a_bufs, b_bufs, full, empty, order = _ring(hidden, weight, STAGES, TURNS)
    e_bufs = gl.allocate_shared_memory(exps.dtype, [2] + exps.block_type.shape, exps.layout)  # noqa: RUF005
    first = (
        p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre,
        a_bufs, b_bufs, e_bufs, full, empty, order, 0, GROUP, STAGGER,
    )  # fmt: skip
    second = (
        p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre,
        a_bufs, b_bufs, e_bufs, full, empty, order, 1, GROUP, STAGGER,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume_exps, first),
            (_consume_exps, second),
            (_produce, (hidden, weight, p_tiles, V, H, a_bufs, b_bufs, full, empty, GROUP)),
        ],
        [4, 1],
        [240, 24],
    )


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of ``rows x columns`` boxes of bfloat16; reading, a box is 0 outside of ``x``; writing, cut off."""
    layout = gl.NVMMASharedLayout.get_default_for([rows, columns], gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)


def _operands(hidden: Tensor, weight: Tensor, plan: Plan) -> tuple[TensorDescriptor, TensorDescriptor]:
    rows = TILE_N if plan.turns else TILE_N // 2
    return _box(hidden, rows, BLOCK_H), _box(weight, plan.block_v, BLOCK_H)


def rest_tiles(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    active: Tensor,
    partial: Tensor,
    pre: float,
    *,
    num_sms: int,
    group: int,
    variant: str = "staggered",
) -> None:
    """Fills ``partial`` (2, ceil(V / the variant's width), N or more) as `_rest_tile_kernel` does, for bfloat16
    operands whose rows start at multiples of 16 bytes (`launch.readable`)."""
    (n, h), v = hidden.shape, weight.shape[0]
    plan = PLANS[variant].fit(h)
    assert pre > 0 and partial.shape[1] == triton.cdiv(v, plan.block_v) and partial.shape[2] >= n
    grid = (min(num_sms, triton.cdiv(n, TILE_N) * partial.shape[1]),)
    _rest_tile_sm90_kernel[grid](
        *_operands(hidden, weight, plan), labels, active_tiles(active), partial,
        n, v, h, partial.stride(0), pre,
        STAGES=plan.stages, TURNS=plan.turns, STAGGER=plan.stagger, GROUP=group, num_warps=4,
    )  # fmt: skip


def exp_tiles(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    active: Tensor,
    anchor: Tensor,
    exps: Tensor,
    partial: Tensor,
    pre: float,
    *,
    num_sms: int,
    group: int,
    variant: str = "staggered",
) -> None:
    """Fills ``exps`` (N, V or more, rows at multiples of 16 bytes) and ``partial`` (2, ceil(V / width), N or more) as
    `_exp_tile_kernel` does, for bfloat16 operands."""
    (n, h), v = hidden.shape, weight.shape[0]
    plan = PLANS[variant].fit(h)
    assert pre > 0 and partial.shape[1] == triton.cdiv(v, plan.block_v) and partial.shape[2] >= n
    grid = (min(num_sms, triton.cdiv(n, TILE_N) * partial.shape[1]),)
    rows = TILE_N if plan.turns else TILE_N // 2
    _exp_tile_sm90_kernel[grid](
        *_operands(hidden, weight, plan), _box(exps[:n, :v], rows, plan.block_v // 2),
        labels, active, anchor, active_tiles(active), exps, partial,
        n, v, h, partial.stride(0), exps.stride(0), pre,
        STAGES=plan.stages, TURNS=plan.turns, STAGGER=plan.stagger, GROUP=group, num_warps=4,
    )  # fmt: skip
