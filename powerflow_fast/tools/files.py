"""What every file of a run needs: a full disk told apart from other errors, and numbers that JSON has."""

from __future__ import annotations

import errno
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_FULL = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the limit on the size of a file is reached",
}


def disk_full(error: Exception, folder: Path) -> str | None:
    """Which disk is full and what it has left, where that is what ``error`` says; None for another error.

    A quota and a limit on the size of a file count as well. safetensors reports an I/O error as text.
    """
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])
    if number not in _FULL:
        return None
    disk = folder.resolve()
    while not disk.is_mount():
        disk = disk.parent
    usage = shutil.disk_usage(folder)
    return (
        f"{_FULL[number]} on the disk that holds {folder.resolve()} (mounted at {disk}, {usage.total / 2**20:.1f} MiB)"
        f": {usage.free} bytes ({usage.free / 2**20:.1f} MiB) free"
    )


def finite_or_none(value: Any) -> Any:
    """``value`` with None for NaN and infinity, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite_or_none(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(v) for v in value]
    return value
