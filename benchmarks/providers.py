"""What all operations share: a provider, and how a peer's package is imported.

A provider that cannot run where it is asked to is listed with its error, never left out.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable

import torch

from powerflow_fast.ops.extension import extension_status


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    ``load(device)`` gives what the operation's steps call; it raises where the provider cannot run. ``passes`` counts
    the [N, V, H] products (2·N·V·H FLOP each) that it executes, by mode for the head, as its source has it; the tests
    count those of the providers that run on a CPU. ``distribution`` is the package whose release the figures belong to.
    """

    name: str
    distribution: str
    load: Callable[[torch.device], Callable[..., object]]
    passes: tuple[int, ...] | Callable[[object, torch.device], tuple[int, ...]] | None = None
    """or what gives them for a case on a device"""
    backend: str | None = None
    warm_whole: bool = False
    """Warming up on a few rows would compile for the wrong shape."""
    own_memory: bool = True
    """What it takes is seen in this process."""

    def passes_of(self, case: object, device: torch.device) -> tuple[int, ...] | None:
        return self.passes(case, device) if callable(self.passes) else self.passes

    @property
    def kind(self) -> str:
        if self.name.startswith("powerflow_fast"):
            return "ours"
        if self.name.startswith("gemm"):
            return "floor"
        return "baseline" if self.name.startswith(("naive", "eager", "generate")) else "peer"


def package(name: str) -> types.ModuleType:
    """A package whose submodules can be imported without running its ``__init__``, which may need what isn't here."""
    if name in sys.modules:
        return sys.modules[name]
    parent, _, leaf = name.rpartition(".")
    if parent:
        path = [f"{folder}/{leaf}" for folder in package(parent).__path__]
    else:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}")
        path = list(spec.submodule_search_locations)
    module = types.ModuleType(name)
    module.__path__ = path
    sys.modules[name] = module
    return module


def whole_package(name: str) -> None:
    """Forget what ``package`` made of ``name``, so that the next import runs its own ``__init__``."""
    for module in [m for m in sys.modules if m == name or m.startswith(name + ".")]:
        del sys.modules[module]


def require_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise RuntimeError(f"its kernels need a CUDA device, this is {device.type}")


def require_compiled_op(device: torch.device) -> None:
    """Our plain-torch fallback of the loss op is no provider: a row named after the op must be the op."""
    status = extension_status()
    if not status.available or (device.type == "cuda" and not status.cuda):
        raise RuntimeError(f"the compiled op is missing here: {status.reason}")
