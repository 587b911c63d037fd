"""Engines that draw completions from the policy."""

from .continuous import ContinuousBatchingEngine
from .engine import Rollout, RolloutEngine
from .generate import HFGenerateEngine
from .vllm import VLLMEngine

__all__ = ["ContinuousBatchingEngine", "HFGenerateEngine", "Rollout", "RolloutEngine", "VLLMEngine"]
