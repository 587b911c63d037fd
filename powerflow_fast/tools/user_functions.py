"""What format functions, rewards and scorers have in common: a user's function, called with columns by keyword."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

_TEXTS = ("prompt", "completion")


class Columns:
    """Which columns of a prompt's row a function gets by keyword; ``parameters`` are those that it has for them.

    One with ``**columns`` gets all but "prompt", "completion" and ``taken``, another what it names.
    """

    def __init__(self, parameters: Iterable[inspect.Parameter], *, taken: Iterable[str] = ()):
        parameters = list(parameters)
        self.left_out = {*_TEXTS, *taken}
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.named = {p.name for p in named}
        self.required = tuple(p.name for p in named if p.default is p.empty)
        """Those without a default: every row must have them."""

    @classmethod
    def of(cls, signature: inspect.Signature) -> Columns:
        """Of a function ``(prompt, completion, **columns)``: of all parameters but the first two."""
        parameters = list(signature.parameters.values())
        first_two = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:2]
        taken = [p.name for p in first_two if p.kind is p.POSITIONAL_OR_KEYWORD]  # would be given twice
        return cls((p for p in parameters if p not in first_two), taken=taken)

    def chosen(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of ``row`` that the function gets."""
        return {k: v for k, v in row.items() if k not in self.left_out and (self.takes_all or k in self.named)}


def number_of(value: Any) -> float | None:
    """What a function returned as a float: a number, a bool, or an array of one element; None for anything else."""
    if isinstance(value, (str, bytes)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several elements
        return None
