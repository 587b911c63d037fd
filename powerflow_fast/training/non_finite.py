"""Steps whose loss or gradient is not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoints.folder import checkpoint_step
from ..config.options import PowerFlowConfig
from ..errors import NonFiniteLossError


def may_skip(config: PowerFlowConfig, counters: dict[str, Any]) -> bool:
    """Count a step that is left out, or return False where the run has to end instead.

    ``counters`` gets "skipped_steps" and "skipped_in_a_row"; a step that is made sets the second to 0.
    """
    in_a_row = counters.get("skipped_in_a_row", 0) + 1
    if config.on_nonfinite == "stop" or in_a_row >= config.max_nonfinite_steps:
        return False
    counters["skipped_in_a_row"] = in_a_row
    counters["skipped_steps"] = counters.get("skipped_steps", 0) + 1
    return True


def non_finite_error(
    step: int, metric: str, metrics: dict[str, float], kept: Path | None, counters: dict[str, Any]
) -> NonFiniteLossError:
    """The error that ends the run at ``step``; ``kept`` is the newest checkpoint."""
    saved = f"the state after step {checkpoint_step(kept)} is in {kept}" if kept else "there is no checkpoint yet"
    state = "its update made the weights non-finite" if metric == "weights" else "it did not change the weights"
    before = counters.get("skipped_in_a_row", 0)
    row = f", after {before} skipped in a row (max_nonfinite_steps)" if before else ""
    return NonFiniteLossError(
        f"step {step}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}{row}; {state}, and {saved}. "
        "Lower learning_rate, or look for prompts or completions that the model gives no finite log-probs",
        step=step,
        metric=metric,
        checkpoint=str(kept) if kept else None,
    )
