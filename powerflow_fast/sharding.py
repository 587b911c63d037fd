"""FSDP2: weights, gradients and optimiser state of the policy sharded over the processes, by torch's ``fully_shard``.

The policy's own forward gathers what it needs, layer by layer. What goes past it (generation, a callback that
evaluates) runs inside :func:`gathered`. Checkpoints hold whole tensors, so that they resume on any number of processes,
sharded or not: :func:`whole` makes them, :func:`laid_out_as` cuts them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .config import PowerFlowConfig
from .errors import ConfigError
from .heads import unwrap_peft
from .packing import pad_batch

__all__ = ["check_sharding", "gathered", "laid_out_as", "shard", "whole", "whole_number"]


def shard(policy: nn.Module, model: nn.Module, device: torch.device) -> None:
    """Shard ``policy``, the root, in place: one group per transformer block of ``model``, one for the rest of it.

    The head's weight belongs to the root's group.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lm = unwrap_peft(model)
    names = set(getattr(lm, "_no_split_modules", None) or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(f"fsdp=True: {type(lm).__name__} doesn't name its blocks (_no_split_modules)")
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # The root too: between forward and backward passes a parameter is its shard, for whoever changes or saves it.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    with torch.no_grad():  # whichever module runs first takes itself for the root: it must be the policy
        policy(pad_batch([[0]], [[0]], 0).to(device), temperature=1.0)


def _shards(policy: nn.Module) -> list[nn.Module]:
    """The sharded groups' modules, the root first."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def check_sharding(config: PowerFlowConfig, world: int) -> None:
    if world == 1:
        raise ConfigError("fsdp=True shards over several processes, and this is one: start it with torchrun")
    if config.use_peft:
        raise ConfigError("fsdp=True shards full fine-tuning; LoRA runs without it, on as many devices")


def whole_number(value: Tensor) -> float:
    return float(whole({"": value})[""])


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """All weights whole on every process; all of them must enter, inside they are free to do different things."""
    shards = _shards(policy)
    for module in shards:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in shards:
            module.reshard()
            module.set_reshard_after_forward(True, recurse=False)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with the sharded ones gathered; every process must call it with the same names."""
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def laid_out_as(value: Tensor, like: Tensor) -> Tensor:
    """``value``, the same on every process, sharded as ``like`` is if it is and they have one shape."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
