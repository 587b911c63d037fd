"""Which backend runs an operation, and the checks that every backend relies on.

Shapes, dtypes and Python numbers are checked always: they cost nothing. The *values* of a tensor are checked only on a
CPU, because looking at them on a GPU would make the host wait for the device; there, a label outside the vocabulary
gives NaN instead of a wrong number.
"""

from __future__ import annotations

import functools
import importlib
import math
from typing import Literal

import torch
from torch import Tensor

from .errors import BackendUnavailableError
from .kernels.interface import LogitTransform

Backend = Literal["auto", "torch", "triton"]
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _triton_state() -> tuple[bool, bool, str]:
    """(importable, runs in its interpreter, reason when it is not importable)."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return False, False, f"triton cannot be imported ({error})"
    return True, bool(triton.knobs.runtime.interpret), ""


def supported(backend: Literal["torch", "triton"], device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether ``backend`` can run on ``device`` with ``dtype``, and why not."""
    if dtype not in FLOAT_DTYPES and not (backend == "torch" and dtype == torch.float64):
        return False, f"the {backend} backend takes float32, bfloat16 or float16, got {dtype}"
    if backend == "torch":
        return True, ""
    importable, interpreted, reason = _triton_state()
    if not importable:
        return False, reason
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return False, f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"
        return True, ""
    if device.type == "cpu" and interpreted:
        return True, ""
    return False, (
        f"the Triton kernels need a CUDA tensor, got one on {device}; on a CPU they run only in Triton's interpreter, "
        "which must be switched on (TRITON_INTERPRET=1) before triton is first imported"
    )


def resolve_backend(backend: Backend, device: torch.device, dtype: torch.dtype) -> Literal["torch", "triton"]:
    """``auto``: Triton on a CUDA device that supports it, else torch. A backend asked for by name runs or raises."""
    if backend == "auto":
        # The interpreter is for tests: nobody who leaves the choice to us wants it.
        return "triton" if device.type == "cuda" and supported("triton", device, dtype)[0] else "torch"
    if backend not in ("torch", "triton"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    ok, reason = supported(backend, device, dtype)
    if not ok:
        raise BackendUnavailableError(f"backend={backend!r} cannot run here: {reason}")
    return backend


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


def check_linear_inputs(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int | None,
) -> LogitTransform:
    """Raise on anything the kernels cannot take; return the transform as plain floats. None: no row is ignored."""
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
    return LogitTransform(
        require_positive(op, "temperature", transform.temperature),
        require_positive(op, "logit_scale", transform.logit_scale),
        None if softcap is None else require_positive(op, "logit_softcap", softcap),
    )
