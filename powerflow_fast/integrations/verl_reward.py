"""A reward function for verl runs that have none: verl asks for one, PowerFlow doesn't use it."""

from __future__ import annotations

from typing import Any

__all__ = ["no_reward"]


def no_reward(data_source: Any, solution_str: str, ground_truth: Any, extra_info: Any = None, **_: Any) -> float:
    """0.0 for every completion.

    Without it verl looks ``data_source`` up among the benchmarks it can mark, and fails for any other. In a verl
    config: ``reward.custom_reward_function.path=pkg://powerflow_fast.integrations.verl_reward``, ``name=no_reward``.
    """
    return 0.0
