"""An optimizer's state as tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.sharding import laid_out_as


def optimizer_to_tensors(
    optimizer: torch.optim.Optimizer, param_names: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State and options of any torch optimizer as flat tensors (its own, not copies) and JSON.

    ``param_names`` maps a stable name to each parameter of the optimizer, e.g. ``dict(model.named_parameters())``.
    Nothing is cast, so :func:`optimizer_from_tensors` restores it bit for bit; ``Optimizer.load_state_dict`` casts
    floating-point state to the parameter's dtype. A wrapper with an ``optimizer`` attribute (accelerate's) is opened.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
    names = {id(p): name for name, p in param_names.items()}
    tensors: dict[str, Tensor] = {}

    def encode(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            tensors[key] = value.detach()
            return {"tensor": key, "cpu": value.device.type == "cpu"}
        if isinstance(value, Mapping):
            return {"dict": [[k, encode(v, f"{key}.{k}")] for k, v in value.items()]}
        if isinstance(value, (list, tuple)):
            kind = "list" if isinstance(value, list) else "tuple"
            return {kind: [encode(v, f"{key}.{i}") for i, v in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise CheckpointError(f"optimizer_to_tensors: cannot store {key}, a {type(value).__name__}")

    groups, state = [], {}
    for i, group in enumerate(optimizer.param_groups):
        members = []
        for p in group["params"]:
            if id(p) not in names:
                raise CheckpointError(f"optimizer_to_tensors: a parameter of shape {tuple(p.shape)} has no name")
            members.append(names[id(p)])
            if p in optimizer.state:
                state[names[id(p)]] = encode(optimizer.state[p], f"state.{names[id(p)]}")
        options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        groups.append({"params": members, "options": encode(options, f"group.{i}")})
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": state}


def optimizer_from_tensors(
    optimizer: torch.optim.Optimizer,
    param_names: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Restore what :func:`optimizer_to_tensors` returned into an optimizer over the same named parameters."""

    optimizer = getattr(optimizer, "optimizer", optimizer)

    def decode(item: Mapping[str, Any], like: Tensor) -> Any:
        if "tensor" in item:
            # Adam keeps its step count on the CPU while its moments live beside the parameter.
            value = tensors[item["tensor"]].to("cpu" if item["cpu"] else like.device, copy=True)
            return laid_out_as(value, like)
        if "dict" in item:
            return {k: decode(v, like) for k, v in item["dict"]}
        if "list" in item:
            return [decode(v, like) for v in item["list"]]
        if "tuple" in item:
            return tuple(decode(v, like) for v in item["tuple"])
        return item["value"]

    names = {id(p): name for name, p in param_names.items()}
    here = [[names.get(id(p)) for p in group["params"]] for group in optimizer.param_groups]
    saved = [group["params"] for group in meta["groups"]]
    if type(optimizer).__name__ != meta["class"] or here != saved:
        raise CheckpointError(
            f"optimizer_from_tensors: the checkpoint is of a {meta['class']} with {_sizes(saved)}, "
            f"this is a {type(optimizer).__name__} with {_sizes(here)}, or their parameters differ in name or order"
        )
    optimizer.state.clear()
    for group, stored in zip(optimizer.param_groups, meta["groups"], strict=True):
        group.update(decode(stored["options"], torch.empty(0)))
        for p in group["params"]:
            if names[id(p)] in meta["state"]:
                optimizer.state[p] = decode(meta["state"][names[id(p)]], p)


def _sizes(groups: list[list[str]]) -> str:
    return f"{len(groups)} group(s) of {[len(g) for g in groups]} parameters"
