"""What a run hands over: reports of its steps, its result, and in its folder model, card, log Z head, samples, plot."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.options import PowerFlowConfig
from ..models.loading import save_model
from ..objectives.registry import OBJECTIVES
from ..report import model_card, samples_page
from ..report.history_plot import plot_history
from ..tools.provenance import git_commit

logger = logging.getLogger(__name__)

_CARD_METRICS = ("entropy", "policy_logp", "base_logp", "length", "delta_abs", "reward")


class StepReport(NamedTuple):
    """What a callback gets after each optimiser step."""

    step: int
    metrics: dict[str, float]
    model: nn.Module


@dataclass(frozen=True)
class TrainResult:
    """The trained model (in eval mode), its tokenizer, one dict per logged step, and the folder of the run."""

    model: nn.Module
    tokenizer: Any
    history: list[dict[str, float]]
    output_dir: Path
    alpha: float | None = None
    """The exponent; with ``alpha="auto:..."`` the one that was found."""

    @property
    def model_dir(self) -> Path:
        """Loads with ``AutoModelForCausalLM.from_pretrained``; a LoRA run is merged into it."""
        return self.output_dir / "model"


def write_results(
    output_dir: Path,
    model: nn.Module,
    tokenizer: Any,
    history: list[dict[str, float]],
    *,
    samples: tuple[list[samples_page.Sample], list[samples_page.Sample]],
    log_z_weights: dict[str, Tensor] | None,
    alpha: float,
    alpha_note: str | None,
    base_model: str,
    data_description: str,
    config: PowerFlowConfig,
) -> None:
    """Write ``model/``, ``log_z_head.safetensors``, ``samples.md`` and ``history.png``; by one process.

    ``samples`` are those before and after training.
    """
    # A skipped step has no finite numbers, or too few of them.
    needed = ("loss", "entropy", "length")
    steps = [row for row in history if all(isinstance(row.get(k), float) and math.isfinite(row[k]) for k in needed)]
    save_model(model, tokenizer, output_dir)
    if log_z_weights is not None:
        save_file(log_z_weights, output_dir / "log_z_head.safetensors")
    model_card.write_model_card(
        output_dir / "model",
        alpha=alpha,
        base_model=base_model,
        data_description=data_description,
        alpha_note=alpha_note,
        config=config.to_dict() | {"alpha": alpha},
        objective=config.objective,
        how=(known.formula, known.target) if (known := OBJECTIVES.get(config.objective)) else None,
        commit=git_commit(),
        metrics=[(name, steps[0][name], steps[-1][name]) for name in _CARD_METRICS if steps and name in steps[0]],
    )
    if alpha_note is not None:
        record = json.loads((output_dir / "run.json").read_text(encoding="utf-8"))
        record["alpha"] = {"value": alpha, "note": alpha_note}
        (output_dir / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    samples_page.write_samples(output_dir / "samples.md", *samples)
    if steps:
        options = {"alpha": alpha, "max_completion_length": config.max_completion_length, "objective": config.objective}
        plot_history(steps, output_dir / "history.png", **options)
    elif any("loss" in row for row in history):
        logger.warning("no step of this run was finite: %s holds the model that it started from", output_dir / "model")
