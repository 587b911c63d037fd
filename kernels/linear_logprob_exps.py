"""Log-probabilities with the exponentials of their logits kept: for gradients that need no second look at the logits.

E = e^(z - anchor) is stored in hidden's dtype, around each row's own z_y where its sum stays within that dtype's range.
A frozen head's gradient, ``E @ W`` and a row scale, is made at once; a trained head's waits for the upstream gradient.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .active_tiles import active_tiles, sort_rows
from .hopper_choice import hopper_tiles_for
from .interface import HeadCall, HiddenGradient, RowExponentials, RowStatistics, kept_width
from .launch import (
    Tile,
    launcher,
    logit_factors,
    matmul_fp32,
    num_sms,
    operands,
    plan_rows,
    readable,
    setup_of,
)
from .linear_logprob_fwd import label_logits, store_statistics
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
    tile_origin,
    tile_place,
)

# The range in which a row's sum of exp(z - z_y) must lie when its exponentials are stored in a dtype; outside of it the
# row is written anew around its maximum. float16 ends at 65504 above and 6e-8 below, where a confident token's
# exponentials would vanish. The others hold e^88, less room for the products to come, and e^-87.
ANCHOR_RANGE = {
    torch.float16: (1.0, 2.0**14),
    torch.bfloat16: (0.0, math.exp(60.0)),
    torch.float32: (0.0, math.exp(60.0)),
}
# A row that is written anew peaks at 2^14, not 1: float16 then flushes what is below 1e-11 of the peak, not below 1e-7.
HEADROOM = 14 * math.log(2.0)


@triton.jit
def _rows_of_tile(p_label, p_active, row, col, N, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """A tile's rows, and `rows_with_labels` of them."""
    n = row + tl.arange(0, BLOCK_N)
    active = tl.load(p_active + n, mask=n < N, other=0) != 0
    label = tl.load(p_label + n, mask=n < N, other=-1).to(tl.int32)
    return n, rows_with_labels(active, label, col, BLOCK_V)


@triton.jit
def _exp_tile(
    hidden, weight, p_bias, p_label, p_active, p_anchor, o_exp, o_partial, row, col, n, rows,
    N, V, H, plane, stride_h, stride_w, stride_exp, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of E = e^(z - anchor), 0 in the label's column, times ``(dz/du) / slope`` where there is a softcap, in
    the dtype of ``o_exp``. At ``o_partial[quantity, column tile, row]`` its row maxima of z and float32 row sums of
    e^(z - anchor) over those columns and, for statistics, row sums of e^(z - anchor) (z - anchor), and of z over all
    columns. Rows that are not active are left as they were."""
    x, slope = logit_tile(
        hidden, weight, p_bias, row, col, N, V, H, stride_h, stride_w, pre,
        BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, TMA,
    )  # fmt: skip
    scale = logit_scale(pre, post, HAS_SOFTCAP)
    active = tl.load(p_active + n, mask=n < N, other=0) != 0  # again: registers are scarce during the product
    at = o_partial + (col // BLOCK_V).to(tl.int64) * N + n
    nothing: tl.constexpr = NO_LOGIT if STATS else float("-inf")
    if STATS:
        total = tl.sum(x, axis=1)
    if col + BLOCK_V > V:
        # compared by row: masks of columns alone would be made before the product and held in registers
        inside = tl.arange(0, BLOCK_V)[None, :] < tl.where(n < N, V - col, 0)[:, None]
        if STATS:
            total = tl.sum(tl.where(inside, x, 0.0), axis=1)
        x = tl.where(inside, x, nothing)
    if STATS:
        tl.store(at + 3 * plane, total * scale, mask=active)
    if rows >= WITH_LABEL:
        label = tl.load(p_label + n, mask=n < N, other=-1).to(tl.int32)
        cols = col + tl.arange(0, BLOCK_V)
        x = tl.where(cols[None, :] != label[:, None], x, nothing)
    top = tl.max(x, axis=1)
    if STATS:
        top = tl.where(top <= NO_LOGIT, float("-inf"), top)
    tl.store(at, top * scale, mask=active)
    anchor = tl.load(p_anchor + n, mask=n < N, other=0.0) * LOG2_E
    x = tl.fma(x, scale * LOG2_E, -anchor[:, None])
    if STATS and HAS_BIAS:  # which may be -inf
        x = tl.maximum(x, NO_LOGIT)
    e = exp2(x)
    tl.store(at + plane, tl.sum(e, axis=1), mask=active)
    if STATS:
        tl.store(at + 2 * plane, tl.sum(e * x, axis=1) * LN_2, mask=active)
    e = (e * slope).to(o_exp.dtype.element_ty)
    inner = tl.arange(0, BLOCK_N)[:, None] * stride_exp + tl.arange(0, BLOCK_V)[None, :]
    out = o_exp + row.to(tl.int64) * stride_exp + col + inner
    # up to the row's end, at a multiple of 16 elements, not to V: otherwise each element is stored by itself
    tl.store(out, e, mask=active[:, None] & (tl.arange(0, BLOCK_V) < stride_exp - col)[None, :])


@triton.jit(do_not_specialize=["N", "plane"])
def _exp_tile_kernel(
    hidden, weight, p_bias, p_label, p_active, p_anchor, o_exp, o_partial,
    N, V, H, plane, stride_h, stride_w, stride_exp, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`_exp_tile`, one a program. 2NVH FLOP; writes NV elements. A tile with no active row returns at once."""
    row, col = tile_origin(N, V, BLOCK_N, BLOCK_V, GROUP)
    n, rows = _rows_of_tile(p_label, p_active, row, col, N, BLOCK_N, BLOCK_V)
    if rows == 0:
        return
    _exp_tile(
        hidden, weight, p_bias, p_label, p_active, p_anchor, o_exp, o_partial, row, col, n, rows,
        N, V, H, plane, stride_h, stride_w, stride_exp, pre, post,
        BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, STATS, TMA,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "plane"])
def _exp_tiles_again_kernel(
    hidden, weight, p_bias, p_label, p_active, p_anchor, p_tiles, o_exp, o_partial,
    N, V, H, plane, stride_h, stride_w, stride_exp, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`_exp_tile` for every column tile of the row tiles that ``p_tiles`` lists (`active_tiles`), shared among the
    programs. Usually it lists none, and a program only reads that."""
    count = tl.load(p_tiles)
    blocks_v = tl.cdiv(V, BLOCK_V)
    for i in tl.range(tl.program_id(0), count * blocks_v, tl.num_programs(0), disable_licm=True):
        place, j = tile_place(i, count, blocks_v, GROUP)
        row, col = tl.load(p_tiles + 1 + place) * BLOCK_N, j * BLOCK_V
        n, rows = _rows_of_tile(p_label, p_active, row, col, N, BLOCK_N, BLOCK_V)
        _exp_tile(
            hidden, weight, p_bias, p_label, p_active, p_anchor, o_exp, o_partial, row, col, n, rows,
            N, V, H, plane, stride_h, stride_w, stride_exp, pre, post,
            BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, STATS, TMA,
        )  # fmt: skip


@triton.jit(do_not_specialize=["N", "plane"])
def _reanchor_kernel(
    p_partial, m_anchor, m_active,
    N, TILES, plane, floor, limit, headroom,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Leaves active only the rows whose sum of e^(z - anchor) is outside of ``floor .. limit``, and moves their anchor
    to the row's maximum less ``headroom``. Reads the partials once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    active = tl.load(m_active + n, mask=n < N, other=0) != 0
    top = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(0, TILES, BLOCK_T):
        i = t + tl.arange(0, BLOCK_T)
        mask = (i < TILES)[:, None] & active[None, :]
        at = p_partial + i.to(tl.int64)[:, None] * N + n[None, :]
        top = tl.maximum(top, tl.max(tl.load(at, mask=mask, other=float("-inf")), axis=0))
        total += tl.sum(tl.load(at + plane, mask=mask, other=0.0), axis=0)
    # with one column there is no maximum to move to
    outside = active & (top > float("-inf")) & ((total > limit) | (total < floor))
    tl.store(m_anchor + n, top - headroom, mask=outside)
    tl.store(m_active + n, outside.to(tl.int32), mask=n < N)


@triton.jit
def _row_sums(p_partial, p_logit, p_anchor, n, active, N, TILES, plane, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """(S, t, -logp) of the rows n: with a the anchor, t = e^(z_y - a), S = sum_{j != y} e^(z_j - a), and
    logp = -log(1 + S / t), taken from the smaller of S / t and t / S."""
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(0, TILES, BLOCK_T):
        i = t + tl.arange(0, BLOCK_T)
        mask = (i < TILES)[:, None] & active[None, :]
        at = p_partial + i.to(tl.int64)[:, None] * N + n[None, :]
        total += tl.sum(tl.load(at + plane, mask=mask, other=0.0), axis=0)
    z_y = tl.load(p_logit + n, mask=n < N, other=0.0)
    anchor = tl.load(p_anchor + n, mask=n < N, other=0.0)
    own = exp2(tl.fma(z_y, LOG2_E, -(anchor * LOG2_E)))  # the anchor rounded as in the sums
    likely = total <= own
    ratio = tl.where(likely, total / own, own / total)
    return total, own, tl.where(likely, 0.0, anchor - z_y + tl.log(total)) + log1p_unit(ratio)


@triton.jit
def _store_row_statistics(
    p_partial, p_logit, p_anchor, o_stats, stride, out, n, active, total, N, V, TILES, plane,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """`store_statistics` of the rows n, whose S is ``total``, at ``o_stats[quantity, out]``."""
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    logits = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for t in range(0, TILES, BLOCK_T // 2):  # of two quantities
        i = t + tl.arange(0, BLOCK_T // 2)
        mask = (i < TILES)[:, None] & active[None, :]
        at = p_partial + 2 * plane + i.to(tl.int64)[:, None] * N + n[None, :]
        weighted += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        logits += tl.sum(tl.load(at + plane, mask=mask, other=0.0), axis=0)
    z_y = tl.load(p_logit + n, mask=n < N, other=0.0)
    anchor = tl.load(p_anchor + n, mask=n < N, other=0.0)
    store_statistics(o_stats + out, stride, n < N, active, z_y, anchor, total, weighted, logits, V)


@triton.jit(do_not_specialize=["N", "plane", "stride_stats"])
def _keep_rows_kernel(
    p_partial, p_logit, p_slope, p_anchor, p_label, o_logp, o_scale, o_stats, o_exp,
    N, V, TILES, plane, stride_stats, stride_exp, slope,
    BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """logp, ``slope / (t + S)`` and, in the label's column of the exponentials, ``-S (dz/du)_y / slope``: with that
    element ``d logp / d u = -scale * exponentials`` in every column. Writes 3 elements a row, 6 with statistics."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(p_label + n, mask=n < N, other=-1)
    total, own, surprise = _row_sums(
        p_partial, p_logit, p_anchor, n, n < N, N, TILES, plane, BLOCK_N, BLOCK_T
    )  # fmt: skip
    tl.store(o_logp + n, -surprise, mask=n < N)
    tl.store(o_scale + n, slope / (own + total), mask=n < N)
    if STATS:
        _store_row_statistics(
            p_partial, p_logit, p_anchor, o_stats, stride_stats, n, n, n < N, total, N, V, TILES, plane,
            BLOCK_N, BLOCK_T,
        )  # fmt: skip
    if HAS_SOFTCAP:
        total *= tl.load(p_slope + n, mask=n < N, other=0.0)
    known = (n < N) & (label >= 0) & (label < V)
    out = o_exp + n.to(tl.int64) * stride_exp + tl.where(known, label, 0)
    tl.store(out, (-total).to(o_exp.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["N", "plane", "stride_stats"])
def _unit_gradient_kernel(
    p_partial, p_logit, p_slope, p_anchor, p_label, p_rows, p_product, p_weight, o_logp, o_stats, o_grad,
    N, V, H, TILES, plane, stride_stats, stride_w, stride_grad, ignore_index, slope,
    BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, STATS: tl.constexpr,
):  # fmt: skip
    """logp, d logp / d hidden and statistics of each row from its exponentials, at ``p_rows[row]`` of the outputs.

    With t and S as in `_row_sums`, c_j = (dz/du)_j / slope and the product A = sum_{j != y} e^(z_j - a) c_j W_j::

        d logp / d h = slope (S c_y W_y - A) / (t + S)

    since 1 - p_y = S / (t + S). Reads NH float32 and NH weights, writes NH elements.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    label = tl.load(p_label + n, mask=n < N, other=ignore_index)
    active = label != ignore_index
    known = active & (label >= 0) & (label < V)
    total, own, surprise = _row_sums(
        p_partial, p_logit, p_anchor, n, active, N, TILES, plane, BLOCK_N, BLOCK_T
    )  # fmt: skip
    rows = tl.load(p_rows + n, mask=n < N, other=0)
    tl.store(o_logp + rows, tl.where(active, -surprise, 0.0), mask=n < N)
    if STATS:
        _store_row_statistics(
            p_partial, p_logit, p_anchor, o_stats, stride_stats, rows, n, active, total, N, V, TILES, plane,
            BLOCK_N, BLOCK_T,
        )  # fmt: skip

    scale = slope / (own + total)
    if HAS_SOFTCAP:
        total *= tl.load(p_slope + n, mask=n < N, other=0.0)
    column = tl.where(known, label, 0) * stride_w
    for k in range(0, H, BLOCK_H):
        i = k + tl.arange(0, BLOCK_H)
        mask = active[:, None] & (i < H)[None, :]
        w = tl.load(p_weight + column[:, None] + i[None, :], mask=mask, other=0.0).to(tl.float32)
        a = tl.load(p_product + n.to(tl.int64)[:, None] * H + i[None, :], mask=mask, other=0.0)
        grad = tl.where(active[:, None], (total[:, None] * w - a) * scale[:, None], 0.0)
        out = o_grad + rows[:, None] * stride_grad + i[None, :]
        tl.store(out, grad.to(o_grad.dtype.element_ty), mask=(n < N)[:, None] & (i < H)[None, :])


def _exponentials(
    call: HeadCall, exps: Tensor, partial: Tensor, tile: Tile, row_tiles: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Fills ``exps`` and ``partial``, (2, tiles, rows) or 4 for 2 with statistics, as `_exp_tile_kernel` does: around
    each row's z_y, then once more, around the maximum, the rows that leave their dtype's range so. Returns
    (z_y, (dz/du)_y / slope with a softcap, anchor). ``row_tiles``: `active_tiles` of the rows that count, if known."""
    hidden, weight, labels, bias, transform, _ = call
    (n, h), v = hidden.shape, weight.shape[0]
    pre, post, _ = logit_factors(transform)
    tiles, plane = partial.shape[1], partial.stride(0)
    floor, limit = ANCHOR_RANGE[hidden.dtype]
    anchor = hidden.new_empty(n, dtype=torch.float32)
    logit, bend, active = label_logits(call, anchor)
    hopper, sms = hopper_tiles_for(call), num_sms(hidden.device)
    if not hopper:
        a, b, *strides = operands(hidden, weight, tile)
        inputs = a, b, bias, labels, active, anchor
        sizes = n, v, h, plane, *strides, exps.stride(0), pre, post
        options = {"HAS_BIAS": bias is not None, "HAS_SOFTCAP": transform.logit_softcap is not None}
        options |= {"STATS": len(partial) == 4, **tile.meta()}
        programs = triton.cdiv(n, tile.block_n) * tiles
        _exp_tile_kernel[(programs,)](*inputs, exps, partial, *sizes, **options)
    else:
        inputs, results = (hidden, weight, labels, active), (anchor, exps, partial, pre)
        row_tiles = active_tiles(active) if row_tiles is None else row_tiles
        hopper.exp_tiles(*inputs, row_tiles, *results, sms=sms)
    _reanchor_kernel[(triton.cdiv(n, 16),)](
        partial, anchor, active, n, tiles, plane, floor, limit, HEADROOM, BLOCK_N=16, BLOCK_T=128
    )
    if not hopper:
        again = active_tiles(active, tile.block_n)
        _exp_tiles_again_kernel[(min(programs, 2 * sms),)](*inputs, again, exps, partial, *sizes, **options)
    else:
        hopper.exp_tiles(*inputs, active_tiles(active), *results, sms=sms)
    return logit, bend, anchor


@launcher
def linear_logprob_fwd_d_hidden(call: HeadCall, *, stats: bool = False) -> HiddenGradient:
    """``logp`` and statistics as `linear_logprob_fwd` gives them, and ``d logp[i] / d hidden[i]``.

    For a head that takes no gradient. The backward pass is then a row scale, and both together cost 4NVH FLOP: the
    exponentials E of a chunk of rows are stored once, around each row's own z_y, and ``E @ W`` follows while they are
    at hand; the division by their sum comes after the product. E is as exact relative to 1 - p as its dtype is.
    Scratch: SCRATCH_BYTES for E (with float32, for E and the products), and per row of its chunk H elements, H float32
    and ``ceil(V / BLOCK_V) * 8`` bytes (16 for 8 with ``stats``).
    """
    hidden, weight, labels, bias, transform, ignore_index = call
    (n, h), v = hidden.shape, weight.shape[0]
    weight, bias, softcap, _, _, slope, tile = setup_of(call)
    logp = hidden.new_empty(n, dtype=torch.float32)
    row_stats = hidden.new_empty(3, n, dtype=torch.float32) if stats else None
    # float16 ends at 6e-8, where a gradient that the upstream one would lift back (a loss scale) is lost.
    unit_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    d_hidden = hidden.new_empty(n, h, dtype=unit_dtype)
    result = HiddenGradient(logp, d_hidden, RowStatistics(*row_stats) if stats else None)
    if n == 0:
        return result
    width = kept_width(v)
    size = plan_rows(n, width * hidden.element_size() * (1 if tile.block_h else 2), tile)
    tiles = triton.cdiv(v, tile.block_v)
    exps = hidden.new_empty(size, width)
    partial = hidden.new_empty(4 if stats else 2, tiles, size, dtype=torch.float32)
    rows, ordered, tiles_of_rows = sort_rows(labels, ignore_index, size)
    for part, y, row_tiles in zip(rows.split(size), ordered.split(size), tiles_of_rows, strict=True):
        chunk = readable(hidden.index_select(0, part))
        count = len(part)
        of_chunk = HeadCall(chunk, weight, y, bias, transform, ignore_index)
        logit, bend, anchor = _exponentials(of_chunk, exps, partial, tile, row_tiles)
        product = matmul_fp32(exps[:count, :v], weight)
        _unit_gradient_kernel[(triton.cdiv(count, 16),)](
            partial, logit, bend, anchor, y, part, product, weight, logp, row_stats, d_hidden,
            count, v, h, tiles, partial.stride(0), n, weight.stride(0), h, ignore_index, slope,
            BLOCK_N=16, BLOCK_H=512, BLOCK_T=64, HAS_SOFTCAP=softcap, STATS=stats, num_warps=8,
        )  # fmt: skip
    return result


@launcher
def linear_logprob_fwd_exps(call: HeadCall, *, memory: Tensor | None = None, stats: bool = False) -> RowExponentials:
    """``logp``, statistics and what `linear_logprob_bwd_exps` needs for the gradients of a trainable head: 2NVH FLOP.

    Keeps V elements per row of hidden's dtype, whose range must not be float16's (the upstream gradient comes later),
    in ``memory`` where that is given (``N * kept_width(V)`` elements or more). No row is ignored; a label outside
    [0, V) gives NaN. No host sync.
    """
    hidden, labels = readable(call.hidden), call.labels.contiguous()
    n, v = hidden.shape[0], call.weight.shape[0]
    weight, bias, softcap, _, _, slope, tile = setup_of(call)
    logp, scale, *_ = results = hidden.new_empty(5 if stats else 2, n, dtype=torch.float32)
    width = kept_width(v)
    exps = (hidden.new_empty(n * width) if memory is None else memory[: n * width]).view(n, width)
    size = n if tile.block_h else plan_rows(n, 4 * v, tile)  # products that are stored keep to SCRATCH_BYTES
    tiles = triton.cdiv(v, tile.block_v)
    partial = hidden.new_empty(4 if stats else 2, tiles, size, dtype=torch.float32)
    no_row = torch.iinfo(torch.int64).min  # nothing is ignored: a label that is wrong gives NaN
    for first in range(0, n, max(size, 1)):
        part = slice(first, min(first + size, n))
        y, out = labels[part], exps[part]
        of_part = HeadCall(hidden[part], weight, y, bias, call.transform, no_row)
        logit, bend, anchor = _exponentials(of_part, out, partial, tile)
        count = len(y)
        _keep_rows_kernel[(triton.cdiv(count, 16),)](
            partial, logit, bend, anchor, y, logp[part], scale[part], results[2:, part] if stats else None, out,
            count, v, tiles, partial.stride(0), n, exps.stride(0), slope,
            BLOCK_N=16, BLOCK_T=128, HAS_SOFTCAP=softcap, STATS=stats,
        )  # fmt: skip
    return RowExponentials(logp, exps[:, :v], scale, RowStatistics(*results[2:]) if stats else None)


def kept_dtype(hidden: Tensor) -> torch.dtype:
    """Of the exponentials that `linear_logprob_fwd_exps` keeps."""
    return hidden.dtype
