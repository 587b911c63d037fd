"""JSONL files: a line appended for each record, and read back."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class HistoryWriter:
    """Appends one JSON object per step to ``history.jsonl``, on disk after every row.

    With ``resume_step`` the rows after that step are dropped first: that work was lost and is done again.
    Without it the file starts empty. NaN and infinity, which JSON has not, are written as null.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        path = Path(path)
        kept = [] if resume_step is None or not path.exists() else read_history(path)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(_json_line(row) for row in kept if row["step"] <= (resume_step or 0))
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open for the writer's life

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(_json_line(row))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> HistoryWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a history file; a last line cut short by a kill is left out."""
    rows = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for k, line in enumerate(lines):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if k < len(lines) - 1:
                raise
    return rows


def _json_line(row: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"
