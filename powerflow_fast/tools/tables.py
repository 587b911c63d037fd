"""Tables as text, and what Markdown would take for markup."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from typing import Any


def format_table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """A text table: columns two spaces apart, numbers (to 4 digits) to the right, other cells to the left."""
    cells = [[cell(c) for c in row] for row in rows]
    numeric = [all(isinstance(row[j], (int, float)) for row in rows) and bool(rows) for j in range(len(header))]
    widths = [max(len(row[j]) for row in [list(header), *cells]) for j in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if right else c.ljust(w) for c, w, right in zip(row, widths, numeric)).rstrip()  # noqa: B905

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *map(line, cells)])


def cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def escaped(text: str) -> str:
    """``text`` shown as it is inside one table cell."""
    escaped = re.sub(r"([\\`*_#\[\]|~$])", r"\\\1", html.escape(text.strip(), quote=False))
    return re.sub(r"\r?\n", "<br>", escaped) or "(empty)"
