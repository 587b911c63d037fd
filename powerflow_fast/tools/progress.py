"""One line on the terminal that is kept up to date."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO


class ProgressLine:
    """Progress of a run on one line of a terminal, rewritten in place; elsewhere at most one line per minute or 5 %."""

    def __init__(self, total: int, *, first: int = 0, stream: TextIO | None = None):
        self.stream = stream or sys.stderr
        self.total, self.first = total, first
        self.live = self.stream.isatty()
        self._started = time.monotonic()
        self._printed: tuple[int, float] | None = None  # step and time of the last plain line
        self._shown = ""

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Show ``metrics`` (names as in :data:`METRICS`; absent ones are left out)."""
        step, now = metrics["step"], time.monotonic()
        done, left = step - self.first, self.total - step
        eta = _duration((now - self._started) / done * left) if done > 0 else "?"
        parts = [f"step {step:>{len(str(self.total))}}/{self.total}"]
        for name, label, spec in (
            ("loss", "loss", ".4g"),
            ("alpha", "α", ".3g"),
            ("delta_abs", "|δ|", ".3f"),
            ("log_z", "log Z", ".3f"),
            ("reward", "reward", ".3f"),
            ("length", "length", ".1f"),
            ("tokens_per_second", "tok/s", ".0f"),
            ("mfu", "MFU", ".0%"),
        ):
            if metrics.get(name) is not None:
                parts.append(f"{label} {metrics[name]:{spec}}")
        if "share/update" in metrics:
            shares = "/".join(f"{100 * metrics[f'share/{name}']:.0f}" for name in ("rollout", "score", "update"))
            parts.append(f"roll/score/upd {shares}%")
        line = " | ".join([*parts, f"ETA {eta}" if left > 0 else _duration(now - self._started)])
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            self._shown = line if len(line) <= width else line[: width - 3] + "..."
            self._write(f"\r\x1b[2K{self._shown}")
        elif (
            self._printed is None
            or left <= 0
            or step - self._printed[0] >= max(self.total / 20, 1)
            or now - self._printed[1] >= 60
        ):
            self._printed = (step, now)
            self._write(line + "\n")

    def note(self, text: str) -> None:
        """Print ``text`` on a line of its own, above the live line."""
        self._write(f"\r\x1b[2K{text}\n{self._shown}" if self.live else text + "\n")

    def close(self) -> None:
        """End the live line, so that what is printed next starts on a fresh one."""
        if self._shown:
            self._write("\n")
            self._shown = ""

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, text: str) -> None:
        encoding = self.stream.encoding or "utf-8"
        try:
            text.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace("δ", "delta").replace("α", "alpha").encode(encoding, "replace").decode(encoding)
        self.stream.write(text)
        self.stream.flush()


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
