"""Optimisers by the names of TRL and transformers, built by the libraries that own them."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import nn

from ..config.options import PowerFlowConfig
from ..errors import ConfigError

_BITSANDBYTES = {
    "adamw_bnb_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW",
    "paged_adamw_8bit": "PagedAdamW8bit",
}


def make_optimizer(
    trained: list[nn.Parameter], log_z_head: nn.Module | None, config: PowerFlowConfig, device: torch.device
) -> torch.optim.Optimizer:
    """``config.optim`` over the policy's parameters and, in a group of its own, the log Z' head's.

    The head's group has ``log_z_learning_rate`` and no weight decay. ConfigError names the package that is missing.
    """
    groups = [{"params": trained, "lr": config.learning_rate, "weight_decay": config.weight_decay}]
    if log_z_head is not None:
        groups.append({"params": list(log_z_head.parameters()), "lr": config.log_z_learning_rate, "weight_decay": 0.0})
    options: dict[str, Any] = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    name = config.optim
    if name == "auto":
        name = "adamw_torch_fused" if device.type == "cuda" else "adamw_torch"
    if name not in _BITSANDBYTES:
        return torch.optim.AdamW(groups, fused=name == "adamw_torch_fused", **options)
    try:
        library = importlib.import_module("bitsandbytes.optim")
    except ImportError as error:
        raise ConfigError(
            f"PowerFlowConfig: optim={name!r} needs bitsandbytes ({error}); run: pip install bitsandbytes, or set "
            "optim='adamw_torch_fused'"
        ) from error
    return getattr(library, _BITSANDBYTES[name])(groups, **options)
