"""A user's function of text as a reward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ..errors import ConfigError
from ..tools.user_functions import Columns, number_of
from .reward import Reward, RewardInputs, one_per_completion


def user_reward(fn: Callable[..., Any], *, name: str | None = None) -> Reward:
    """A reward from a function of text. Its parameters say which of two forms it has:

    * one completion at a time, ``fn(prompt, completion, **columns) -> float``, as for format functions;
    * a whole batch, for a function with a parameter named ``completions``, by keyword only:
      ``fn(prompts=..., completions=..., completion_ids=..., **columns) -> list of B floats``, columns as lists. This is
      TRL's form, and a completion of a chat prompt is a list of one message here, as there.

    A function without ``**kwargs`` gets only what it names. Columns of these names ("prompt", "completion") are left
    out.

    Args:
        name: for logs and errors; None takes the function's own.

    Raises:
        ConfigError: ``fn`` has neither form; when the reward is called: a column that ``fn`` requires is missing, its
            result is no finite number, or there are not B of them. Function and prompt are named.
    """
    name = name or getattr(fn, "__name__", None) or type(fn).__name__
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} must be a function with a signature: {error}") from error
    parameters = signature.parameters.values()
    if "completions" in signature.parameters:
        return Reward(name, _TextReward(fn, name, Columns(parameters)).batch)
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    enough = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not enough or "completion" in positional[:1] + positional[2:]:
        raise ConfigError(
            f"reward {name!r} must take (prompt, completion, **columns), or for whole batches keywords with "
            f"`completions` among them, got {name}{signature}"
        )
    return Reward(name, _TextReward(fn, name, Columns.of(signature)).single)


class _TextReward:
    """``fn`` under the conventions of :func:`user_reward`."""

    def __init__(self, fn: Callable[..., Any], name: str, columns: Columns):
        self.fn, self.name, self.columns = fn, name, columns

    def single(self, inputs: RewardInputs) -> Tensor:
        values = []
        rows = zip(inputs.prompts, inputs.completions, inputs.columns, strict=True)
        for number, (prompt, completion, row) in enumerate(rows):
            result = self.fn(prompt, completion, **self._keywords(row, inputs, number))
            values.append(_number(self.name, result, inputs, number))
        return one_per_completion(values, inputs)

    def batch(self, inputs: RewardInputs) -> Tensor:
        names = dict.fromkeys(name for row in inputs.columns for name in row)
        given: dict[str, Any] = {name: [row.get(name) for row in inputs.columns] for name in names}
        given["prompts"] = list(inputs.prompts)
        given["completions"] = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(inputs.prompts, inputs.completions, strict=True)
        ]
        if inputs.completion_ids is not None:
            given["completion_ids"] = [list(ids) for ids in inputs.completion_ids]
        result = self.fn(**self._keywords(given, inputs, 0)) if len(inputs) else []
        if isinstance(result, (str, bytes)) or not hasattr(result, "__len__"):
            raise ConfigError(
                f"reward {self.name!r} must return a list of B={len(inputs)} numbers, got {_shown(result)}"
            )
        if len(result) != len(inputs):
            raise ConfigError(f"reward {self.name!r} must return B={len(inputs)} numbers, got {len(result)}")
        return one_per_completion([_number(self.name, value, inputs, i) for i, value in enumerate(result)], inputs)

    def _keywords(self, given: Mapping[str, Any], inputs: RewardInputs, number: int) -> dict[str, Any]:
        chosen = self.columns.chosen(given)
        if missing := [name for name in self.columns.required if name not in chosen]:
            raise ConfigError(
                f"reward {self.name!r} needs the column {missing[0]!r}, which {inputs.describe(number)} lacks; its "
                f"columns: {', '.join(inputs.columns[number]) or 'none'}"
            )
        return chosen


def _number(name: str, value: Any, inputs: RewardInputs, number: int) -> float:
    result = number_of(value)
    if result is None:
        raise ConfigError(
            f"reward {name!r} must give a number, got {_shown(value)} for {inputs.describe(number)}"
            + ("; return 0.0 where the reward does not apply" if value is None else "")
        )
    if not math.isfinite(result):
        raise ConfigError(f"reward {name!r} must give a finite number, got {result} for {inputs.describe(number)}")
    return result


def _shown(value: Any) -> str:
    return f"{repr(value)[:60]} ({type(value).__name__})"
