"""FSDP2: weights, gradients and optimiser state of the policy sharded over the processes, by torch's ``fully_shard``.

The policy's own forward gathers what it needs, layer by layer. What goes past it (generation, a callback that
evaluates) runs inside :func:`gathered`. Frozen weights beside a LoRA adapter are sharded like any other. Checkpoints
hold whole tensors, so that they resume on any number of processes, sharded or not: :func:`whole` makes them,
:func:`laid_out_as` cuts them again; :func:`assembled` makes the model that is saved in the end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .adapters import unwrap_peft
from .batches import pad_batch


def shard(policy: nn.Module, model: nn.Module, device: torch.device) -> nn.Module:
    """Shard ``policy``, the root, in place: one group per transformer block of ``model``, one for the rest of it.

    The head's weight belongs to the root's group; the log Z head, whose dtype is its own, is a group of its own.
    Returns ``model`` as a shell, for :func:`assembled`.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    lm = unwrap_peft(model)
    names = set(getattr(lm, "_no_split_modules", None) or ())
    blocks = [module for module in lm.modules() if type(module).__name__ in names]
    if not blocks:
        raise ConfigError(f"fsdp=True: {type(lm).__name__} doesn't name its blocks (_no_split_modules)")
    for name, parameter in policy.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"fsdp=True: expected floating-point weights, got {parameter.dtype} in {name}; load the model without "
                "quantisation, or set fsdp=False"
            )
    trained = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad})
    if len(trained) > 1:
        raise ConfigError(
            f"fsdp=True: expected trained weights of one dtype, got {' and '.join(trained)}; set dtype='float32'"
        )
    # A sharded module refuses to be copied, and saving an adapter merges it into a copy.
    memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    shell = copy.deepcopy(model, memo)
    mesh = init_device_mesh(device.type, (get_world_size(),))
    for module in [*blocks, getattr(policy, "log_z_head", None)]:
        if module is not None:
            fully_shard(module, mesh=mesh)
    # The root too: between forward and backward passes a parameter is its shard, for whoever changes or saves it.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    with torch.no_grad():  # whichever module runs first takes itself for the root: it must be the policy
        policy(pad_batch([[0]], [[0]], 0).to(device), temperature=1.0)
    return shell


def assembled(shell: nn.Module, model: nn.Module, *, keep: bool) -> nn.Module | None:
    """A copy of ``model`` with whole weights in CPU memory; ``shell`` is what :func:`shard` returned for it.

    Every process must call it, for weights are gathered one at a time; only where ``keep`` is True are they kept.
    """
    memo: dict[int, Any] = {}
    for empty, sharded in zip(shell.parameters(), model.parameters(), strict=True):
        weight = whole({"": sharded.detach()})[""]
        if keep:
            memo[id(empty)] = nn.Parameter(weight.cpu(), requires_grad=sharded.requires_grad)
    return copy.deepcopy(shell, memo) if keep else None


def _shards(policy: nn.Module) -> list[nn.Module]:
    """The sharded groups' modules, the root first."""
    if not torch.distributed.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def check_sharding(world: int) -> None:
    if world == 1:
        raise ConfigError("fsdp=True shards over several processes, and this is one: start it with torchrun")


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
