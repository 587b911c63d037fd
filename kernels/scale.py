"""A gradient that was made before its upstream factor was known, times that factor."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launcher, num_sms


@triton.jit(do_not_specialize=["COUNT"])
def _scale_kernel(p_x, p_factor, o_x, COUNT, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr):
    """``o_x = x * factor``, rounded once. In place, a factor of 1 leaves nothing to do: a loss that nobody scales
    costs a launch, and not a pass over a head's gradient."""
    factor = tl.load(p_factor).to(tl.float32)
    if IN_PLACE:  # noqa: SIM102  (decided by the compiler, the other by the device)
        if factor == 1.0:
            return
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK, COUNT, tl.num_programs(0) * BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = tl.load(p_x + i, mask=i < COUNT).to(tl.float32)
        tl.store(o_x + i, (x * factor).to(o_x.dtype.element_ty), mask=i < COUNT)


@launcher
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x * factor).to(dtype)`` for a contiguous ``x`` and a ``factor`` () on its device: in x's own memory where that
    has the dtype. Reads and writes x once; nothing where ``factor`` is 1 and the dtype x's. No host sync."""
    out = x if x.dtype == dtype else torch.empty_like(x, dtype=dtype)
    block = 4096
    grid = (max(1, min(triton.cdiv(x.numel(), block), 8 * num_sms(x.device))),)
    _scale_kernel[grid](x, factor, out, x.numel(), BLOCK=block, IN_PLACE=out is x, num_warps=8)
    return out
