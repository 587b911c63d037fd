r"""The answer in a completion, and which answers are the same.

An answer is what the last ``\boxed{...}`` holds. Rewards that compare the completions of one prompt (EMPO, TTRL) put
equal answers into clusters, and ask an equivalence, a function of two answers, which are equal.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigError, suggest

Equivalence = Callable[[str, str], bool]

# The start of a box, an escaped character (but not the backslash of the next box), or a brace.
_BRACES = re.compile(r"(?P<box>\\boxed\s*\{)|\\(?!\\boxed).|[{}]", re.DOTALL)


def extract_answer(completion: str) -> str | None:
    r"""What stands in the last ``\boxed{...}`` of ``completion``, without outer white space; None without one.

    The box must have balanced braces and something other than white space inside; others are passed over. Escaped
    braces (``\{``) do not count as braces. Of nested boxes the innermost counts. One pass over the text.
    """
    last, answer = -1, None
    opened: list[tuple[int, int]] = []  # where each open brace's content starts, and its box; -1 for a plain brace
    for token in _BRACES.finditer(completion):
        if token["box"]:
            opened.append((token.end(), token.start()))
        elif token[0] == "{":
            opened.append((token.end(), -1))
        elif token[0] == "}" and opened:
            content, box = opened.pop()
            if box > last and (inside := completion[content : token.start()].strip()):
                last, answer = box, inside
    return answer


_FONTS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SPACES = re.compile(r"(?<!\\)\\[,;:! ]|~|\s+")
_SIZES = re.compile(r"\\(?:left|right)(?![A-Za-z])")


@functools.lru_cache(maxsize=4096)
def normalized_answer(answer: str) -> str:
    r"""``answer`` without what does not change its meaning:

    white space and LaTeX's spaces (``\,`` ``\;`` ``\:`` ``\!`` ``\ `` ``~``); one final period; one pair of dollar
    signs around all of it; ``\left`` and ``\right``; the commands ``\text{}``, ``\textbf{}``, ``\textit{}``,
    ``\textrm{}``, ``\mathrm{}``, ``\mathbf{}`` and ``\mbox{}`` around their text; ``\dfrac`` and ``\tfrac`` become
    ``\frac``. Case, commas, units and the form of a number stay: ``1,000`` is not ``1000`` and ``0.5`` not ``1/2``.
    """
    answer = answer.strip().removesuffix(".")
    if len(answer) > 1 and answer[0] == answer[-1] == "$" and answer[-2] != "\\":
        answer = answer[1:-1]
    answer = re.sub(r"\\[dt]frac", r"\\frac", answer)
    answer = _FONTS.sub(r"\1", _SIZES.sub("", answer))
    return _SPACES.sub("", answer).removesuffix(".")


def same_answer(answer: str, other: str) -> bool:
    """Whether the two are equal text after :func:`normalized_answer`."""
    return normalized_answer(answer) == normalized_answer(other)


def same_answer_math(answer: str, other: str) -> bool:
    r"""Whether the two are equal text as in :func:`same_answer`, or equal as mathematics: ``\frac12`` and ``0.5``.

    Equality is math-verify's ``verify(parse(answer), parse(other))`` with its own time limit of five seconds for each
    step; what it cannot read or finish is not equal. Not symmetric in rare cases (an equation and its solution): the
    first answer is the reference.

    Raises:
        ConfigError: math-verify is not installed, or this is not the main thread, where its time limit does not work.
    """
    if same_answer(answer, other):
        return True
    library = math_verify_library()
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "answer_equivalence='math_verify' works in the main thread only: its time limit is a signal; use "
            "'normalized' in other threads"
        )
    try:
        return bool(library.verify(_parsed(answer), _parsed(other)))
    except library.errors.TimeoutException:  # a BaseException, raised by an alarm that comes as the step ends
        return False


@functools.lru_cache(maxsize=4096)
def _parsed(answer: str) -> list[Any]:
    return math_verify_library().parse(rf"\boxed{{{answer}}}")


def math_verify_library() -> Any:
    """The module ``math_verify``; ConfigError where it is not installed."""
    try:
        import math_verify
        import math_verify.errors
    except ImportError as error:
        raise ConfigError(
            f"answer_equivalence='math_verify' needs math-verify ({error}); run: pip install 'powerflow-fast[math]'"
        ) from error
    return math_verify


EQUIVALENCES: dict[str, Equivalence] = {"normalized": same_answer, "math_verify": same_answer_math}


def resolve_equivalence(answer_equivalence: str | Equivalence) -> Equivalence:
    """The function itself, or the one with that name: "normalized" or "math_verify".

    :class:`ConfigError` for another name, and for "math_verify" without math-verify.
    """
    if isinstance(answer_equivalence, str):
        if answer_equivalence not in EQUIVALENCES:
            raise ConfigError(
                f"answer_equivalence must be one of {', '.join(EQUIVALENCES)}, got {answer_equivalence!r}"
                f"{suggest(answer_equivalence, EQUIVALENCES)}"
            )
        if answer_equivalence == "math_verify":
            math_verify_library()
        return EQUIVALENCES[answer_equivalence]
    if not callable(answer_equivalence):
        raise ConfigError(f"answer_equivalence must be a function or a name, got {type(answer_equivalence).__name__}")
    return answer_equivalence


def cluster_answers(answers: Sequence[str | None], equivalent: Equivalence = same_answer) -> list[int]:
    """The number of each answer's cluster; clusters are numbered from 0 in the order of their first answers.

    An answer joins the first cluster whose first answer it equals, ``equivalent(first, answer)``, as in EMPO's code,
    so an equivalence that is not transitive still gives one cluster each. None and blank answers are alone.
    """
    clusters: list[int] = []
    firsts: list[str | None] = []
    for answer in answers:
        if answer is None or not normalized_answer(answer):
            found, answer = None, None
        else:
            same = (k for k, first in enumerate(firsts) if first is not None and equivalent(first, answer))
            found = next(same, None)
        if found is None:
            found = len(firsts)
            firsts.append(answer)
        clusters.append(found)
    return clusters
