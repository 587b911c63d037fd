"""36 creative requests to train on and 12 held out."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class DemoPrompt:
    """``text`` is one user message; a reasoning prompt has its reasoning-gym ``family`` and ``entry`` to score with."""

    text: str
    family: str = "creative"
    entry: dict | None = None


def creative_prompts(*, held_out: bool) -> list[DemoPrompt]:
    """The written list: 36 training prompts, or 12 other ones that are never trained on."""
    return [DemoPrompt(text) for text in (CREATIVE_HELD_OUT if held_out else CREATIVE_TRAIN)]
