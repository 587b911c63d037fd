"""Hopper's own versions of the three logit tile kernels, in Gluon: persistent and warp-specialised.

What is computed, and the layout of the results, are those of `_rest_tile_kernel`, `_exp_tile_kernel` and
`_logit_gradient_kernel` without bias and softcap (`supported`). hopper_pipeline has how it is overlapped.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

from . import launch, tiles
from .hopper_pipeline import (
    DTYPES,
    HALF,
    HALF_LAYOUT,
    ROWS,
    TILE_N,
    TILE_V,
    WIDTH,
    Plan,
    boxes_of,
    finish,
    first_step,
    make_ring,
    other_steps,
    produce,
    send,
    tile_origin,
    tiles_of_program,
)
from .interface import HeadCall

PLAN = Plan()  # a launch's, where it names none
LOG2E = gl.constexpr(1.4426950408889634)
LN_2 = gl.constexpr(0.6931471805599453)
NO_LOGIT = gl.constexpr(tiles.NO_LOGIT.value)
ROW_LAYOUT = gl.constexpr(gl.SliceLayout(1, HALF_LAYOUT.value))
COLUMN_LAYOUT = gl.constexpr(gl.SliceLayout(0, HALF_LAYOUT.value))
# Of 64K registers the consumers' 2 x 128 threads get 240 each and the producer's (four warps are allotted) 24 each.
WARPS = gl.constexpr([4, 1])
REGISTERS = gl.constexpr([240, 24])


def supported(call: HeadCall) -> bool:
    """Whether these kernels can stand in for the Triton tile kernels: two-byte floats on sm_90, a factor above 0, and
    neither bias nor softcap."""
    plain = call.bias is None and call.transform.logit_softcap is None
    if not plain or call.hidden.dtype not in DTYPES or not launch.logit_factors(call.transform)[0] > 0:
        return False
    return launch.capability_of(call.hidden.device) == (9, 0)


@gluon.jit
def _exp2(x):
    """2^x in one instruction: results below 2^-126 are 0. (`gl.exp2` spends four on keeping those.)"""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _columns(col):
    """The columns of half a tile that starts at ``col``."""
    return (col + gl.arange(0, HALF, layout=COLUMN_LAYOUT))[None, :]


@gluon.jit
def _without_labels(u, label, col, V, STATS: gl.constexpr):
    """u with -inf in the labels' columns and beyond the last one; with NO_LOGIT for sums of e^x x."""
    cols = _columns(col)
    return gl.where((cols != label[:, None]) & (cols < V), u, NO_LOGIT if STATS else float("-inf"))


@gluon.jit
def _row_maximum(top, STATS: gl.constexpr):
    """``top``, -inf where it is that of no logit at all."""
    return gl.where(top <= NO_LOGIT, float("-inf"), top) if STATS else top


@gluon.jit
def _holds_label(label, col):
    """1 in rows whose label lies in the tile's columns."""
    return ((label >= col) & (label < col + WIDTH)).to(gl.int32)


@gluon.jit
def _consume_rest(inputs, ring, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr, STATS: gl.constexpr):
    """Warpgroup w of `_rest_tile_sm90_kernel`."""
    p_label, p_tiles, o_partial, N, V, H, plane, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    for j in range(tiles_of_program(count, V)):
        acc = first_step(j, steps, ring, w, STAGGER)
        # What the reduction needs to know is looked up while the products are running.
        row, col = tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        n = row + w * ROWS + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        acc = other_steps(acc, j, steps, ring, w, STAGGER)
        # Most tiles hold no row's label: those spend nothing on masks.
        special = gl.max(_holds_label(label, col), axis=0)
        left, right = finish(acc, j, steps, ring)
        if STATS:
            logits = gl.sum(left, axis=1) + gl.sum(right, axis=1)  # beyond the last column they are 0
        if (special != 0) | (col + WIDTH > V):
            left = _without_labels(left, label, col, V, STATS)
            right = _without_labels(right, label, col + HALF, V, STATS)
        top = _row_maximum(gl.maximum(gl.max(left, axis=1), gl.max(right, axis=1)), STATS)
        shift = gl.where(top == float("-inf"), 0.0, top * to_log2)[:, None]
        left = left * to_log2 - shift
        e = _exp2(left)
        total = gl.sum(e, axis=1)
        if STATS:
            weighted = gl.sum(e * left, axis=1)
        right = right * to_log2 - shift
        e = _exp2(right)
        total += gl.sum(e, axis=1)
        if STATS:
            weighted += gl.sum(e * right, axis=1)
        at = o_partial + (col // WIDTH).to(gl.int64) * N + n
        gl.store(at, top * pre, mask=n < N)
        gl.store(at + plane, total, mask=n < N)
        if STATS:
            gl.store(at + 2 * plane, weighted * LN_2, mask=n < N)
            gl.store(at + 3 * plane, logits * pre, mask=n < N)


@gluon.jit
def _consume_exps(
    inputs, ring, out_boxes, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr, STATS: gl.constexpr
):
    """Warpgroup w of `_exp_tile_sm90_kernel`. Half a tile at a time goes out through ``out_boxes[w]``."""
    p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    box = out_boxes.index(w)
    for j in range(tiles_of_program(count, V)):
        acc = first_step(j, steps, ring, w, STAGGER)
        row, col = tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        row += w * ROWS
        n = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        label = gl.load(p_label + n, mask=n < N, other=-1).to(gl.int32)
        active = gl.load(p_active + n, mask=n < N, other=0) != 0
        anchor = gl.load(p_anchor + n, mask=n < N, other=0.0) * LOG2E
        acc = other_steps(acc, j, steps, ring, w, STAGGER)
        # Most tiles hold no row's label, and most have no row to spare: those spend nothing on masks.
        spared = ((n < N) & (active == 0)).to(gl.int32)
        flags = gl.reduce_or(_holds_label(label, col) + 2 * spared, axis=0)
        halves = finish(acc, j, steps, ring)
        top = gl.full((ROWS,), float("-inf"), gl.float32, ROW_LAYOUT)
        total = gl.zeros((ROWS,), gl.float32, ROW_LAYOUT)
        weighted = gl.zeros((ROWS,), gl.float32, ROW_LAYOUT)
        logits = gl.zeros((ROWS,), gl.float32, ROW_LAYOUT)
        for side in gl.static_range(2):
            u = halves[side]
            edge = col + side * HALF
            if STATS:
                logits += gl.sum(u, axis=1)  # beyond the last column they are 0
            if ((flags & 1) != 0) | (edge + HALF > V):
                u = _without_labels(u, label, edge, V, STATS)
            top = gl.maximum(top, gl.max(u, axis=1))
            x = u * to_log2 - anchor[:, None]
            e = _exp2(x)
            total += gl.sum(e, axis=1)
            if STATS:
                weighted += gl.sum(e * x, axis=1)
            e = e.to(box.dtype)
            if (flags & 2) == 0:
                send(e, row, edge, exps, box)
            else:
                cols = _columns(edge)
                at = o_exp + n.to(gl.int64)[:, None] * stride_exp + cols
                gl.store(at, e, mask=active[:, None] & (cols < V))
        at = o_partial + (col // WIDTH).to(gl.int64) * N + n
        gl.store(at, _row_maximum(top, STATS) * pre, mask=active)
        gl.store(at + plane, total, mask=active)
        if STATS:
            gl.store(at + 2 * plane, weighted * LN_2, mask=active)
            gl.store(at + 3 * plane, logits * pre, mask=active)
    tma.store_wait(0)  # shared memory must outlive the copies


@gluon.jit
def _consume_gradients(inputs, ring, out_boxes, w: gl.constexpr, GROUP: gl.constexpr, STAGGER: gl.constexpr):
    """Warpgroup w of `_gradient_tile_sm90_kernel`. Half a tile at a time goes out through ``out_boxes[w]``."""
    p_label, p_factor, p_max, p_sum, p_tiles, grad, N, V, H, first, pre = inputs
    count = gl.load(p_tiles)
    steps = gl.cdiv(H, ring.columns.shape[2])
    to_log2 = pre * LOG2E
    box = out_boxes.index(w)
    for j in range(tiles_of_program(count, V)):
        acc = first_step(j, steps, ring, w, STAGGER)
        row, col = tile_origin(gl.program_id(0) + j * gl.num_programs(0), p_tiles, count, V, GROUP)
        row += w * ROWS
        n = row + gl.arange(0, ROWS, layout=ROW_LAYOUT)
        factor = gl.load(p_factor + n, mask=n < N, other=0.0)
        label = (gl.load(p_label + n, mask=n < N, other=-1) - first).to(gl.int32)
        top = gl.load(p_max + n, mask=factor != 0.0, other=float("inf")) * LOG2E  # e^(z - inf) = 0
        others = -factor / gl.load(p_sum + n, mask=factor != 0.0, other=1.0)
        acc = other_steps(acc, j, steps, ring, w, STAGGER)
        special = gl.max(_holds_label(label, col), axis=0)
        halves = finish(acc, j, steps, ring)
        for side in gl.static_range(2):
            value = others[:, None] * _exp2(halves[side] * to_log2 - top[:, None])
            if special != 0:
                value = gl.where(_columns(col + side * HALF) == label[:, None], factor[:, None], value)
            send(value.to(box.dtype), row, col + side * HALF, grad, box)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _rest_tile_sm90_kernel(
    hidden, weight, p_label, p_tiles, o_partial, N, V, H, plane, pre,
    STAGES: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr, STATS: gl.constexpr,
):  # fmt: skip
    """Tiles of logits z = pre * u, pre > 0, reduced over their columns other than the labels' to m = max z and
    s = sum e^(z - m) and, for statistics, sum e^(z - m) (z - m), and over all of them to sum z, at
    ``o_partial[quantity, column tile, row]``; of the row tiles listed in ``p_tiles``.

    2NVH FLOP; reads hidden and weight once per tile, mostly from L2; writes 8 bytes a row and tile, 16 with statistics.
    """
    ring = make_ring(hidden, weight, STAGES)
    inputs = (p_label, p_tiles, o_partial, N, V, H, plane, pre)
    gl.warp_specialize(
        [
            (_consume_rest, (inputs, ring, 0, GROUP, STAGGER, STATS)),
            (_consume_rest, (inputs, ring, 1, GROUP, STAGGER, STATS)),
            (produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
        ],
        WARPS,
        REGISTERS,
    )


@gluon.jit(do_not_specialize=["N", "V", "H", "plane"])
def _exp_tile_sm90_kernel(
    hidden, weight, exps, p_label, p_active, p_anchor, p_tiles, o_exp, o_partial, N, V, H, plane, stride_exp, pre,
    STAGES: gl.constexpr, STAGGER: gl.constexpr, GROUP: gl.constexpr, STATS: gl.constexpr,
):  # fmt: skip
    """Tiles of E = e^(z - anchor), 0 in the label's column, for z = pre * u, pre > 0. At
    ``o_partial[quantity, column tile, row]`` their row maxima of z and float32 row sums of E and, for statistics, row
    sums of E (z - anchor), and of z over all columns. Rows that are not active are left as they were.

    2NVH FLOP; writes NV elements. ``exps`` and ``o_exp`` are the same memory.
    """
    ring = make_ring(hidden, weight, STAGES)
    out_boxes = gl.allocate_shared_memory(exps.dtype, [2, ROWS, HALF], exps.layout)
    inputs = (p_label, p_active, p_anchor, p_tiles, exps, o_exp, o_partial, N, V, H, plane, stride_exp, pre)
    gl.warp_specialize(
        [
            (_consume_exps, (inputs, ring, out_boxes, 0, GROUP, STAGGER, STATS)),
            (_consume_exps, (inputs, ring, out_boxes, 1, GROUP, STAGGER, STATS)),
            (produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
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
    ring = make_ring(hidden, weight, STAGES)
    out_boxes = gl.allocate_shared_memory(grad.dtype, [2, ROWS, HALF], grad.layout)
    inputs = (p_label, p_factor, p_max, p_sum, p_tiles, grad, N, V, H, first, pre)
    gl.warp_specialize(
        [
            (_consume_gradients, (inputs, ring, out_boxes, 0, GROUP, STAGGER)),
            (_consume_gradients, (inputs, ring, out_boxes, 1, GROUP, STAGGER)),
            (produce, (hidden, weight, p_tiles, V, H, ring, GROUP)),
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


def _prepared(hidden: Tensor, weight: Tensor, plan: Plan | None, sms: int) -> tuple[tuple, tuple, dict[str, int]]:
    """Grid, operands and options of a launch: a program for each multiprocessor that has a tile."""
    (n, h), v = hidden.shape, weight.shape[0]
    plan = (plan or PLAN).fit(h)
    grid = (min(sms, triton.cdiv(n, TILE_N) * triton.cdiv(v, TILE_V)),)
    operands = boxes_of(hidden, ROWS.value, plan.depth), boxes_of(weight, WIDTH.value, plan.depth)
    return grid, operands, {"STAGES": plan.stages, "STAGGER": plan.stagger, "GROUP": plan.group, "num_warps": 4}


def rest_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, tiles: Tensor, partial: Tensor, pre: float,
    *, sms: int, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills ``partial`` (2 or, with statistics, 4, ceil(V / 256), N or more) as `_rest_tile_kernel` does in the row
    tiles of the list ``tiles`` (`active_tiles`), for operands whose rows start at multiples of 16 bytes
    (`launch.readable`)."""
    (n, h), v = hidden.shape, weight.shape[0]
    grid, operands, options = _prepared(hidden, weight, plan, sms)
    _rest_tile_sm90_kernel[grid](
        *operands, labels, tiles, partial, n, v, h, partial.stride(0), pre, STATS=len(partial) == 4, **options
    )


def exp_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, active: Tensor, tiles: Tensor, anchor: Tensor, exps: Tensor,
    partial: Tensor, pre: float, *, sms: int, plan: Plan | None = None,
) -> None:  # fmt: skip
    """Fills ``exps`` (N or more, V or more; rows at multiples of 16 bytes) and ``partial`` (2 or, with statistics, 4,
    ceil(V / 256), N or more) as `_exp_tile_kernel` does. ``tiles`` is `active_tiles` of ``active``."""
    (n, h), v = hidden.shape, weight.shape[0]
    grid, operands, options = _prepared(hidden, weight, plan, sms)
    _exp_tile_sm90_kernel[grid](
        *operands, boxes_of(exps[:n, :v], ROWS.value, HALF.value), labels, active, anchor, tiles, exps, partial,
        n, v, h, partial.stride(0), exps.stride(0), pre, STATS=len(partial) == 4, **options,
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
        *operands, boxes_of(grad, ROWS.value, HALF.value), labels, factor, top, others_sum, tiles,
        n, v, h, first, pre, **options,
    )  # fmt: skip
    _zero_tiles_kernel[(triton.cdiv(n, TILE_N), 8)](
        factor, grad, n, v, grad.stride(0), BLOCK_N=TILE_N, BLOCK_V=1024, num_warps=4
    )
