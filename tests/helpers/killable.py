"""A run for a process that will be killed.

Importing this makes a short run, so that processes forked later have all modules that are imported on the way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from runs import run


def train_to_the_end(folder: str, name: str, resume: bool | None, steps: int, leash=None) -> None:
    """With a semaphore as `leash`, each step is followed by a wait for one of its permits."""
    torch.set_num_threads(1)  # a fork has one thread, whatever the pool of its parent
    run(
        Path(folder),
        name=name,
        resume_from_checkpoint=resume,
        max_steps=steps,
        save_steps=1,
        num_iterations=2,
        num_sample_prompts=1,
        save_total_limit=2,
        callbacks=[lambda report: not leash.acquire()] if leash else [],
    )


def _warm_up() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_to_the_end(folder, "warm-up", None, 1)


_warm_up()
