"""What a finished run leaves in its folder: the model with its card, the log Z head, samples, a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from . import report
from .checkpoint import git_commit
from .config import PowerFlowConfig
from .models import save_model
from .plots import plot_history

__all__ = ["write_results"]

_CARD_METRICS = ("entropy", "policy_logp", "base_logp", "length", "delta_abs")


def write_results(
    output_dir: Path,
    model: nn.Module,
    tokenizer: Any,
    history: list[dict[str, float]],
    *,
    samples: tuple[list[report.Sample], list[report.Sample]],
    weights: dict[str, Tensor] | None,
    log_z_weights: dict[str, Tensor] | None,
    alpha: float,
    base_model: str,
    data_description: str,
    config: PowerFlowConfig,
) -> None:
    """Write ``model/``, ``log_z_head.safetensors``, ``samples.md`` and ``history.png``; by one process.

    ``samples`` are those before and after training; ``weights`` the model's where they are sharded in it.
    """
    # A skipped step has no finite numbers, or too few of them.
    needed = ("loss", *_CARD_METRICS)
    steps = [row for row in history if all(isinstance(row.get(k), float) and math.isfinite(row[k]) for k in needed)]
    save_model(model, tokenizer, output_dir, state_dict=weights)
    if log_z_weights is not None:
        save_file(log_z_weights, output_dir / "log_z_head.safetensors")
    report.write_model_card(
        output_dir / "model",
        alpha=alpha,
        base_model=base_model,
        data_description=data_description,
        config=config.to_dict(),
        commit=git_commit(),
        metrics=[(name, steps[0][name], steps[-1][name]) for name in _CARD_METRICS] if steps else [],
    )
    report.write_samples(output_dir / "samples.md", *samples)
    if steps:
        plot_history(steps, output_dir / "history.png", alpha=alpha, max_completion_length=config.max_completion_length)
