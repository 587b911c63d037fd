"""Per-token log-probabilities of a linear head, and statistics: the forward pass that keeps nothing.

With z the transformed logits of a row and y its label, everything rests on the logit z_y, which an indexed dot gives,
and on sums over the *other* columns. ``d = logsumexp_{j != y}(z_j) - z_y`` yields ``logp = -softplus(d)`` without the
cancellation of ``z_y - logsumexp(z)``: relative accuracy holds where 1 - p is 1e-30, and nothing overflows however
unlikely the token is. All sums are float32, taken in one fixed order: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .active_tiles import sort_rows
from .hopper_choice import hopper_tiles_for
from .interface import ForwardOutput, HeadCall, RowStatistics
from .launch import (
    SCRATCH_ROWS,
    launcher,
    logit_factors,
    num_sms,
    operands,
    plan_rows,
    readable,
    setup_of,
)
from .tiles import (
    LN_2,
    LOG2_E,
    NO_LOGIT,
    WITH_LABEL,
    exp2,
    log1p_unit,
    logit_scale,
    logit_tile,
    rows_with_labels,
    softcapped,
    tile_origin,
)


@triton.jit(do_not_specialize=["N"])
def _label_logit_kernel(
    p_hidden, p_weight, p_bias, p_label, o_logit, o_anchor, o_slope, o_active,
    N, V, H, stride_h, stride_w, ignore_index, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z_y of each row, twice where an anchor is asked for, ``(dz/du)_y / slope``, and whether the row counts (int32).

    NaN for a label outside [0, V), 0 for an ignored row. Reads 2NH elements, 2NH FLOP.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(p_label + n, mask=n < N, other=ignore_index)
    active = label != ignore_index
    known = active & (label >= 0) & (label < V)
    row = n.to(tl.int64) * stride_h
    column = tl.where(known, label, 0) * stride_w
    total = tl.zeros((BLOCK_N, BLOCK_H), dtype=tl.float32)
    for k in range(0, H, BLOCK_H):
        i = k + tl.arange(0, BLOCK_H)
        mask = known[:, None] & (i < H)[None, :]
        h = tl.load(p_hidden + row[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        w = tl.load(p_weight + column[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        total += h * w
    u = tl.sum(total, axis=1)
    if HAS_BIAS:
        u += tl.load(p_bias + tl.where(known, label, 0)).to(tl.float32)
    x, slope = softcapped(u, pre, HAS_SOFTCAP)
    z = tl.where(known, x * logit_scale(pre, post, HAS_SOFTCAP), tl.where(active, float("nan"), 0.0))
    tl.store(o_logit + n, z, mask=n < N)
    if o_anchor is not None:
        tl.store(o_anchor + n, z, mask=n < N)
    tl.store(o_active + n, active.to(tl.int32), mask=n < N)
    if HAS_SOFTCAP:
        tl.store(o_slope + n, slope, mask=n < N)


@triton.jit(do_not_specialize=["N", "plane"])
def _rest_tile_kernel(
    hidden, weight, p_bias, p_label, p_active, o_partial,
    N, V, H, plane, stride_h, stride_w, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of logits, reduced over its columns other than the labels' to m = max z, s = sum e^(z - m) and, for
    statistics, sum e^(z - m) (z - m), and over all of them to sum z, at ``o_partial[quantity, column tile, row]``.

    2NVH FLOP in all; reads hidden and weight once per tile, mostly from L2; writes 8 bytes (16 with statistics) a row
    and tile. A tile with no active row returns at once.
    """
    row, col = tile_origin(N, V, BLOCK_N, BLOCK_V, GROUP)
    n = row + tl.arange(0, BLOCK_N)
    active = tl.load(p_active + n, mask=n < N, other=0) != 0
    label = tl.load(p_label + n, mask=n < N, other=-1).to(tl.int32)
    rows = rows_with_labels(active, label, col, BLOCK_V)
    if rows == 0:
        return
    x, _ = logit_tile(
        hidden, weight, p_bias, row, col, N, V, H, stride_h, stride_w, pre,
        BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, TMA,
    )  # fmt: skip
    scale = logit_scale(pre, post, HAS_SOFTCAP)
    nothing: tl.constexpr = NO_LOGIT if STATS else float("-inf")
    if STATS:
        total = tl.sum(x, axis=1)
    cols = tl.arange(0, BLOCK_V)
    if col + BLOCK_V > V:
        # compared by row: masks of columns alone would be made before the product and held in registers
        inside = cols[None, :] < tl.where(n < N, V - col, 0)[:, None]
        if STATS:
            total = tl.sum(tl.where(inside, x, 0.0), axis=1)
        x = tl.where(inside, x, nothing)
    if rows >= WITH_LABEL:
        x = tl.where(cols[None, :] != (label - col)[:, None], x, nothing)
    top = tl.max(x, axis=1)
    if STATS:
        top = tl.where(top <= NO_LOGIT, float("-inf"), top)
    shift = tl.where(top == float("-inf"), 0.0, top * (scale * LOG2_E))
    x = tl.fma(x, scale * LOG2_E, -shift[:, None])
    if STATS and HAS_BIAS:  # which may be -inf
        x = tl.maximum(x, NO_LOGIT)
    e = exp2(x)
    at = o_partial + (col // BLOCK_V).to(tl.int64) * N + n
    tl.store(at, top * scale, mask=n < N)
    tl.store(at + plane, tl.sum(e, axis=1), mask=n < N)
    if STATS:
        tl.store(at + 2 * plane, tl.sum(e * x, axis=1) * LN_2, mask=n < N)
        tl.store(at + 3 * plane, total * scale, mask=n < N)


@triton.jit
def store_statistics(out, stride, mask, active, z_y, anchor, total, weighted, logits, V):
    """Writes lse, entropy and mean logit of some rows to ``out[quantity]``, 0 in rows that are not active.

    ``total`` and ``weighted`` are sums over the columns other than the label's, of e^(z - anchor) and of
    e^(z - anchor) (z - anchor), ``logits`` is the sum of z over all columns. The entropy is that of the choice "label
    or not" plus (1 - p_y) times the rest's own, so it stays accurate for a nearly certain token.
    """
    log_total = tl.log(total)
    d = anchor - z_y + log_total
    tail = log1p_unit(tl.exp(-tl.abs(d)))
    surprise = tl.maximum(d, 0.0) + tail
    rest_surprise = tl.maximum(-d, 0.0) + tail
    rest = rest_surprise + log_total - weighted / total
    rest = tl.where(total > 0, tl.exp(-rest_surprise) * rest, 0.0)
    entropy = tl.exp(-surprise) * surprise + rest
    lse = tl.where(d > 0.0, anchor + log_total, z_y) + tail
    tl.store(out, tl.where(active, lse, 0.0), mask=mask)
    tl.store(out + stride, tl.where(active, entropy, 0.0), mask=mask)
    tl.store(out + 2 * stride, tl.where(active, tl.where(z_y == z_y, logits / V, z_y), 0.0), mask=mask)


@triton.jit(do_not_specialize=["N", "plane", "stride_out"])
def _combine_kernel(
    p_partial, p_logit, p_active, p_rows, o_out,
    N, V, TILES, plane, stride_out,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """Sums each row's partials over the column tiles and writes ``o_out[quantity, p_rows[row]]``: logp, M, S and, for
    statistics, those of `store_statistics`; 0 in rows that are not active.

    M = max_t m_t, S = sum_t s_t e^(m_t - M); with d = M + log S - z_y, logp = -softplus(d). Reads the partials twice.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    active = tl.load(p_active + n, mask=n < N, other=0) != 0
    z_y = tl.load(p_logit + n, mask=n < N, other=0.0)
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    for t in range(0, TILES, BLOCK_T):
        i = t + tl.arange(0, BLOCK_T)
        mask = (i < TILES)[:, None] & active[None, :]
        at = p_partial + i.to(tl.int64)[:, None] * N + n[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=mask, other=float("-inf")), axis=0))
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    logits = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(0, TILES, BLOCK_T):
        i = t + tl.arange(0, BLOCK_T)
        mask = (i < TILES)[:, None] & active[None, :]
        at = p_partial + i.to(tl.int64)[:, None] * N + n[None, :]
        m = tl.load(at, mask=mask, other=float("-inf"))
        s = tl.load(at + plane, mask=mask, other=0.0)
        x = tl.where(m == float("-inf"), 0.0, m - top[None, :])
        total += tl.sum(s * tl.exp(x), axis=0)
        if STATS:
            q = tl.load(at + 2 * plane, mask=mask, other=0.0)
            weighted += tl.sum((q + s * x) * tl.exp(x), axis=0)
            logits += tl.sum(tl.load(at + 3 * plane, mask=mask, other=0.0), axis=0)
    log_total = tl.log(total)
    d = top - z_y + log_total
    tail = log1p_unit(tl.exp(-tl.abs(d)))
    surprise = tl.maximum(d, 0.0) + tail
    out = o_out + tl.load(p_rows + n, mask=n < N, other=0)
    tl.store(out, tl.where(active, -surprise, 0.0), mask=n < N)
    tl.store(out + stride_out, tl.where(active, top, 0.0), mask=n < N)
    tl.store(out + 2 * stride_out, tl.where(active, total, 0.0), mask=n < N)
    if STATS:
        store_statistics(out + 3 * stride_out, stride_out, n < N, active, z_y, top, total, weighted, logits, V)


def label_logits(call: HeadCall, anchor: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(z_y, (dz/du)_y / slope with a softcap, active) of each row, and z_y in ``anchor``; ``_label_logit_kernel``."""
    hidden, weight, labels, bias, transform, ignore_index = call
    n, h = hidden.shape
    softcap = transform.logit_softcap is not None
    pre, post, _ = logit_factors(transform)
    logit = hidden.new_empty(n, dtype=torch.float32)
    bend = torch.empty_like(logit) if softcap else None
    active = labels.new_empty(n, dtype=torch.int32)
    _label_logit_kernel[(triton.cdiv(n, 32),)](
        hidden, weight, bias, labels, logit, anchor, bend, active,
        n, weight.shape[0], h, hidden.stride(0), weight.stride(0), ignore_index, pre, post,
        BLOCK_N=32, BLOCK_H=256, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap, num_warps=8,
    )  # fmt: skip
    return logit, bend, active


@launcher
def linear_logprob_fwd(call: HeadCall, *, stats: bool = False) -> ForwardOutput:
    """``log_softmax(z)[label]`` per row and what backward needs; with ``stats`` also logsumexp, entropy and mean of z.

    ``hidden`` (N, H) and ``weight`` (V, H) share one of float32, bfloat16, float16; ``labels`` (N,) int64; ``bias``
    (V,). A row whose label is ``ignore_index`` gives 0 in every result, one whose label is outside [0, V) NaN. Rows to
    be ignored are moved to the end first, so the tiles spend nothing on them. No half-precision logit reaches memory:
    2NVH FLOP, and ``min(N, 8192) * (H * itemsize + ceil(V / BLOCK_V) * 8)`` bytes of scratch (16 for 8 with ``stats``).
    float32 products are cuBLAS's on a GPU, SCRATCH_BYTES at a time. No host sync.
    """
    hidden, weight, labels, bias, transform, ignore_index = call
    (n, h), v = hidden.shape, weight.shape[0]
    weight, bias, softcap, pre, post, _, tile = setup_of(call)
    out = hidden.new_empty(6 if stats else 3, n, dtype=torch.float32)
    result = ForwardOutput(*out[:3], RowStatistics(*out[3:]) if stats else None)
    if n == 0:
        return result
    tiles = triton.cdiv(v, tile.block_v)
    size = min(n, SCRATCH_ROWS) if tile.block_h else plan_rows(n, 4 * v, tile)
    partial = hidden.new_empty(4 if stats else 2, tiles, size, dtype=torch.float32)
    plane = partial.stride(0)
    hopper = hopper_tiles_for(call)
    rows, ordered, tiles_of_rows = sort_rows(labels, ignore_index, size)
    for part, y, row_tiles in zip(rows.split(size), ordered.split(size), tiles_of_rows, strict=True):
        chunk = readable(hidden.index_select(0, part))
        logit, _, active = label_logits(HeadCall(chunk, weight, y, bias, transform, ignore_index))
        count = len(part)
        if hopper:
            hopper.rest_tiles(chunk, weight, y, row_tiles, partial, pre, sms=num_sms(hidden.device))
        else:
            a, b, *strides = operands(chunk, weight, tile)
            _rest_tile_kernel[(triton.cdiv(count, tile.block_n) * tiles,)](
                a, b, bias, y, active, partial, count, v, h, plane, *strides, pre, post,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap, STATS=stats, **tile.meta(),
            )  # fmt: skip
        _combine_kernel[(triton.cdiv(count, 16),)](
            partial, logit, active, part, out, count, v, tiles, plane, n, BLOCK_N=16, BLOCK_T=128, STATS=stats
        )
    return result
