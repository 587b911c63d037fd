"""Completions that were made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data import PromptRow
from ..errors import DataError


def read_completions(
    source: str | Path | Sequence[Mapping[str, Any]], rows: Sequence[PromptRow], *, tokenizer: Any = None
) -> list[dict[str, Any]]:
    """Completions that were made elsewhere, as records of a :class:`CompletionStore`.

    ``source`` is a .jsonl file, or a list of its rows. A row has its problem as "problem" (index into ``rows``) or as
    "prompt" (text or messages, as in ``rows``), and its text as "completion", or several as a list "completions".
    "finished" (default true), "ids" (token ids) and "tokens" (their number) are taken where given; else ``tokenizer``
    makes ids of the text, and without one there are none.

    Raises:
        DataError: a row without problem or completion, an unknown problem, or problems with different numbers of
            completions; the line is named.
    """
    name = f"{source}" if isinstance(source, (str, Path)) else "completions"
    lines = list(_rows(source))
    places: dict[str, int | None] = {}
    for i, row in enumerate(rows):
        places[_key(row.prompt)] = None if _key(row.prompt) in places else i
    groups: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(rows))}
    for where, line in lines:
        if not isinstance(line, Mapping):
            raise DataError(f"{where}: must be an object, got {type(line).__name__}")
        key = _key(line.get("prompt"))
        problem = line.get("problem", places.get(key))
        if problem is None and key in places:
            raise DataError(f"{where}: several problems have the prompt {line['prompt']!r:.60}; give their 'problem'")
        if isinstance(problem, bool) or not isinstance(problem, int) or problem not in groups:
            shown = f"'problem' {line['problem']!r}" if "problem" in line else f"'prompt' {line.get('prompt')!r:.60}"
            raise DataError(f"{where}: {shown} is none of the {len(rows)} problems")
        texts = line["completions"] if "completions" in line else [line.get("completion")]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise DataError(f"{where}: needs a text 'completion' or a list of texts 'completions'")
        _check_numbers(where, line)
        for text in texts:
            ids = line.get("ids") if len(texts) == 1 else None
            if ids is None and tokenizer is not None:
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = line.get("tokens") if len(texts) == 1 and "tokens" in line else None if ids is None else len(ids)
            groups[problem].append(
                {
                    "problem": problem,
                    "sample": len(groups[problem]),
                    "prompt": rows[problem].prompt,
                    "completion": text,
                    "tokens": tokens,
                    "generated_tokens": line.get("generated_tokens", tokens or 0),
                    "finished": bool(line.get("finished", True)),
                    "ids": ids,
                }
            )
    if not lines:
        raise DataError(f"{name}: holds no completions")
    sizes = {i: len(group) for i, group in groups.items()}
    most = max(sizes.values(), default=0)
    short = [i for i, size in sizes.items() if size < most or not size]
    if short:
        raise DataError(
            f"{name}: every problem needs the same number of completions; problem {short[0]} "
            f"({rows[short[0]].where}) has {sizes[short[0]]}, others have {most}"
        )
    return [record for group in groups.values() for record in group]


def _check_numbers(where: str, line: Mapping[str, Any]) -> None:
    """DataError for ids and numbers of tokens that are none."""
    ids = line.get("ids")
    if ids is not None and not (isinstance(ids, list) and all(map(_is_count, ids))):
        raise DataError(f"{where}: 'ids' must be a list of token ids, got {ids!r:.60}")
    for name in ("tokens", "generated_tokens"):
        if line.get(name) is not None and not _is_count(line[name]):
            raise DataError(f"{where}: {name!r} must be a number of tokens, got {line[name]!r:.60}")
    if ids is not None and line.get("tokens") not in (None, len(ids)):
        raise DataError(f"{where}: 'tokens' is {line['tokens']}, but there are {len(ids)} 'ids'")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows(source: str | Path | Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, Any]]:
    if not isinstance(source, (str, Path)):
        if not isinstance(source, Iterable):
            raise DataError(f"completions must be a .jsonl file or a list of rows, got {source!r}")
        yield from ((f"completions[{i}]", row) for i, row in enumerate(source))
        return
    path = Path(source)
    if not path.is_file():
        raise DataError(f"completions {path}: {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        with open(path, encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield f"{path}:{number}", json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(f"{path}:{number}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def _key(prompt: Any) -> str:
    return json.dumps(prompt, sort_keys=True, default=str)
