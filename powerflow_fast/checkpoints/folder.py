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
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..tools.files import disk_full
from ..version import __version__

logger = logging.getLogger(__name__)

SCHEMA = 1
_MANIFEST = "manifest.json"
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
