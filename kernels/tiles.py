"""On the device: where a tile lies, its logits, and the arithmetic on them."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, where there is no inline assembly
LOG2_E = tl.constexpr(1.4426950408889634)
WITH_LABEL = tl.constexpr(2**16)  # more than a tile has rows
LN_2 = tl.constexpr(0.6931471805599453)
NO_LOGIT = tl.constexpr(-1e20)  # below any logit, for sums of e^z z: 0 times -inf would be no number


@triton.jit
def tile_place(i, blocks_n, blocks_v, GROUP: tl.constexpr):
    """Row tile and column tile of the i-th tile. GROUP row tiles share a sweep over the columns, so that the tiles in
    flight at one time form a near square of the logits and find most of their operands in L2."""
    first = i // (GROUP * blocks_v) * GROUP
    height = tl.minimum(blocks_n - first, GROUP)
    inside = i % (GROUP * blocks_v)
    return first + inside % height, inside // height


@triton.jit
def tile_origin(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile; `tile_place`."""
    i, j = tile_place(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(V, BLOCK_V), GROUP)
    return i * BLOCK_N, j * BLOCK_V


@triton.jit
def exp2(x):
    """2^x in one instruction on a GPU, where results below 2^-126 are 0. `tl.exp` spends four more on those."""
    if INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def reciprocal(x):
    """1 / x within one unit in the last place on a GPU, for x in its normal range."""
    if INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def rows_with_labels(active, label, col, BLOCK_V: tl.constexpr):
    """How many rows of a tile are active, plus WITH_LABEL for each of them whose label is one of the tile's columns.

    One reduction before the product tells whether a tile is needed and whether it is one of the few with a label.
    """
    here = (label >= col) & (label < col + BLOCK_V)
    return tl.sum(tl.where(active, tl.where(here, WITH_LABEL + 1, 1), 0), axis=0)


@triton.jit
def logit_tile(
    hidden, weight, p_bias, row, col, N, V, H, stride_h, stride_w, pre,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of `softcapped` logits in float32, whose factor is `logit_scale`, and ``(dz/du) / slope`` (1 without a
    softcap). Rows and columns outside of the matrices hold some finite value or other where those are finite.

    ``BLOCK_H`` 0: ``hidden`` is the matrix of products.
    """
    u = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    if BLOCK_H == 0:
        n = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        v = tl.minimum(col + tl.arange(0, BLOCK_V), V - 1)
        u = tl.load(hidden + n[:, None] * stride_h + v[None, :])
    elif TMA:
        for k in range(0, H, BLOCK_H):
            u = tl.dot(hidden.load([row, k]), weight.load([col, k]).T, u, input_precision="ieee")
    else:
        n = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        v = tl.minimum(col + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
        i = tl.arange(0, BLOCK_H)
        p_h = hidden + n[:, None] * stride_h + i[None, :]
        p_w = weight + v[None, :] * stride_w + i[:, None]
        for k in range(0, H, BLOCK_H):
            h = tl.load(p_h + k, mask=(i < H - k)[None, :], other=0.0)
            w = tl.load(p_w + k, mask=(i < H - k)[:, None], other=0.0)
            u = tl.dot(h, w, u, input_precision="ieee")
    if HAS_BIAS:
        cols = col + tl.arange(0, BLOCK_V)
        u += tl.load(p_bias + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return softcapped(u, pre, HAS_SOFTCAP)


@triton.jit
def softcapped(u, pre, HAS_SOFTCAP: tl.constexpr):
    """x and ``(dz/du) / slope`` from u, for z = `logit_scale` x: tanh(pre u), or u itself without a softcap.

    tanh is ``(1 - e) / (1 + e)`` with ``e = exp(-2|x|)``, which neither overflows nor, thanks to the series near 0,
    cancels; its derivative is ``4 e / (1 + e)^2``.
    """
    if HAS_SOFTCAP:
        x = u * pre
        e = exp2(tl.abs(x) * (-2.0 * LOG2_E))
        r = reciprocal(1.0 + e)
        q = x * x
        near = x * (1.0 - q * (0.33333334 - q * (0.13333334 - q * (0.053968254 - q * 0.021869488))))
        far = (1.0 - e) * r
        far = tl.where(x < 0, -far, far)
        return tl.where(q < 0.0625, near, far), 4.0 * e * r * r
    else:
        return u, 1.0


@triton.jit
def logit_scale(pre, post, HAS_SOFTCAP: tl.constexpr):
    """The factor, above 0, that makes `softcapped` a logit."""
    return post if HAS_SOFTCAP else pre


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1] to float32 accuracy: ``2 atanh(x / (2 + x))`` as a series."""
    s = x / (2.0 + x)
    q = s * s
    p = 0.11111111 + q * (0.09090909 + q * (0.07692308 + q * 0.06666667))
    p = 1.0 + q * (0.33333334 + q * (0.2 + q * (0.14285715 + q * p)))
    return 2.0 * s * p
