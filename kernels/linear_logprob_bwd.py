"""Gradients of the log-probabilities of a linear head, from recomputed logits.

The [N, V] gradient of the logits never exists as a whole. It is formed for one slice of the vocabulary at a time, for
all rows: a slice yields its rows of d_weight and d_bias at once and for good, and adds to d_hidden, whose float32 sum
is far smaller than one of d_weight would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .active_tiles import active_tiles
from .hopper_choice import hopper_tiles_for
from .interface import ForwardOutput, HeadCall, HeadSums, RowExponentials
from .launch import (
    add_matmul_fp32_,
    launcher,
    matmul_fp32,
    num_sms,
    operands,
    plan_columns,
    readable,
    setup_of,
)
from .tiles import LOG2_E, WITH_LABEL, exp2, logit_scale, logit_tile, rows_with_labels, tile_origin


@triton.jit(do_not_specialize=["N", "first"])
def _logit_gradient_kernel(
    hidden, weight, p_bias, p_label, p_factor, p_max, p_sum, o_grad,
    N, V, H, first, stride_h, stride_w, stride_grad, pre, post,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of the gradient by u, for the vocabulary entries first .. first + V that ``weight`` and ``p_bias`` hold.

    With f the row's factor, c_j = (dz/du)_j / slope, and M, S over the columns other than the label's: ``f c_y`` in the
    label's column and ``-f c_j e^(z_j - M) / S`` in the others. Exactly 0 where f is 0; a tile of such rows alone is
    not computed. 2NVH FLOP; writes NV elements.
    """
    row, col = tile_origin(N, V, BLOCK_N, BLOCK_V, GROUP)
    n = row + tl.arange(0, BLOCK_N)
    factor = tl.load(p_factor + n, mask=n < N, other=0.0)
    label = (tl.load(p_label + n, mask=n < N, other=-1) - first).to(tl.int32)
    rows = rows_with_labels(factor != 0.0, label, col, BLOCK_V)
    inner = tl.arange(0, BLOCK_N)[:, None] * stride_grad + tl.arange(0, BLOCK_V)[None, :]
    out = o_grad + row.to(tl.int64) * stride_grad + col + inner
    inside = (tl.arange(0, BLOCK_N) < N - row)[:, None] & (tl.arange(0, BLOCK_V) < stride_grad - col)[None, :]
    if rows == 0:
        tl.store(out, tl.zeros((BLOCK_N, BLOCK_V), dtype=o_grad.dtype.element_ty), mask=inside)
        return
    x, local = logit_tile(
        hidden, weight, p_bias, row, col, N, V, H, stride_h, stride_w, pre,
        BLOCK_N, BLOCK_V, BLOCK_H, HAS_BIAS, HAS_SOFTCAP, TMA,
    )  # fmt: skip
    scale = logit_scale(pre, post, HAS_SOFTCAP)
    factor = tl.load(p_factor + n, mask=n < N, other=0.0)  # again: registers are scarce during the product
    top = tl.load(p_max + n, mask=factor != 0.0, other=float("inf"))  # e^(z - inf) = 0
    others = -factor / tl.load(p_sum + n, mask=factor != 0.0, other=1.0)
    value = exp2(tl.fma(x, scale * LOG2_E, -(top * LOG2_E)[:, None])) * others[:, None]
    if rows >= WITH_LABEL:
        label = (tl.load(p_label + n, mask=n < N, other=-1) - first).to(tl.int32)
        cols = col + tl.arange(0, BLOCK_V)
        value = tl.where(cols[None, :] == label[:, None], factor[:, None], value)
    tl.store(out, (value * local).to(o_grad.dtype.element_ty), mask=inside)


@launcher
def linear_logprob_bwd(
    call: HeadCall,
    forward: ForwardOutput,
    d_logp: Tensor,
    *,
    need_d_hidden: bool,
    need_d_weight: bool,
    need_d_bias: bool,
    add_to: HeadSums | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """d_hidden (N, H), d_weight (V, H) and d_bias (V,) of ``(logp * d_logp).sum()`` in their inputs' dtypes; None where
    not needed, or where they are added to the float32 sums ``add_to``.

    ``forward`` is what `linear_logprob_fwd` returned for the same inputs, ``d_logp`` is (N,). 2NVH FLOP for the logits
    and 2NVH each for d_hidden and d_weight. The upstream gradient and 1 - p enter the gradient of the logits before
    that is rounded to hidden's dtype, so nothing else is rounded before the products. Rows that are ignored, or whose
    upstream gradient is 0, are left out of the logits where they fill whole tiles. Scratch: SCRATCH_BYTES, and 4NH
    bytes for the sum of d_hidden. Deterministic; no host sync.
    """
    hidden, weight, labels, bias, _, ignore_index = call
    (n, h), v = hidden.shape, weight.shape[0]
    need_d_bias = need_d_bias and bias is not None
    if n == 0:
        return (
            torch.zeros_like(hidden) if need_d_hidden else None,
            torch.zeros_like(weight) if need_d_weight and add_to is None else None,
            torch.zeros_like(bias) if need_d_bias and add_to is None else None,
        )
    hidden, labels = readable(hidden), labels.contiguous()
    weight, bias, softcap, pre, post, slope, tile = setup_of(call)
    factor = torch.where(labels == ignore_index, 0.0, -slope * torch.expm1(forward.logp) * d_logp.float())
    scaled, scale = hidden, None
    if hidden.dtype == torch.float16:  # too short in range for small factors: powers of two go to the N x H side
        scale = torch.ldexp(torch.ones_like(factor), torch.frexp(factor).exponent.clamp(-126, 0))[:, None]
        factor = factor / scale[:, 0]
        scaled = (hidden * scale).to(hidden.dtype) if need_d_weight else hidden
    d_weight = weight.new_empty(v, h) if need_d_weight and add_to is None else None
    d_bias = bias.new_empty(v) if need_d_bias and add_to is None else None
    total = None
    columns = plan_columns(v, n * hidden.element_size(), tile)
    scratch = hidden.new_empty(n, columns)
    hopper = hopper_tiles_for(call)
    tiles = active_tiles((factor != 0.0).to(torch.int32)) if hopper else None
    for first in range(0, v, columns):
        part = slice(first, min(first + columns, v))
        w, grad = weight[part], scratch[:, : part.stop - first]
        if hopper:
            hopper.gradient_tiles(
                hidden, w, labels, factor, tiles, forward.anchor, forward.others_sum, grad, first, pre,
                sms=num_sms(hidden.device),
            )  # fmt: skip
        else:
            a, b, *strides = operands(hidden, w, tile, out=grad)
            _logit_gradient_kernel[(triton.cdiv(n, tile.block_n) * triton.cdiv(len(w), tile.block_v),)](
                a, b, None if bias is None else bias[part],
                labels, factor, forward.anchor, forward.others_sum, grad,
                n, len(w), h, first, *strides, columns, pre, post,
                HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap, **tile.meta(),
            )  # fmt: skip
        if need_d_hidden and total is None:
            total = matmul_fp32(grad, w)
        elif need_d_hidden:
            add_matmul_fp32_(total, grad, w)
        if d_weight is not None:
            torch.mm(grad.t(), scaled, out=d_weight[part])
        elif need_d_weight:
            add_matmul_fp32_(add_to.d_weight[part], grad.t(), scaled, fresh=add_to.fresh)
        if need_d_bias:
            ones = torch.ones_like(scaled[:, :1]) if scale is None else scale.to(grad.dtype)
            if d_bias is not None:
                d_bias[part] = matmul_fp32(grad.t(), ones)[:, 0]
            else:
                add_matmul_fp32_(add_to.d_bias[part, None], grad.t(), ones, fresh=add_to.fresh)
    if add_to is not None:
        add_to.fresh = False
    if total is not None:
        total = (total if scale is None else total * scale).to(hidden.dtype)
    return total, d_weight, d_bias


@launcher
def linear_logprob_bwd_exps(
    hidden: Tensor, weight: Tensor, kept: RowExponentials, d_logp: Tensor, *, need_d_hidden: bool, add_to: HeadSums
) -> Tensor | None:
    """As `linear_logprob_bwd`, from kept exponentials: 2NVH FLOP for each of d_hidden, returned, and d_weight.

    The upstream gradient and the row's scale go to the N x H side of both products, before d_weight's and after
    d_hidden's, so nothing of size [N, V] is written here.
    """
    factor = (-d_logp.float() * kept.scale)[:, None]
    if add_to.d_weight is not None:
        add_matmul_fp32_(add_to.d_weight, kept.exps.t(), (hidden * factor).to(hidden.dtype), fresh=add_to.fresh)
    if add_to.d_bias is not None:
        add_matmul_fp32_(add_to.d_bias[:, None], kept.exps.t(), factor.to(hidden.dtype), fresh=add_to.fresh)
    add_to.fresh = False
    return (matmul_fp32(kept.exps, weight) * factor).to(hidden.dtype) if need_d_hidden else None
