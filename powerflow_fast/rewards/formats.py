"""Format functions: what a completion must look like to escape the format penalty psi.

A format function is called as ``format_fn(prompt, completion, **columns)`` with the completion as text and the other
columns of the prompt's row as keywords, and returns True when the format is right. It judges form, never correctness.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, suggest
from ..tools.user_functions import Columns
from .answers import extract_answer

FormatFn = Callable[..., bool]


def boxed_answer(prompt: Any, completion: str, **columns: Any) -> bool:
    r"""Whether ``completion`` has a ``\boxed{...}`` with balanced braces and something other than white space inside.

    Escaped braces (``\{``) do not count as braces.
    """
    return extract_answer(completion) is not None


FORMATS: dict[str, FormatFn] = {"boxed": boxed_answer}


def resolve_format(format_fn: str | FormatFn | None) -> FormatFn | None:
    """The function itself, or the ready-made one with that name; :class:`ConfigError` for an unknown name."""
    if isinstance(format_fn, str):
        if format_fn not in FORMATS:
            raise ConfigError(
                f"format must be one of {', '.join(FORMATS)}, got {format_fn!r}{suggest(format_fn, FORMATS)}"
            )
        return FORMATS[format_fn]
    if format_fn is not None and not callable(format_fn):
        raise ConfigError(f"format_fn must be a function or a name, got {type(format_fn).__name__}")
    return format_fn


def format_penalties(
    format_fn: FormatFn | None,
    prompts: Sequence[Any],
    completions: Sequence[str],
    columns: Sequence[Mapping[str, Any]],
    *,
    penalty: float,
) -> list[float]:
    """psi of each completion: 0 where ``format_fn`` returns True (or is None), ``penalty`` where it returns False.

    A function without ``**kwargs`` gets only the columns it names. Columns "prompt" and "completion" are left out.
    """
    if format_fn is None:
        return [0.0] * len(completions)
    wanted = Columns.of(inspect.signature(format_fn))
    penalties = []
    for prompt, completion, row in zip(prompts, completions, columns, strict=True):
        ok = format_fn(prompt, completion, **wanted.chosen(row))
        if not isinstance(ok, bool) and type(ok).__name__ not in ("bool", "bool_"):  # numpy's bool is another type
            raise ConfigError(f"format_fn must return True or False, got {ok!r} ({type(ok).__name__})")
        penalties.append(0.0 if ok else penalty)
    return penalties
