"""What the samplers of an evaluation share: the completion, the options, and the prompt's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from ..data import PromptRow, encode_prompt
from ..errors import ConfigError
from ..models.loading import max_positions
from ..rollout.seeded import SeededDecoder


@dataclass(frozen=True)
class Completion:
    """One completion that a sampler drew."""

    text: str
    """Without special tokens."""
    ids: list[int]
    """Tokens up to and with the end-of-sequence token."""
    finished: bool
    """An end-of-sequence token came before the length limit."""
    generated_tokens: int
    """Tokens that the model had to generate for it, the rejected ones too."""
    note: str = ""
    """What went otherwise than asked for; empty as a rule."""


class ModelSampler:
    """Base of the samplers that decode the model itself.

    Args:
        temperature: of the decoder.
        max_completion_length: most tokens of a completion, end-of-sequence token included.
        batch_size: sequences decoded at once. It changes results by the rounding of the logits alone.
        use_chat_template, system_prompt: as in :func:`powerflow_fast.data.encode_prompt`.
        eos_ids, autocast: as in :class:`powerflow_fast.rollout.HFGenerateEngine`.
    """

    name: str
    settings: dict[str, Any]

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        temperature: float,
        max_completion_length: int = 1024,
        batch_size: int = 32,
        use_chat_template: bool | Literal["auto"] = "auto",
        system_prompt: str | None = None,
        eos_ids: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        own = type(self).__name__
        check_number(own, "temperature", temperature, least=0)
        check_number(own, "max_completion_length", max_completion_length, least=1, whole=True)
        check_number(own, "batch_size", batch_size, least=1, whole=True)
        self.tokenizer = tokenizer
        self.decoder = SeededDecoder(
            model,
            tokenizer,
            temperature=float(temperature),
            max_completion_length=max_completion_length,
            batch_size=batch_size,
            eos_ids=eos_ids,
            autocast=autocast,
        )
        self.prompt_options: dict[str, Any] = {"use_chat_template": use_chat_template, "system_prompt": system_prompt}
        self.settings = {
            "temperature": float(temperature),
            "max_completion_length": max_completion_length,
            "eos_ids": list(self.decoder.eos_ids),
            **self.prompt_options,
        }

    def encode(self, rows: Sequence[PromptRow]) -> list[list[int]]:
        """Token ids of the prompts."""
        return [encode_prompt(row, self.tokenizer, **self.prompt_options) for row in rows]

    def check(self, rows: Sequence[PromptRow]) -> None:
        """ConfigError naming the first row whose prompt leaves no room for a completion: before anything is drawn."""
        self._check_room(rows, self.encode(rows), self.settings["max_completion_length"], "max_completion_length")

    def _check_room(self, rows: Sequence[PromptRow], prompts: Sequence[list[int]], limit: int, option: str) -> None:
        positions = max_positions(self.decoder.model)
        for row, prompt in zip(rows, prompts, strict=True):
            if positions is not None and len(prompt) + limit > positions:
                raise ConfigError(
                    f"{option}: {row.where} has {len(prompt)} tokens, with {limit} more of a completion "
                    f"{len(prompt) + limit}, but the model has positions for {positions}; use a smaller {option}, or "
                    f"shorter prompts"
                )

    def completion(self, ids: Sequence[int], finished: bool, generated_tokens: int, note: str = "") -> Completion:
        """The completion with the text of ``ids``."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, list(ids), finished, generated_tokens, note)


def check_number(where: str, name: str, value: Any, *, least: float, whole: bool = False, above: bool = False) -> None:
    """ConfigError unless ``value`` is a finite number >= ``least`` (``above``: greater), and an int if ``whole``."""
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or value < least or (above and value == least):
        wanted = f"{'an integer' if whole else 'a number'} {'>' if above else '>='} {least}"
        raise ConfigError(f"{where}: {name} must be {wanted}, got {value!r}")


@runtime_checkable
class Sampler(Protocol):
    """Draws completions of prompts.

    What is drawn for a row depends on the seed, the row's prompt, the weights and ``settings``, and not on which other
    rows are in the call. Rows with the same prompt get the same completions.
    """

    name: str
    """As tables show it: ``temperature 1``, ``power sampling α=4``."""
    settings: dict[str, Any]
    """All that the draws depend on beside weights, prompts and seed; JSON-able."""

    def sample(self, rows: Sequence[PromptRow], *, num_samples: int, seed: int) -> list[list[Completion]]:
        """``num_samples`` completions of each row."""
        ...
