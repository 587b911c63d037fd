"""Prompts: read from lists, datasets or files, checked in one pass, tokenised, and ordered without any state."""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from .errors import ConfigError, DataError

__all__ = [
    "PromptDataset",
    "PromptRow",
    "check_lengths",
    "encode_prompt",
    "epoch_order",
    "load_prompts",
    "prompt_indices",
]

COLUMNS = ("prompt", "messages", "question")


@dataclass(frozen=True)
class PromptRow:
    """One prompt: text or chat messages, the row's other columns, and where it came from (for error messages)."""

    prompt: str | list[dict[str, Any]]
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = "prompt"


class PromptDataset(Sequence[PromptRow]):
    """Random access to checked prompts. ``fingerprint`` depends on the content alone, not on where it is stored."""

    def __init__(self, size: int, read: Callable[[int], tuple[Any, str]], *, name: str, column: str | None = None):
        if size == 0:
            raise DataError(f"{name}: holds no prompts")
        self._size, self._read, self._column, self.name = size, read, column, name
        digest = hashlib.sha256()
        for row in self:  # checks every row before a model is loaded
            digest.update(json.dumps([row.prompt, row.extra], sort_keys=True, default=str).encode())
            digest.update(b"\n")
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> PromptRow:  # type: ignore[override]
        if not 0 <= index < self._size:
            raise IndexError(f"prompt {index} of {self._size}")
        raw, where = self._read(index)
        return _row(raw, where, self._column)

    def __iter__(self) -> Iterator[PromptRow]:
        return (self[i] for i in range(self._size))

    @property
    def description(self) -> str:
        """For a model card: name, number of prompts, start of the fingerprint."""
        return f"{self.name} ({self._size} prompts, sha256 of their content {self.fingerprint[:12]})"


def load_prompts(prompts: Any, *, column: str | None = None) -> PromptDataset:
    """Prompts from a list of strings or chat message lists, a ``datasets.Dataset``, or a .jsonl/json/parquet/txt file.

    A row of a table holds its prompt in ``column``, by default the first of "prompt", "messages", "question"; its other
    columns go to ``format_fn`` as keywords. A .txt file has one prompt per non-blank line. Line files are not held in
    memory: only the offset of each line is. :class:`DataError` names the file, line or row, and what is wrong with it.
    """
    if isinstance(prompts, PromptDataset):
        return prompts
    if isinstance(prompts, (str, os.PathLike)):
        return _load_file(Path(prompts), column)
    if isinstance(prompts, (list, tuple)):
        return PromptDataset(len(prompts), lambda i: (prompts[i], f"prompts[{i}]"), name="a list", column=column)
    if type(prompts).__module__.split(".")[0] == "datasets":
        import datasets

        if isinstance(prompts, datasets.Dataset):
            name = prompts.info.dataset_name or "a dataset"
            return PromptDataset(len(prompts), lambda i: (prompts[i], f"{name}[{i}]"), name=name, column=column)
        hint = f"pass one of its splits {list(prompts)}" if isinstance(prompts, dict) else "pass a datasets.Dataset"
        raise DataError(f"prompts: cannot use a {type(prompts).__name__}: {hint}")
    raise DataError(
        "prompts must be a list of strings or of chat messages, a datasets.Dataset, or a path to a .jsonl, .json, "
        f".parquet or .txt file, got {type(prompts).__name__}"
    )


def encode_prompt(
    row: PromptRow,
    tokenizer: Any,
    *,
    use_chat_template: bool | Literal["auto"] = "auto",
    system_prompt: str | None = None,
    max_prompt_length: int | None = None,
) -> list[int]:
    """Token ids of one prompt, ready to be continued by the model.

    Chat messages go through the tokenizer's chat template; so does text when ``use_chat_template`` is True, or "auto"
    and there is a template. Other text is tokenised as it is. The result starts with at most one BOS and never ends in
    an EOS that the tokenizer added. Over ``max_prompt_length`` tokens is a :class:`DataError`.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    is_chat = not isinstance(row.prompt, str)
    if is_chat or use_chat_template is True or (use_chat_template == "auto" and has_template):
        if not has_template:
            raise DataError(f"{row.where}: needs a chat template, and this tokenizer has none; pass plain text prompts")
        if use_chat_template is False:
            raise DataError(f"{row.where}: is a list of chat messages, but use_chat_template is False")
        messages = row.prompt if is_chat else [{"role": "user", "content": row.prompt}]
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise whatever their author chose, e.g. for roles that must alternate
            raise DataError(f"{row.where}: the tokenizer's chat template refused this prompt: {error}") from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote the special tokens itself
    else:
        if system_prompt is not None:
            raise ConfigError("system_prompt needs a chat template: put the text into the prompts instead")
        ids = tokenizer(row.prompt)["input_ids"]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:  # the text began with a written-out BOS
            ids = ids[1:]
        if eos is not None and ids[-1:] == [eos] and not row.prompt.endswith(tokenizer.eos_token):
            ids = ids[:-1]
    if not ids:
        raise DataError(f"{row.where}: the tokenizer makes no tokens of this prompt")
    if max_prompt_length is not None and len(ids) > max_prompt_length:
        raise DataError(f"{row.where}: prompt has {len(ids)} tokens, max_prompt_length is {max_prompt_length}")
    return list(ids)


def check_lengths(
    dataset: Sequence[PromptRow],
    tokenizer: Any,
    *,
    max_prompt_length: int,
    use_chat_template: bool | Literal["auto"] = "auto",
    system_prompt: str | None = None,
) -> int:
    """Tokens of the longest prompt; :class:`DataError` naming the first of those over ``max_prompt_length``."""
    options = {"use_chat_template": use_chat_template, "system_prompt": system_prompt}
    longest, too_long = 0, []
    for row in dataset:
        length = len(encode_prompt(row, tokenizer, **options))
        longest = max(longest, length)
        if length > max_prompt_length:
            too_long.append((row.where, length))
    if too_long:
        shown = ", ".join(f"{where} ({length} tokens)" for where, length in too_long[:5])
        raise DataError(
            f"{len(too_long)} of {len(dataset)} prompts are longer than max_prompt_length={max_prompt_length}: {shown}"
            f"{', ...' if len(too_long) > 5 else ''}. Shorten or remove them, or set max_prompt_length={longest}"
        )
    return longest


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """A permutation of ``range(n)`` that depends on ``(n, seed, epoch)`` alone."""
    return list(_epoch_order(n, seed, epoch))


def prompt_indices(step: int, prompts_per_generation: int, n: int, seed: int) -> list[int]:
    """Indices of the prompts of rollout ``step`` (from 0): its slice of the epochs' permutations laid end to end.

    A resumed run asks for the same slice and gets the same prompts. A rollout at the end of an epoch continues into the
    next one, so it may hold a prompt twice.
    """
    first = step * prompts_per_generation
    return [_epoch_order(n, seed, k // n)[k % n] for k in range(first, first + prompts_per_generation)]


@lru_cache(maxsize=2)
def _epoch_order(n: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _load_file(path: Path, column: str | None) -> PromptDataset:
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise DataError(f"{path}: {reason}; prompts must be a file, or a list of strings to pass text directly")
    kind, name = path.suffix.lower(), path.name
    try:
        if kind in (".jsonl", ".txt"):
            return _load_lines(path, column)
        if kind == ".json":
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(rows, list):
                raise DataError(f"{path}: must hold a JSON array of prompts, got {type(rows).__name__}")
            return PromptDataset(len(rows), lambda i: (rows[i], f"{path}[{i}]"), name=name, column=column)
        if kind == ".parquet":
            from pyarrow import parquet

            table = parquet.read_table(path)
            return PromptDataset(
                len(table), lambda i: (table.slice(i, 1).to_pylist()[0], f"{path}[{i}]"), name=name, column=column
            )
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:  # pyarrow's error for a broken parquet file is an OSError or ValueError
        raise DataError(f"{path}: cannot read: {error.strerror or error}") from error
    except ValueError as error:
        raise error if isinstance(error, DataError) else DataError(f"{path}: cannot read: {error}") from error
    raise DataError(f"{path}: prompts must be a .jsonl, .json, .parquet or .txt file, got {kind or 'no extension'}")


def _load_lines(path: Path, column: str | None) -> PromptDataset:
    """A .jsonl or .txt file of which only the byte offset and number of each non-blank line are kept."""
    offsets, numbers, position = array("Q"), array("Q"), 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip(b"\xef\xbb\xbf \t\r\n"):
                offsets.append(position)
                numbers.append(number)
            position += len(line)
    if not offsets:
        raise DataError(f"{path}: the file is empty")
    is_json = path.suffix.lower() == ".jsonl"

    def read(index: int) -> tuple[Any, str]:
        where = f"{path}:{numbers[index]}"
        with open(path, "rb") as file:
            file.seek(offsets[index])
            line = file.readline()
        try:
            text = line.decode("utf-8-sig")
            return (json.loads(text) if is_json else text.rstrip("\r\n")), where
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: not UTF-8 text: {error.reason}") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not valid JSON: {error.msg} at column {error.colno}") from error

    return PromptDataset(len(offsets), read, name=path.name, column=column)


def _row(raw: Any, where: str, column: str | None) -> PromptRow:
    """``raw`` (text, messages, or a dict with a prompt column) as a checked :class:`PromptRow`."""
    extra: dict[str, Any] = {}
    if isinstance(raw, dict):
        name = column or next((c for c in COLUMNS if c in raw), None)
        if name not in raw:
            wanted = repr(column) if column else "one of " + ", ".join(map(repr, COLUMNS))
            found = ", ".join(map(repr, raw)) or "none"
            raise DataError(f"{where}: no prompt column: expected {wanted}, found {found}")
        extra = {k: v for k, v in raw.items() if k != name}
        raw = raw[name]
    if isinstance(raw, str):
        if not raw.strip():
            raise DataError(f"{where}: the prompt is blank")
        return PromptRow(raw, extra, where)
    if not isinstance(raw, (list, tuple)):
        raise DataError(f"{where}: a prompt must be a string or a list of chat messages, got {type(raw).__name__}")
    if not raw:
        raise DataError(f"{where}: the list of chat messages is empty")
    for k, message in enumerate(raw):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: message {k} must be a dict of 'role' and 'content' strings, got {message!r:.80}")
    if raw[-1]["role"] == "assistant":
        raise DataError(f"{where}: the last message is the assistant's: remove the answer, the model writes its own")
    if not raw[-1]["content"].strip():
        raise DataError(f"{where}: the prompt is blank: its last message has no text")
    return PromptRow(list(raw), extra, where)
