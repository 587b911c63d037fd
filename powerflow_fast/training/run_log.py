"""The files and lines that a run writes while it trains: history, completions, progress line, trackers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.options import PowerFlowConfig
from ..tools import json_lines, progress


class RunLog:
    """Rows of ``history.jsonl`` (also kept in :attr:`history`), of trackers, and of ``completions.jsonl``.

    Only the main process writes; on the others every method does nothing and the history is empty. Of a run that goes
    on, rows after ``first``, the resumed step, are dropped: those steps are made again. ``None`` starts the files anew.
    """

    def __init__(self, output_dir: Path, config: PowerFlowConfig, accelerator: Any, *, total: int, first: int | None):
        self.config, self.accelerator = config, accelerator
        self.history: list[dict[str, float]] = []
        self._files: list[json_lines.HistoryWriter] = []
        if not accelerator.is_main_process:
            return
        self._history_file = self._open(output_dir / "history.jsonl", first)
        self.history = json_lines.read_history(output_dir / "history.jsonl")
        self._progress = progress.ProgressLine(total, first=first or 0)
        self._completions_file = self._open(output_dir / "completions.jsonl", first) if config.log_completions else None

    def _open(self, path: Path, first: int | None) -> json_lines.HistoryWriter:
        self._files.append(json_lines.HistoryWriter(path, resume_step=first))
        return self._files[-1]

    def record(self, step: int, metrics: dict[str, float], *, progress: bool = False) -> None:
        """A row for ``step``; ``progress`` shows it on the progress line too."""
        row = {"step": step, **metrics}
        if self.accelerator.is_main_process:
            self.history.append(row)
            self._history_file.write(row)
            if progress:
                self._progress.update(row)
        self.accelerator.log(metrics, step=step)

    def completions(self, number: int, indices: list[int], texts: list[str]) -> None:
        """What rollout ``number`` drew for the prompts ``indices``, if ``log_completions``."""
        if not self.accelerator.is_main_process or self._completions_file is None:
            return
        step = number * self.config.updates_per_generation + 1  # the first that trains on them
        for j, text in enumerate(texts):
            index = indices[j // self.config.num_generations]
            self._completions_file.write({"step": step, "rollout": number, "prompt_index": index, "text": text})

    def end_progress(self) -> None:
        """End the live line, so that what is printed next starts on a fresh one."""
        if self.accelerator.is_main_process:
            self._progress.close()

    def close(self) -> None:
        """Close files and trackers."""
        self.end_progress()
        for file in self._files:
            file.close()
        for tracker in self.accelerator.trackers:  # end_training would also end the caller's process group
            tracker.finish()
