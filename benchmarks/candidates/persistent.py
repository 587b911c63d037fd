"""The two logit tile kernels of `linear_logprob_fwd` as persistent Triton kernels: a program per multiprocessor (two
for the small tiles) walks over tiles, and with ``flat`` Triton pipelines the loads across tile boundaries, so that the
next tile's operands arrive while this one is reduced.

What is computed, and the layout of the results, are those of ``_rest_tile_kernel`` and ``_exp_tile_kernel`` without
bias and softcap.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from active_tiles import active_tiles
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2_E = tl.constexpr(1.4426950408889634)


class Plan(NamedTuple):
    """Tile and how a program runs it; ``flat``: one loop over tiles and steps; ``programs``: per multiprocessor."""

    block_v: int
    num_warps: int
    num_stages: int
    flat: bool
    programs: int
    block_n: int = 128
    block_h: int = 64


PLANS = {
    "loop 128x256": Plan(256, 8, 4, False, 1),
    "flat 128x256": Plan(256, 8, 3, True, 1),
    "loop 2 x 128x128": Plan(128, 4, 3, False, 2),
    "flat 128x128": Plan(128, 8, 4, True, 1),
}


@triton.jit
def _origin(i, p_tiles, count, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of tile i, as `launch.tile_origin`, over the row tiles that ``p_tiles`` lists."""
    blocks_v = tl.cdiv(V, BLOCK_V)
    first = i // (GROUP * blocks_v) * GROUP
    height = tl.minimum(count - first, GROUP)
    inside = i % (GROUP * blocks_v)
    return tl.load(p_tiles + 1 + first + inside % height) * BLOCK_N, inside // height * BLOCK_V


@triton.jit
def _without_labels(u, label, col, V, BLOCK_V: tl.constexpr, BRANCH: tl.constexpr):
    """u with -inf in the labels' columns and beyond the last one; with BRANCH, untouched where the tile has neither."""
    if not BRANCH:
        cols = col + tl.arange(0, BLOCK_V)
        return tl.where((cols[None, :] != label[:, None]) & (cols < V)[None, :], u, float("-inf"))
    here = (label >= col) & (label < col + BLOCK_V)
    if (tl.max(here.to(tl.int32), axis=0) != 0) | (col + BLOCK_V > V):
        cols = col + tl.arange(0, BLOCK_V)
        u = tl.where((cols[None, :] != label[:, None]) & (cols < V)[None, :], u, float("-inf"))
    return u


@triton.jit(do_not_specialize=["N", "plane"])
def _rest_tiles_kernel(
    hidden, weight, p_label, p_tiles, o_partial, N, V, H, plane, pre,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """m = max z and s = sum e^(z - m) over each tile's columns other than the labels', for z = pre * u, pre > 0."""
    count = tl.load(p_tiles)
    total = count * tl.cdiv(V, BLOCK_V)
    for i in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLAT):
        row, col = _origin(i, p_tiles, count, V, BLOCK_N, BLOCK_V, GROUP)
        n = row + tl.arange(0, BLOCK_N)
        u = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for k in range(0, H, BLOCK_H):
            u = tl.dot(hidden.load([row, k]), weight.load([col, k]).T, u)
        label = tl.load(p_label + n, mask=n < N, other=-1).to(tl.int32)
        u = _without_labels(u, label, col, V, BLOCK_V, True)
        top = tl.max(u, axis=1)
        shift = tl.where(top == float("-inf"), 0.0, top * (pre * LOG2_E))
        e = tl.exp2(u * (pre * LOG2_E) - shift[:, None])
        at = o_partial + (col // BLOCK_V).to(tl.int64) * N + n
        tl.store(at, top * pre, mask=n < N)
        tl.store(at + plane, tl.sum(e, axis=1), mask=n < N)


@triton.jit(do_not_specialize=["N", "plane"])
def _exp_tiles_kernel(
    hidden, weight, p_label, p_active, p_anchor, p_tiles, o_exp, o_partial,
    N, V, H, plane, stride_exp, pre,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """E = e^(z - anchor), 0 in the label's column, and its row maxima of z and row sums."""
    count = tl.load(p_tiles)
    total = count * tl.cdiv(V, BLOCK_V)
    for i in tl.range(tl.program_id(0), total, tl.num_programs(0), flatten=FLAT):
        row, col = _origin(i, p_tiles, count, V, BLOCK_N, BLOCK_V, GROUP)
        n = row + tl.arange(0, BLOCK_N)
        u = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for k in range(0, H, BLOCK_H):
            u = tl.dot(hidden.load([row, k]), weight.load([col, k]).T, u)
        label = tl.load(p_label + n, mask=n < N, other=-1).to(tl.int32)
        u = _without_labels(u, label, col, V, BLOCK_V, False)  # a branch there spills registers
        active = tl.load(p_active + n, mask=n < N, other=0) != 0
        anchor = tl.load(p_anchor + n, mask=n < N, other=0.0) * LOG2_E
        e = tl.exp2(u * (pre * LOG2_E) - anchor[:, None])
        at = o_partial + (col // BLOCK_V).to(tl.int64) * N + n
        tl.store(at, tl.max(u, axis=1) * pre, mask=active)
        tl.store(at + plane, tl.sum(e, axis=1), mask=active)
        inner = tl.arange(0, BLOCK_N)[:, None] * stride_exp + tl.arange(0, BLOCK_V)[None, :]
        inside = active[:, None] & (tl.arange(0, BLOCK_V) < V - col)[None, :]
        tl.store(o_exp + row.to(tl.int64) * stride_exp + col + inner, e.to(o_exp.dtype.element_ty), mask=inside)


def _box(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def _launch(kernel, plan: Plan, arguments: tuple, n: int, v: int, *, num_sms: int, group: int) -> None:
    tiles = triton.cdiv(n, plan.block_n) * triton.cdiv(v, plan.block_v)
    kernel[(min(tiles, plan.programs * num_sms),)](
        *arguments, BLOCK_N=plan.block_n, BLOCK_V=plan.block_v, BLOCK_H=plan.block_h, GROUP=group, FLAT=plan.flat,
        num_warps=plan.num_warps, num_stages=plan.num_stages,
    )  # fmt: skip


def rest_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, active: Tensor, partial: Tensor, pre: float,
    *, num_sms: int, group: int, variant: str,
) -> None:  # fmt: skip
    """As `gluon_sm90.rest_tiles`."""
    (n, h), v, plan = hidden.shape, weight.shape[0], PLANS[variant]
    operands = _box(hidden, plan.block_n, plan.block_h), _box(weight, plan.block_v, plan.block_h)
    rows = active_tiles(active)
    arguments = (*operands, labels, rows, partial, n, v, h, partial.stride(0), pre)
    _launch(_rest_tiles_kernel, plan, arguments, n, v, num_sms=num_sms, group=group)


def exp_tiles(
    hidden: Tensor, weight: Tensor, labels: Tensor, active: Tensor, anchor: Tensor, exps: Tensor, partial: Tensor,
    pre: float, *, num_sms: int, group: int, variant: str,
) -> None:  # fmt: skip
    """As `gluon_sm90.exp_tiles`."""
    (n, h), v, plan = hidden.shape, weight.shape[0], PLANS[variant]
    operands = _box(hidden, plan.block_n, plan.block_h), _box(weight, plan.block_v, plan.block_h)
    rows = active_tiles(active)
    arguments = (*operands, labels, active, anchor, rows, exps, partial, n, v, h, partial.stride(0))
    _launch(_exp_tiles_kernel, plan, (*arguments, exps.stride(0), pre), n, v, num_sms=num_sms, group=group)
