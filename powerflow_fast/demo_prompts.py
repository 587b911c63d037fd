"""Prompts of the demo: short creative requests, and reasoning-gym tasks that a 135M-parameter model can at least parse.

Both lists are deterministic. The held-out prompts never occur among the training prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from .errors import DataError
from .scorers import full_marks, last_number

__all__ = ["DemoPrompt", "creative_prompts", "demo_prompts", "reasoning_prompts", "reasoning_score"]

CREATIVE_TRAIN = (
    "Write a short poem about a lighthouse that is afraid of the dark.",
    "Write four lines about rain on a tin roof.",
    "Write a poem about the last leaf on a tree.",
    "Write a short poem about a clock that runs backwards.",
    "Write a rhyme about a sleepy dragon.",
    "Write a poem about an empty train station at dawn.",
    "Write a haiku about a broken umbrella.",
    "Write a short poem about bread baking in winter.",
    "Write a poem in which the moon talks to a puddle.",
    "Write four lines about a letter that was never sent.",
    "Write a short poem about a city without sounds.",
    "Write a poem about a river that forgot the sea.",
    "Tell the beginning of a story about a girl who collects shadows.",
    "Tell a very short story about a robot that plants a garden.",
    "Tell the beginning of a story set in a library under the ocean.",
    "Tell a short story about two neighbours and one stubborn goat.",
    "Tell the beginning of a mystery about a missing violin.",
    "Tell a short story about a baker who can taste the future.",
    "Tell a very short story about a map that changes every night.",
    "Tell a story about a snail that wants to win a race.",
    "Tell the beginning of a fairy tale about a queen made of glass.",
    "Tell a short story about the first snow on Mars.",
    "Tell a story about an old sailor and a talking bottle.",
    "Tell a very short story about a door in the middle of a field.",
    "Tell a joke about a penguin in a restaurant.",
    "Tell a joke about a computer that is always late.",
    "Make up a joke about a vegetable at school.",
    "Tell a joke about two clouds.",
    "Make up a funny excuse for being late to dinner.",
    "Tell a joke about a wizard who lost his hat.",
    "Make up a silly rule for a chess club of cats.",
    "Tell a joke about a very polite ghost.",
    "Invent a new holiday and say how people celebrate it.",
    "Describe a colour that nobody has seen before.",
    "Invent a strange dish and name it.",
    "Describe a day in the life of a paper boat.",
)
CREATIVE_HELD_OUT = (
    "Write a short poem about a candle that dreams of being a star.",
    "Write four lines about footprints on a beach.",
    "Write a poem about an old bicycle.",
    "Write a short poem about the wind in a keyhole.",
    "Tell the beginning of a story about a boy who befriends an echo.",
    "Tell a very short story about a town where nobody sleeps.",
    "Tell a short story about a fox who opens a shop.",
    "Tell the beginning of a story about a train that runs on music.",
    "Tell a joke about an astronaut and a sandwich.",
    "Make up a joke about a shy volcano.",
    "Invent an animal and describe what it eats.",
    "Describe the smell of a forgotten attic.",
)

# Tasks whose answer is one small number: longer ones would only measure the completion limit.
REASONING_FAMILIES: tuple[tuple[str, dict[str, int]], ...] = (
    ("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    ("products", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}),
    ("gcd", {"max_value": 40}),
)
_SEED = 1


@dataclass(frozen=True)
class DemoPrompt:
    """``text`` is one user message; a reasoning prompt has its reasoning-gym ``family`` and ``entry`` to score with."""

    text: str
    family: str = "creative"
    entry: dict | None = None


def creative_prompts(*, held_out: bool) -> list[DemoPrompt]:
    """The written list: 36 training prompts, or 12 other ones that are never trained on."""
    return [DemoPrompt(text) for text in (CREATIVE_HELD_OUT if held_out else CREATIVE_TRAIN)]


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
