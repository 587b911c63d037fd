"""Rewards by name."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, suggest
from .answers import Equivalence, resolve_equivalence
from .label_free import empo, intuitor, rent, ttrl
from .reward import Reward, RewardSum
from .text_functions import user_reward

REWARDS: dict[str, Reward] = {
    "empo": Reward("empo", empo, needs_groups=True, compares_answers=True),
    "intuitor": Reward("intuitor", intuitor, needs_stats=True),
    "rent": Reward("rent", rent, needs_stats=True),
    "ttrl": Reward("ttrl", ttrl, needs_groups=True, compares_answers=True),
}


def resolve_reward(
    reward: str | Callable[..., Any] | Reward | Sequence[str | Callable[..., Any] | Reward],
    *,
    weights: Sequence[float] | None = None,
    answer_equivalence: str | Equivalence = "normalized",
) -> RewardSum:
    """The reward to train with, from a name in :data:`REWARDS`, a function, a :class:`Reward`, or a list of these.

    Args:
        reward: a function is wrapped by :func:`user_reward`; one that takes :class:`RewardInputs` is wrapped by the
            caller: ``Reward("mine", fn, needs_stats=True)``.
        weights: one finite number for each reward; None: all 1.
        answer_equivalence: for the rewards that compare answers: "normalized", "math_verify" or a function.

    Raises:
        ConfigError: an unknown name, an object that is no reward, or weights of the wrong number or kind.
    """
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    if not rewards:
        raise ConfigError("reward must name at least one reward, got an empty list")
    equivalent = resolve_equivalence(answer_equivalence)
    parts = [_resolve_one(one) for one in rewards]
    parts = [
        replace(part, function=functools.partial(part.function, equivalent=equivalent))
        if part.compares_answers
        else part
        for part in parts
    ]
    return RewardSum(tuple(parts), _weights(weights, len(parts)))


def _resolve_one(reward: str | Callable[..., Any] | Reward) -> Reward:
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        if reward not in REWARDS:
            raise ConfigError(
                f"reward must be a function or one of {', '.join(REWARDS)}, got {reward!r}{suggest(reward, REWARDS)}"
            )
        return REWARDS[reward]
    if not callable(reward):
        raise ConfigError(f"reward must be a function or a name, got {type(reward).__name__}")
    ready_made = next((known for known in REWARDS.values() if known.function is reward), None)
    return ready_made or user_reward(reward)


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        got = len(weights) if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise ConfigError(f"reward_weights must be a list with one number for each of {count} rewards, got {got}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"reward_weights must be finite numbers, got {weight!r}")
    return tuple(float(weight) for weight in weights)
