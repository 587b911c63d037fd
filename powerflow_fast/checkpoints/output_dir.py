"""An output folder, claimed for one run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ..errors import OutputDirError
from ..tools.provenance import git_commit
from ..version import __version__
from .folder import latest_checkpoint

# What a run writes into its folder, besides run.json.
_OURS = ("model", "adapter", "checkpoint-*", "history.*", "samples*", "completions.jsonl", "log_z_head.safetensors")


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
