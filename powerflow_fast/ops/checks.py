"""The checks of arguments that every backend relies on.

Shapes, dtypes and Python numbers are checked always: they cost nothing. The *values* of a tensor are checked only on a
CPU, because looking at them on a GPU would make the host wait for the device; there, a label outside the vocabulary
gives NaN instead of a wrong number.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..kernels.interface import HeadCall, LogitTransform

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def values_are_readable(tensor: Tensor) -> bool:
    """Reading a tensor's values makes the host wait for a GPU, and splits a graph that is being compiled."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def require_tensor(
    op: str, name: str, value: object, *, shape: tuple[int, ...], symbols: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.shape != shape:
        raise ValueError(f"{op}: {name} must have shape {symbols}={shape}, got {tuple(value.shape)}")
    if value.dtype not in dtypes:
        expected = " or ".join(str(d) for d in dtypes)
        raise TypeError(f"{op}: {name} must be {expected}, got {value.dtype}")


def require_positive(op: str, name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and > 0, got {value}")
    return float(value)


def check_head(op: str, call: HeadCall) -> HeadCall:
    """The call with its numbers as plain floats; an error on anything that the kernels cannot take."""
    hidden, weight, labels, bias, transform, ignore_index = call
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int | None):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 2:
            symbols = "(N, H)" if name == "hidden" else "(V, H)"
            raise ValueError(f"{op}: {name} must have two dimensions {symbols}, got shape {tuple(tensor.shape)}")
    if not hidden.dtype.is_floating_point or hidden.dtype == torch.float8_e4m3fn:
        raise TypeError(f"{op}: hidden must be float32, bfloat16 or float16, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"{op}: weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    (n, h), (v, h_weight) = hidden.shape, weight.shape
    if h_weight != h:
        raise ValueError(f"{op}: weight must have shape (V, H)=({v}, {h}) to match hidden, got {tuple(weight.shape)}")
    if v < 1:
        raise ValueError(f"{op}: weight must have at least one row (V >= 1), got {tuple(weight.shape)}")
    require_tensor(op, "labels", labels, shape=(n,), symbols="(N,)", dtypes=(torch.int64,))
    if bias is not None:
        dtypes = (*FLOAT_DTYPES, torch.float64)
        require_tensor(op, "bias", bias, shape=(v,), symbols="(V,)", dtypes=dtypes)
    for name, tensor in (("weight", weight), ("labels", labels), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{op}: {name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if values_are_readable(labels) and n:
        wrong = (labels < 0) | (labels >= v)
        if ignore_index is not None:
            wrong &= labels != ignore_index
        if wrong.any():
            row = int(wrong.nonzero()[0])
            ignored = "" if ignore_index is None else f" or equal ignore_index={ignore_index}"
            raise ValueError(f"{op}: labels must lie in [0, V)=[0, {v}){ignored}, got labels[{row}]={int(labels[row])}")
    softcap = transform.logit_softcap
    transform = LogitTransform(
        require_positive(op, "temperature", transform.temperature),
        require_positive(op, "logit_scale", transform.logit_scale),
        None if softcap is None else require_positive(op, "logit_softcap", softcap),
    )
    return HeadCall(hidden, weight, labels, bias, transform, ignore_index)


def check_cache_bytes(op: str, cache_bytes: int | None) -> None:
    if cache_bytes is None:
        return
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
        raise TypeError(f"{op}: cache_bytes must be an int, got {type(cache_bytes).__name__}")
    if cache_bytes < 0:
        raise ValueError(f"{op}: cache_bytes must be >= 0, got {cache_bytes}")


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Inside ``torch.autocast`` a head takes part as ``torch.nn.Linear`` does: its operands in the autocast dtype."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # the check that follows names it
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


ImportanceLevel = Literal["sequence", "length_normalized"]


def check_clip(op: str, clip: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in clip)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: clip must be two numbers (low, high), got {clip!r}") from None
    if not (0 <= low <= 1 <= high < math.inf):
        raise ValueError(f"{op}: clip must satisfy 0 <= low <= 1 <= high < inf, got {clip!r}")
    return low, high
