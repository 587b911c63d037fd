"""``train``, and all that a run does."""

from .result import StepReport, TrainResult
from .train import train

__all__ = ["StepReport", "TrainResult", "train"]
