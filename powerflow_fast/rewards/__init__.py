"""What a completion earns."""

from .answers import extract_answer, same_answer
from .formats import boxed_answer
from .label_free import empo, intuitor, rent, ttrl
from .registry import REWARDS, resolve_reward
from .reward import Reward, RewardInputs
from .text_functions import user_reward

__all__ = [
    "REWARDS",
    "Reward",
    "RewardInputs",
    "boxed_answer",
    "empo",
    "extract_answer",
    "intuitor",
    "rent",
    "resolve_reward",
    "same_answer",
    "ttrl",
    "user_reward",
]
