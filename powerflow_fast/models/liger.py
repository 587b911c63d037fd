"""Liger's RMSNorm, RoPE and SwiGLU on the policy and the base model, taken back after the run.

Its cross entropy and fused linear cross entropy stay off: log-probs here come from ``linear_logprobs``. Norms and MLPs
are patched on the instance; Liger replaces RoPE in the module of transformers that the model's class comes from, for
every model of that class, and only while a run is on.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from ..errors import BackendUnavailableError
from .adapters import unwrap_peft

logger = logging.getLogger(__name__)

_WANTED = ("rms_norm", "rope", "swiglu")
_MISSING = object()


def apply_liger(
    models: list[nn.Module], mode: Literal["auto", "on", "off"], device: torch.device
) -> Callable[[], None]:
    """Patch ``models`` (plain or PEFT) and return what undoes it; :class:`BackendUnavailableError` if "on" cannot be.

    "auto" leaves the models as they are where Liger cannot run, and logs why.
    """
    if mode == "off":
        return lambda: None
    reason, library = _library(models[0], device)
    if library is None:
        if mode == "on":
            raise BackendUnavailableError(f"use_liger_kernel='on' cannot be: {reason}; set it to 'off' or 'auto'")
        logger.info("use_liger_kernel='auto' is off: %s", reason)
        return lambda: None
    undo: list[tuple[dict[str, Any], str, Any]] = []
    for model in {id(unwrap_peft(m)): unwrap_peft(m) for m in models}.values():
        places = [vars(module) for module in model.modules()]
        places.append(vars(sys.modules[type(model).__module__]))
        before = [dict(place) for place in places]
        accepted = inspect.signature(library.MODEL_TYPE_TO_APPLY_LIGER_FN[model.config.model_type]).parameters
        # Whatever else it can do (losses, other norms, experts) stays off.
        flags = {
            name: name in _WANTED for name, p in accepted.items() if name != "model" and isinstance(p.default, bool)
        }
        library._apply_liger_kernel_to_instance(model, **flags)
        for place, old in zip(places, before, strict=True):
            for key in place.keys() | old.keys():
                if place.get(key, _MISSING) is not old.get(key, _MISSING):
                    undo.append((place, key, old.get(key, _MISSING)))

    def take_back() -> None:
        for place, key, old in reversed(undo):
            if old is _MISSING:
                place.pop(key, None)
            else:
                place[key] = old
        undo.clear()

    return take_back


def _library(model: nn.Module, device: torch.device) -> tuple[str, Any]:
    """Why Liger cannot patch ``model`` on ``device`` and None, or "" and its module."""
    if device.type != "cuda":
        return f"its kernels need CUDA, the model is on {device}", None
    try:
        library = importlib.import_module("liger_kernel.transformers.monkey_patch")
    except ImportError as error:
        return f"liger-kernel cannot be imported ({error}); run: pip install liger-kernel", None
    kind = unwrap_peft(model).config.model_type
    if kind not in library.MODEL_TYPE_TO_APPLY_LIGER_FN:
        return f"liger-kernel has no kernels for model type {kind!r}", None
    return "", library
