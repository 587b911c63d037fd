"""Prompts of the demo: short creative requests, and reasoning-gym tasks that a 135M-parameter model can at least parse.

Both lists are deterministic. The held-out prompts never occur among the training prompts.
"""

from __future__ import annotations

from itertools import chain

from ..errors import DataError
from ..evaluation.creative_prompts import DemoPrompt, creative_prompts
from ..evaluation.scorers import full_marks, last_number

# Tasks whose answer is one small number: longer ones would only measure the completion limit.
REASONING_FAMILIES: tuple[tuple[str, dict[str, int]], ...] = (
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ("gcd", {"max_value": 40}),
)
_SEED = 1


def reasoning_prompts(count: int, *, held_out: bool) -> list[DemoPrompt]:
    """``count`` reasoning-gym prompts that take turns among the families. No held-out question is a training question.

    The same reasoning-gym version gives the same prompts. Raises DataError where it is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise DataError("the demo's reasoning prompts need reasoning-gym: pip install reasoning-gym") from error
    pools: list[list[DemoPrompt]] = []
    for family, options in REASONING_FAMILIES:
        # Small tasks repeat questions: one draw, duplicates dropped, every fourth question held out.
        drawn = reasoning_gym.create_dataset(family, seed=_SEED, size=200, **options)
        unique = list({entry["question"]: entry for entry in drawn}.values())
        chosen = [entry for i, entry in enumerate(unique) if (i % 4 == 0) == held_out]
        pools.append([DemoPrompt(entry["question"].strip(), family, entry) for entry in chosen])
    turns = list(chain.from_iterable(zip(*pools, strict=False)))
    if count > len(turns):
        raise ValueError(f"reasoning_prompts: count must be at most {len(turns)}, got {count}")
    return turns[:count]


def demo_prompts(alpha: float, *, held_out: bool) -> list[DemoPrompt]:
    """What the demo uses at ``alpha``: creative requests below 1, else as many reasoning tasks as creative requests."""
    creative = creative_prompts(held_out=held_out)
    if alpha < 1:
        return creative
    creative = creative[::2]
    reasoning = reasoning_prompts(len(creative), held_out=held_out)
    return list(chain.from_iterable(zip(reasoning, creative, strict=True)))


def reasoning_score(prompt: DemoPrompt, completion: str) -> float:
    """1.0 when the last number of ``completion`` is the task's answer by reasoning-gym's own rule, else 0.0.

    The last number, because the model writes sentences ("4 - 1 = 3") where the task asks for a bare result.
    """
    if prompt.entry is None:
        raise ValueError(f"reasoning_score: prompt {prompt.text!r} is no reasoning task")
    given = last_number(completion)
    return 0.0 if given is None else full_marks(prompt.family, given, prompt.entry)
