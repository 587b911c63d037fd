"""Loads the compiled ops (``powerflow_fast._C``) and says what they can do here, or why they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from typing import NamedTuple

import torch  # noqa: F401  (its libraries must be loaded before the extension's)

_MODULE = "powerflow_fast._C"
_REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps <source folder of powerflow_fast>"


class ExtensionStatus(NamedTuple):
    """What :func:`extension_status` found."""

    available: bool
    """The CPU op is loaded."""
    cuda: bool
    """The library also holds the CUDA op."""
    reason: str
    """What was built, or why there is no extension or no CUDA op and how to get it."""


def _load() -> ExtensionStatus:
    if importlib.util.find_spec(_MODULE) is None:
        return ExtensionStatus(
            False, False, f"{_MODULE} wasn't built (no torch or no C++ compiler at installation). Build it: {_REBUILD}"
        )
    try:
        archs = importlib.import_module(_MODULE).cuda_archs
    except ImportError as error:
        return ExtensionStatus(
            False, False, f"{_MODULE} is installed but can't be loaded ({error}). Rebuild it: {_REBUILD}"
        )
    if not archs:
        return ExtensionStatus(True, False, f"built for CPU only (no nvcc at installation). For CUDA: {_REBUILD}")
    return ExtensionStatus(True, True, f"built for CPU and CUDA ({', '.join(f'sm_{a}' for a in archs.split(';'))})")


_STATUS = _load()


def extension_status() -> ExtensionStatus:
    """Whether the compiled LA-TB op is loaded, whether it holds CUDA code, and why where it doesn't."""
    return _STATUS
