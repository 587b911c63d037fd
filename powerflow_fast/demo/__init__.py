"""``make demo``: a real small model, trained on whatever the machine has."""

from .run import run_demo
from .smollm2 import smollm2_model

__all__ = ["run_demo", "smollm2_model"]
