r"""Scorers: from a completion and the columns of its problem to one number, 1 for right and 0 for wrong as a rule.

A scorer is a function ``scorer(prompt, completion, **columns) -> number`` with the other columns of the problem's row
as keywords; one without ``**columns`` gets only those that it names, and those that it names without a default must be
there in every row. :data:`SCORERS` has the ready-made ones by name.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import cached_property
from typing import Any

from ..data import PromptRow
from ..errors import ConfigError, DataError, ScorerError, suggest
from ..rewards.answers import (
    Equivalence,
    extract_answer,
    math_verify_library,
    normalized_answer,
    resolve_equivalence,
    same_answer,
    same_answer_math,
)
from ..tools.user_functions import Columns, number_of
from .store import CompletionStore

Scorer = Callable[..., float]


@dataclass(frozen=True)
class NamedScorer:
    """A scorer with its name, and how it reads and compares answers; itself a scorer.

    Raises:
        ScorerError: when called, if ``function`` raises or returns no finite number; the scorer is named.
    """

    name: str
    function: Scorer
    read_answer: Callable[[str], str | None] | None = None
    """The answer in a completion, for majority votes and the number of different answers; None: neither is measured."""
    equivalent: Equivalence = same_answer
    """Which answers of two completions count as one."""

    def __post_init__(self) -> None:
        try:
            signature = inspect.signature(self.function)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"scorer {self.name!r} must be a function with a signature: {error}") from error
        parameters = list(signature.parameters.values())
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise ConfigError(
                f"scorer {self.name!r} must take (prompt, completion, **columns), got {self.name}{signature}"
            )

    @cached_property
    def _columns(self) -> Columns:
        return Columns.of(inspect.signature(self.function))

    @property
    def required(self) -> tuple[str, ...]:
        """The columns that every row must have."""
        return self._columns.required

    def __call__(self, prompt: Any, completion: str, /, **columns: Any) -> float:
        try:
            value = self.function(prompt, completion, **self._columns.chosen(columns))
        except Exception as error:  # whatever a user's function raises
            raise ScorerError(f"scorer {self.name!r} raised {type(error).__name__}: {error}") from error
        number = number_of(value)
        if number is None:
            raise ScorerError(
                f"scorer {self.name!r} must return a number, got {str(value)[:60]!r} ({type(value).__name__})"
            )
        if not math.isfinite(number):
            raise ScorerError(f"scorer {self.name!r} must return a finite number, got {number}")
        return number


# Mathematics

# "the answer to it is", "Answer:"; what follows, to the end of its line, is read by math-verify.
_ANCHOR = re.compile(r"(?i:\banswer\b)[^.\n]{0,60}?(?:\bis\b|[:=])[\s:*]*")
_SIGNS = (("°", r"^\circ"), ("−", "-"), ("≤", r"\le "), ("≥", r"\ge "))
_ROOT = re.compile(r"√\s*(\w+|\{[^{}]*\}|\([^()]*\))")
_LESS = r"\s*(<|\\leq?(?![a-zA-Z]))\s*"
_BETWEEN = re.compile(rf"([^<>=]+?){_LESS}[a-zA-Z]{_LESS}([^<>=]+)")


def math_answer(completion: str) -> str | None:
    r"""The answer of ``completion`` as LaTeX or text: what the last ``\boxed{...}`` holds; without a box, what
    math-verify finds after the last "answer is" or "answer:" ("the final answer is $\frac12$"); None without either.

    A number in running text is no answer: the prompts of the benchmarks ask for a box.
    """
    boxed = extract_answer(completion)
    if boxed is not None:
        return boxed
    anchors = list(_ANCHOR.finditer(completion))
    if not anchors:
        return None
    library = math_verify_library()
    configs = [
        library.LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=-1),
        library.ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    line = completion[anchors[-1].end() :].partition("\n")[0].replace("**", "")
    found = library.parse(f"answer: {line}", extraction_config=configs)
    return str(found[-1]) if found else None


def same_mathematics(answer: str, other: str) -> bool:
    r"""`same_answer_math`, the reference first, after what math-verify does not read is
    written in LaTeX: the signs ° − ≤ ≥ √, and an interval given as ``a < x < b``."""
    return same_answer_math(_in_latex(answer), _in_latex(other))


def _in_latex(answer: str) -> str:
    for sign, latex in _SIGNS:
        answer = answer.replace(sign, latex)
    answer = _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('{}()')}}}", answer)
    between = _BETWEEN.fullmatch(answer.strip().strip("$"))
    if between:
        low, left, right, high = between.groups()
        answer = f"{'(' if left == '<' else '['}{low.strip()},{high.strip()}{')' if right == '<' else ']'}"
    return answer


def math_score(prompt: Any, completion: str, *, answer: Any) -> float:
    r"""1.0 where the completion's answer equals ``answer`` as text or as mathematics, else 0.0.

    The completion's answer is :func:`math_answer`'s; equality is :func:`same_mathematics`. Works in the main thread
    only, as math-verify's time limit is a signal.
    """
    given = math_answer(completion)
    return float(given is not None and same_mathematics(str(answer), given))


# Text


def boxed_score(prompt: Any, completion: str, *, answer: Any) -> float:
    r"""1.0 where the last ``\boxed{...}`` holds the text of ``answer`` after
    :func:`powerflow_fast.rewards.answers.normalized_answer`, else 0.0."""
    given = extract_answer(completion)
    return float(given is not None and same_answer(str(answer), given))


def exact_score(prompt: Any, completion: str, *, answer: Any) -> float:
    """1.0 where the whole completion is the text of ``answer``, both normalised as in :func:`boxed_score`."""
    return float(same_answer(str(answer), completion))


# Numbers

_NUMBER = re.compile(r"(?<![\w.])[-−]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?![\w]|\.\d)")


def last_number(completion: str) -> str | None:
    """The last number of ``completion`` without thousands separators, None where there is none; ``7-3`` ends in 3."""
    found = _NUMBER.findall(completion)
    return found[-1].replace(",", "").replace("−", "-") if found else None


def number_score(prompt: Any, completion: str, *, answer: Any) -> float:
    """1.0 where :func:`last_number` equals the number ``answer`` (12 is 12.0), else 0.0.

    For models that write sentences ("4 - 1 = 3") and know of no box. A number at which a completion was cut off counts
    as its last one.
    """
    wanted = _decimal(answer)
    if wanted is None:
        raise ValueError(f"number_score: answer must be a number, got {answer!r}")
    given = last_number(completion)
    return float(given is not None and Decimal(given) == wanted)


def _decimal(answer: Any) -> Decimal | None:
    try:
        return Decimal(str(answer).replace(",", "").strip())
    except InvalidOperation:
        return None


# Letters

_LETTER = r"(?:\\text\w*\s*\{)?\(?\**([A-J])\**\)?\}?"
_BOXED_LETTER = re.compile(rf"^\s*{_LETTER}\s*(?:[).:,\s].*)?$", re.DOTALL)
_SAID_LETTER = re.compile(rf"(?i:\banswer\b(?:\s+is)?)\s*:?\s*\**\s*:?\s*\$?{_LETTER}(?![A-Za-z])")
_BARE_LETTER = re.compile(r"^\s*\(?([A-J])\)?[.):]?\s*$")


def read_letter(completion: str) -> str | None:
    r"""The letter A to J that a completion chooses: in the last ``\boxed{...}``, as in ``\boxed{\text{(C)}}``; else
    after the last word "answer", as in "the answer is (C)"; else the letter that is the whole completion; else None."""
    boxed = extract_answer(completion)
    if boxed is not None:
        match = _BOXED_LETTER.match(boxed)
        return match[1] if match else None
    said = list(_SAID_LETTER.finditer(completion))
    if said:
        return said[-1][1]
    match = _BARE_LETTER.match(completion)
    return match[1] if match else None


def choice_score(prompt: Any, completion: str, *, answer: Any) -> float:
    """1.0 where :func:`read_letter` finds the letter ``answer``, else 0.0."""
    return float(read_letter(completion) == _letter(answer))


def _letter(answer: Any) -> str:
    return str(answer).strip().strip("()").upper()


# reasoning-gym

_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def reasoning_gym_answer(completion: str) -> str:
    r"""What stands in the last ``<answer>...</answer>``; else in the last ``\boxed{...}``; else all of it."""
    tags = _TAG.findall(completion)
    return tags[-1].strip() if tags else extract_answer(completion) or completion.strip()


def reasoning_gym_score(prompt: Any, completion: str, *, task: str, entry: dict[str, Any]) -> float:
    """1.0 where reasoning-gym's own rule for ``task`` gives full marks to :func:`reasoning_gym_answer`, else 0.0.

    Its partial marks (a right answer among other words) count as 0, and so does an answer that its rule cannot read.
    ``entry`` is the item of its dataset.
    """
    return full_marks(task, reasoning_gym_answer(completion), entry)


def full_marks(task: str, answer: str, entry: dict[str, Any]) -> float:
    """1.0 where reasoning-gym's own rule for ``task`` gives ``answer`` full marks, else 0.0; so too where it cannot
    read it."""
    import reasoning_gym

    rule = reasoning_gym.get_score_answer_fn(task)
    try:
        return float(rule(answer, entry) == 1.0)
    except Exception:  # some rules parse the answer without a guard, each raises its own kind
        return 0.0


def _same_number(answer: str, other: str) -> bool:
    return Decimal(answer) == Decimal(other)


def _same_words(answer: str, other: str) -> bool:
    return normalized_answer(answer).casefold() == normalized_answer(other).casefold()


SCORERS: dict[str, NamedScorer] = {
    "math": NamedScorer("math", math_score, math_answer, same_mathematics),
    "boxed": NamedScorer("boxed", boxed_score, extract_answer),
    "number": NamedScorer("number", number_score, last_number, _same_number),
    "exact": NamedScorer("exact", exact_score, str.strip),
    "choice": NamedScorer("choice", choice_score, read_letter),
    "reasoning_gym": NamedScorer("reasoning_gym", reasoning_gym_score, reasoning_gym_answer, _same_words),
}


def resolve_scorer(scorer: str | Scorer | None) -> NamedScorer | None:
    """The ready-made scorer with that name, or a function with its own name; None stays None.

    :class:`ConfigError` for another name, for something that cannot be called, and for "math" without math-verify.
    """
    if isinstance(scorer, str):
        if scorer not in SCORERS:
            raise ConfigError(
                f"scorer must be one of {', '.join(SCORERS)}, or a function, got {scorer!r}{suggest(scorer, SCORERS)}"
            )
        scorer = SCORERS[scorer]
    if scorer is SCORERS["math"]:
        resolve_equivalence("math_verify")  # says how to install it
    if scorer is None or isinstance(scorer, NamedScorer):
        return scorer
    if not callable(scorer):
        raise ConfigError(f"scorer must be a function or a name, got {type(scorer).__name__}")
    return NamedScorer(getattr(scorer, "__name__", None) or type(scorer).__name__, scorer)


# What the column "answer" must be, and whether it is; else every completion would be wrong, or the scorer raise.
_ANSWERS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "math": ("a text or a number", lambda answer: True),
    "boxed": ("a text or a number", lambda answer: True),
    "exact": ("a text or a number", lambda answer: True),
    "number": ("a number", lambda answer: _decimal(answer) is not None),
    "choice": ("a letter from A to J", lambda answer: re.fullmatch("[A-J]", _letter(answer)) is not None),
}


def check_columns(scorer: NamedScorer, rows: Iterable[PromptRow]) -> None:
    """:class:`DataError` naming the column and the first row where ``scorer`` lacks one that it needs, or where the
    answer is none that a ready-made scorer could find."""
    form, fits = _ANSWERS[scorer.name] if SCORERS.get(scorer.name) is scorer and scorer.name in _ANSWERS else ("", None)
    for row in rows:
        for name in scorer.required:
            value = row.extra.get(name)
            if value is None or (isinstance(value, str) and not value.strip()) or value != value:  # NaN
                found = ", ".join(map(repr, row.extra)) or "none besides the prompt"
                state = "is empty" if name in row.extra else f"is missing (columns: {found})"
                raise DataError(
                    f"{row.where}: scorer {scorer.name!r} needs the column {name!r}, which {state}; add it, or choose "
                    "another scorer or scorer=None"
                )
            if fits is not None and name == "answer" and not (isinstance(value, (str, int, float)) and fits(value)):
                raise DataError(f"{row.where}: scorer {scorer.name!r} needs {form} as 'answer', got {value!r:.80}")


def fill_scores(store: CompletionStore, rows: Sequence[PromptRow], scorer: NamedScorer) -> None:
    """Give each record its "score" and "answer".

    ScorerError names the problem, the sample, and where all that was sampled is to be found.
    """
    try:
        for record in store.records:
            row = rows[record["problem"]]
            try:
                record["score"] = scorer(row.prompt, record["completion"], **row.extra)
                record["answer"] = None if scorer.read_answer is None else scorer.read_answer(record["completion"])
            except Exception as error:  # a ScorerError, or whatever a user's read_answer raises
                message = str(error) if isinstance(error, ScorerError) else f"{type(error).__name__}: {error}"
                raise ScorerError(
                    f"{message}; at problem {record['problem']} ({row.where}), sample {record['sample']}. Nothing is "
                    f"lost: {store.kept}",
                    completions=store.records,
                ) from error
    finally:
        store.save()
