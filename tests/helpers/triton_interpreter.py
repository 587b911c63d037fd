"""Repairs of Triton's CPU interpreter, which up to 3.9 computes with the raw bits of bfloat16 values.

The interpreter stores bfloat16 as uint16. It then adds, multiplies and compares those integers, multiplies them in
``tl.dot``, and drops the low half when it converts from float32. ``install`` makes each of these act on values:
bfloat16 operands are widened to float32, which is exact, and results are rounded to nearest, ties to even.

``tl.dot`` besides sums in float64 and rounds once. A BLAS product in float32 depends on where in the tile a row lies,
a tensor core's does not, and kernels that form the same logits twice rely on that.
"""

from __future__ import annotations

import importlib.util

import numpy as np


def widen(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 bit patterns."""
    return (np.asarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns of float32 values, rounded to nearest, ties to even; any NaN becomes the quiet one."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))


def install() -> None:
    """Patch the interpreter of this process's triton, once, where triton is installed. Needs TRITON_INTERPRET=1."""
    if importlib.util.find_spec("triton") is None:
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder as Builder
    from triton.runtime.interpreter import TensorHandle

    if getattr(Builder, "computes_bfloat16", False):
        return
    Builder.computes_bfloat16 = True
    np.seterr(divide="ignore", invalid="ignore", over="ignore")  # inf and NaN are ordinary values to a GPU
    bf16, fp32 = tl.bfloat16, tl.float32
    cast_impl, create_fp_to_fp, create_dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot
    binary_op = Builder.binary_op

    def as_fp64(handle):
        return TensorHandle((as_fp32(handle) if is_bf16(handle) else handle).data.astype(np.float64), tl.float64)

    def as_fp32(handle):
        return TensorHandle(widen(np.ascontiguousarray(handle.data)).reshape(handle.data.shape), fp32)

    def as_bf16(values):
        return TensorHandle(narrow(np.ascontiguousarray(values)).reshape(values.shape), bf16)

    def is_bf16(handle):
        return handle.dtype.scalar == bf16

    def convert(builtin):
        def converted(self, src, dst_type, *rounding_mode):
            if is_bf16(src) and dst_type.scalar == fp32:
                return as_fp32(src)
            if src.dtype.scalar == fp32 and dst_type.scalar == bf16:
                return as_bf16(src.data)
            return builtin(self, src, dst_type, *rounding_mode)

        return converted

    def dot(self, a, b, d, *precision):
        exact = create_dot(self, as_fp64(a), as_fp64(b), as_fp64(d), *precision)
        return TensorHandle(exact.data.astype(d.data.dtype), d.dtype.scalar)

    def on_values(self, lhs, rhs, op):
        if not is_bf16(lhs):
            return binary_op(self, lhs, rhs, op)
        result = op(as_fp32(lhs).data, as_fp32(rhs).data)
        return TensorHandle(result, tl.int1) if result.dtype == bool else as_bf16(result)

    Builder.cast_impl, Builder.create_fp_to_fp = convert(cast_impl), convert(create_fp_to_fp)
    Builder.create_dot, Builder.binary_op = dot, on_values
