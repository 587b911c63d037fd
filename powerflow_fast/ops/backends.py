"""Which backend runs, why another one cannot, and the launchers of each."""

from __future__ import annotations

import functools
import importlib
from typing import Literal

import torch
from torch import Tensor

from ..errors import BackendUnavailableError
from ..kernels.interface import HeadBackend
from . import torch_backend
from .checks import FLOAT_DTYPES

Backend = Literal["auto", "torch", "triton"]


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


def implementation_for(backend: Backend, hidden: Tensor) -> HeadBackend:
    """The backend that will run, as a module of its passes."""
    if resolve_backend(backend, hidden.device, hidden.dtype) == "torch":
        return torch_backend
    from ..kernels import backend as triton_backend  # needs triton

    return triton_backend
