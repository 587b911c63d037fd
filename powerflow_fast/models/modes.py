"""A model in evaluation mode for a while, and without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule has its own former flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def disable_dropout(model: nn.Module) -> nn.Module:
    """Set every dropout, layer-drop and router-jitter rate in ``model`` to 0, in place, and return it.

    A policy must be scored with the distribution it was sampled from, which has none of these. Modules are changed,
    the saved config is not. Dropout of LoRA layers that are already there goes as well.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():  # rates held as plain numbers, such as attention_dropout
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)
    return model
