"""Checkpoints as folders of safetensors and JSON: written whole or not at all, verified when read, never pickled.

A checkpoint is built in a hidden sibling folder, flushed to disk, and renamed into place, so a process killed at any
moment leaves the previous one readable. Only one process writes to an output folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import CheckpointError, OutputDirError
from .models.sharding import laid_out_as
from .tools.files import disk_full
from .tools.provenance import git_commit
from .version import __version__

logger = logging.getLogger(__name__)

SCHEMA = 1
_MANIFEST = "manifest.json"
# What a run writes into its folder, besides run.json.
_OURS = ("model", "adapter", "checkpoint-*", "history.*", "samples*", "completions.jsonl", "log_z_head.safetensors")
_STATE = "state.json"


# "checkpoint-7.old" exists only between the two renames that replace an existing checkpoint-7.
_NAME = re.compile(r"checkpoint-(\d+)(\.old)?")


class Checkpoint(NamedTuple):
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def save_checkpoint(path: str | Path, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
    """Write ``{group: {name: tensor}}`` and JSON ``state`` to the folder ``path`` (``checkpoint-<step>``), atomically.

    One ``<group>.safetensors`` per group. Names that share one tensor (tied weights) are stored once and share it again
    when loaded; views are copied. On a full disk :class:`CheckpointError` names it, and earlier checkpoints stay.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    manifest: dict[str, Any] = {"schema": SCHEMA, "version": __version__, "files": {}, "aliases": {}}
    state_text = json.dumps(state, indent=1)
    try:
        _clean(path.parent)
        temporary.mkdir(parents=True)
        for group, named in tensors.items():
            if not re.fullmatch(r"[A-Za-z0-9_.-]+", group):
                raise CheckpointError(f"save_checkpoint: group name {group!r} is no file name")
            unique, manifest["aliases"][group] = _untie(named)
            file = temporary / f"{group}.safetensors"
            save_file(unique, file, metadata={"format": "pt"})
            if file.stat().st_size < sum(tensor.nbytes for tensor in unique.values()):
                raise OSError(errno.ENOSPC, "a file came out shorter than what was written to it", str(file))
        (temporary / _STATE).write_text(state_text, encoding="utf-8")
        for file in sorted(temporary.iterdir()):
            manifest["files"][file.name] = {"size": file.stat().st_size, "sha256": _sha256(file)}
        (temporary / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _fsync(file)
        _fsync(temporary)
        if path.exists():
            old = path.with_name(f"{path.name}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
        _fsync(path.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = disk_full(error, path.parent)
        if reason is None:
            raise CheckpointError(f"{path}: cannot save the checkpoint: {error}") from error
        needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
        raise CheckpointError(
            f"{path}: {reason}, {needed / 2**20:.1f} MiB needed. Earlier checkpoints are kept; free some space or set "
            "save_total_limit"
        ) from error
    return path


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint to CPU tensors after verifying that every file is there with its size and SHA-256."""
    path = Path(path)
    manifest = _manifest(path)
    for name, expected in manifest["files"].items():
        if _sha256(path / name) != expected["sha256"]:
            raise CheckpointError(f"{path / name}: damaged (its SHA-256 has changed); use another checkpoint")
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = {group: load_file(path / f"{group}.safetensors") for group in manifest["aliases"]}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot read: {error}") from error
    for group, aliases in manifest["aliases"].items():
        for name, target in aliases.items():
            tensors[group][name] = tensors[group][target]
    return Checkpoint(tensors, state)


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint with the highest step in ``output_dir``, or None."""
    complete = _complete(output_dir, on_damage=logger.warning)
    return complete[-1] if complete else None


def checkpoint_step(path: str | Path) -> int | None:
    """The step in a checkpoint folder's name, or None for another name."""
    match = _NAME.fullmatch(Path(path).name)
    return int(match[1]) if match else None


def rotate(output_dir: str | Path, limit: int | None) -> None:
    """Delete all but the newest ``limit`` complete checkpoints (at least one is kept); None keeps all."""
    if limit is None:
        return
    for path in _complete(output_dir)[: -max(limit, 1)]:
        # Renamed first: a process killed while deleting must not leave half a checkpoint under its name.
        doomed = path.with_name(f".{path.name}.tmp")
        path.rename(doomed)
        shutil.rmtree(doomed)


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


def prepare_output_dir(path: str | Path, *, run_record: Mapping[str, Any], resume: bool) -> Path:
    """Create ``path``, claim it for one run by writing ``run.json``, and return it.

    ``run.json`` holds ``run_record`` (the config), the version and commit of powerflow_fast, and the start time;
    resuming adds an entry to its ``resumed`` list. :class:`OutputDirError` if the folder is not writable, or holds a
    run and ``resume`` is False.
    """
    path = Path(path)
    record_file = path / "run.json"
    now = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "commit": git_commit(),
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        taken = [] if record_file.exists() else sorted(p.name for name in _OURS for p in path.glob(name))
        if taken:
            raise OutputDirError(
                f"output_dir {path} holds {', '.join(taken[:3])}, which no run of powerflow_fast put there and which "
                "this run would replace; choose another output_dir"
            )
        if record_file.exists() and not resume:
            newest = latest_checkpoint(path)
            raise OutputDirError(
                f"output_dir {path} already holds a run (newest checkpoint: {newest.name if newest else 'none'}). "
                "Choose another output_dir, or continue that run with resume_from_checkpoint=True"
            )
        if record_file.exists():
            record = json.loads(record_file.read_text(encoding="utf-8"))
            record.setdefault("resumed", []).append(now)
        else:
            record = {**run_record, "started": now}
        temporary = path / ".run.json.tmp"
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
        temporary.replace(record_file)
    except OutputDirError:
        raise
    except OSError as error:
        raise OutputDirError(f"output_dir {path} is not writable: {error.strerror or error}") from error
    except ValueError as error:
        raise OutputDirError(f"{record_file}: not valid JSON: {error}; choose another output_dir") from error
    return path


def _untie(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """CPU tensors that own their memory, and ``{name: name of the identical tensor stored}`` for tied ones."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    storages = set()
    for name, tensor in named.items():
        tensor = tensor.detach()
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        own = tensor.cpu().contiguous()
        storage = own.untyped_storage()
        # safetensors refuses tensors that share memory, and would store all of a storage for a view into it.
        if storage.data_ptr() in storages or storage.nbytes() != own.numel() * own.element_size():
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        unique[name] = own
    return unique, aliases


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of ``path``; :class:`CheckpointError` unless all its files are there in full size."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        schema, files = manifest["schema"], manifest["files"]
    except FileNotFoundError:
        raise CheckpointError(f"{path}: incomplete or no checkpoint: {_MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / _MANIFEST}: damaged: {error}") from error
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: has format {schema}, this version reads {SCHEMA}; update powerflow_fast")
    for name, expected in files.items():
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected['size']}"
            raise CheckpointError(f"{path}: incomplete: {name} {found}; use another checkpoint")
    return manifest


def _complete(output_dir: str | Path, *, on_damage: Callable[..., Any] | None = None) -> list[Path]:
    """Complete checkpoints, oldest first; what is wrong with others goes to ``on_damage``."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _NAME.fullmatch(path.name)
        try:
            if match and _manifest(path):
                found.append((int(match[1]), match[2] is None, path))
        except CheckpointError as error:
            if on_damage:
                on_damage("passed over: %s", error)
    return [path for *_, path in sorted(found)]


def _clean(output_dir: Path) -> None:
    """Remove what killed saves and rotations left behind."""
    for path in output_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path)
    for path in output_dir.glob("checkpoint-*.old"):
        if path.with_name(path.name.removesuffix(".old")).exists():
            shutil.rmtree(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sizes(groups: list[list[str]]) -> str:
    return f"{len(groups)} group(s) of {[len(g) for g in groups]} parameters"
