"""Problem sets: prompts with what is needed to score their completions, by benchmark name, task, file or list."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..data import PromptRow, load_prompts
from ..errors import ConfigError, DataError, suggest
from .creative_prompts import creative_prompts
from .scorers import SCORERS, NamedScorer, Scorer, resolve_scorer

BOXED = "\n\nReason step by step, and put your final answer within \\boxed{}."
LETTER = "\n\nReason step by step, and put the letter of your choice within \\boxed{}."
TAGGED = "\n\nGive your final answer between <answer> and </answer>."
_LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class ProblemSet:
    """Checked rows of problems with their scorer; :func:`load_problems` makes it."""

    name: str
    rows: Sequence[PromptRow]
    scorer: NamedScorer | None
    """None: nothing says which completion is right."""
    description: str
    """Where the problems came from, for reports; without the path of a file."""

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of prompts and columns; of values that JSON has not, the type alone."""
        digest = hashlib.sha256()
        for row in self.rows:
            text = json.dumps([row.prompt, row.extra], sort_keys=True, default=lambda value: type(value).__name__)
            digest.update(text.encode() + b"\n")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Benchmark:
    """A dataset of the Hugging Face Hub as a problem set."""

    dataset: str
    split: str
    columns: tuple[str, ...]
    """Columns that ``convert`` reads; the first is the question."""
    convert: Callable[[Mapping[str, Any], int], dict[str, Any]]
    """From a row and the seed to the columns "prompt" and "answer", and others."""
    scorer: str
    config: str | None = None
    instruction: str = BOXED


def _question(
    row: Mapping[str, Any], seed: int, *, question: str = "problem", answer: str = "answer"
) -> dict[str, Any]:
    value = row[answer]
    # OlympiadBench lists the answers of a problem that has several.
    value = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return {"prompt": str(row[question]).strip(), "answer": str(value).strip()}


def _choices(question: str, choices: Sequence[str]) -> str:
    lines = [f"{letter}) {str(choice).strip()}" for letter, choice in zip(_LETTERS, choices, strict=False)]
    return "\n".join([question.strip(), "", *lines])


def _gpqa(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """The right answer comes first in the data: each problem has its own order, from the seed and its text."""
    question = str(row["Question"])
    choices = [str(row[name]) for name in ("Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3)))]
    order = list(range(len(choices)))
    random.Random(f"{seed}/{question}").shuffle(order)
    return {"prompt": _choices(question, [choices[k] for k in order]), "answer": _LETTERS[order.index(0)]}


def _mmlu_pro(row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    prompt = _choices(str(row["question"]), row["options"])
    return {"prompt": prompt, "answer": str(row["answer"]), "category": row["category"]}


_GPQA_COLUMNS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
_AS_QUESTION = functools.partial(_question, question="question")

BENCHMARKS: dict[str, Benchmark] = {
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", ("problem", "answer"), _question, "math"),
    "olympiadbench": Benchmark(
        "Hothan/OlympiadBench",
        "train",
        ("question", "final_answer"),
        functools.partial(_question, question="question", answer="final_answer"),
        "math",
        config="OE_TO_maths_en_COMP",  # open-ended, text only, mathematics, English, competitions
    ),
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", ("problem", "answer"), _question, "math"),
    "aime25": Benchmark("math-ai/aime25", "test", ("problem", "answer"), _question, "math"),
    "amc23": Benchmark("math-ai/amc23", "test", ("question", "answer"), _AS_QUESTION, "math"),
    "gpqa_diamond": Benchmark(
        "Idavidrein/gpqa", "train", _GPQA_COLUMNS, _gpqa, "choice", config="gpqa_diamond", instruction=LETTER
    ),
    "mmlu_pro": Benchmark(
        "TIGER-Lab/MMLU-Pro",
        "test",
        ("question", "options", "answer", "category"),
        _mmlu_pro,
        "choice",
        instruction=LETTER,
    ),
}
CREATIVE = "creative"
_NAMES = (*BENCHMARKS, CREATIVE)
_GYM = "reasoning_gym:"


def load_problems(
    source: Any,
    *,
    limit: int | None = None,
    seed: int = 0,
    scorer: str | Scorer | None = "auto",
    instruction: str | None = None,
) -> ProblemSet:
    """Problems from one of these sources:

    * a benchmark: "math500", "olympiadbench", "aime24", "aime25", "amc23", "gpqa_diamond", "mmlu_pro", which are read
      from the Hugging Face Hub; or "math500:FILE", a copy of that dataset (.jsonl, .json, .parquet) with its columns;
    * "creative": the demo's 12 held-out requests for poems, stories and jokes, without a scorer;
    * "reasoning_gym:TASK?size=50&seed=0&option=value": any task of reasoning-gym with its own options;
    * a file, a list or a ``datasets.Dataset`` as for :func:`powerflow_fast.data.load_prompts`; what is right stands in
      the column "answer";
    * a :class:`ProblemSet`, to cut it or to give it another scorer.

    Args:
        limit: at most so many problems, drawn with ``seed`` and kept in their order; None takes all.
        seed: of that draw and of the order of GPQA's choices. Tasks of reasoning-gym have a seed of their own.
        scorer: a name or a function (:mod:`.scorers`); "auto" is the benchmark's own, "math" for a file
            or list that has the column "answer", else None.
        instruction: text after every prompt; None is the benchmark's own ("... within \\boxed{}"), and none for files
            and lists. Of chat messages the last one gets it.

    Raises:
        DataError: unknown name, a dataset that cannot be reached (the message says which file does instead), a missing
            or broken file, a bad row, a column that the scorer needs.
        ConfigError: a bad ``limit``, scorer, or option.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ConfigError(f"load_problems: limit must be a positive integer or None, got {limit!r}")
    problems = _read(source, seed, instruction)
    chosen = resolve_scorer(problems.scorer if isinstance(scorer, str) and scorer == "auto" else scorer)
    rows: Sequence[PromptRow] = problems.rows
    for row in rows:
        try:
            json.dumps(row.prompt, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{row.where}: the prompt is not Unicode text: {error.reason}") from error
    description = problems.description
    if limit is not None and limit < len(rows):
        kept = sorted(random.Random(f"{seed}/limit").sample(range(len(rows)), limit))
        rows = [rows[i] for i in kept]
        description += f", {limit} of them"
    return ProblemSet(problems.name, rows, chosen, description)


def _read(source: Any, seed: int, instruction: str | None) -> ProblemSet:
    """All problems of ``source`` with its own scorer."""
    if isinstance(source, ProblemSet):
        rows = _instructed(source.rows, instruction or "")
        return ProblemSet(source.name, rows, source.scorer, source.description)
    if isinstance(source, str):
        name, _, path = source.partition(":")
        if source.startswith(_GYM):
            return _reasoning_gym(source.removeprefix(_GYM), instruction)
        if name in BENCHMARKS:
            return _benchmark(name, path, seed, instruction)
        if source == CREATIVE:
            rows = [PromptRow(p.text, where=f"creative[{i}]") for i, p in enumerate(creative_prompts(held_out=True))]
            rows = _instructed(rows, instruction or "")
            return ProblemSet(CREATIVE, rows, None, f"the demo's creative requests ({len(rows)})")
        if not Path(source).suffix and not Path(source).exists():
            raise DataError(
                f"problems {source!r} are neither a benchmark ({', '.join(_NAMES)}, reasoning_gym:TASK)"
                f"{suggest(source, _NAMES)} nor a file"
            )
    prompts = load_prompts(source)
    name = Path(source).stem if isinstance(source, (str, os.PathLike)) else prompts.name
    rows = _instructed(list(prompts), instruction or "")
    scorer = SCORERS["math"] if any("answer" in row.extra for row in rows) else None
    return ProblemSet(name, rows, scorer, prompts.description)


def _instructed(rows: Sequence[PromptRow], instruction: str) -> Sequence[PromptRow]:
    if not instruction:
        return rows

    def with_text(row: PromptRow) -> PromptRow:
        if isinstance(row.prompt, str):
            return PromptRow(row.prompt + instruction, row.extra, row.where)
        *first, last = row.prompt
        return PromptRow([*first, {**last, "content": last["content"] + instruction}], row.extra, row.where)

    return [with_text(row) for row in rows]


def _benchmark(name: str, path: str, seed: int, instruction: str | None) -> ProblemSet:
    benchmark = BENCHMARKS[name]
    source = f"{benchmark.dataset}, {benchmark.config or 'default'}, {benchmark.split}"
    if path:
        file = load_prompts(path, column=benchmark.columns[0])
        raw = [({benchmark.columns[0]: row.prompt, **row.extra}, row.where) for row in file]
        source = file.description
    else:
        raw = [(row, f"{benchmark.dataset}[{i}]") for i, row in enumerate(_from_hub(name, benchmark))]
    rows = []
    for row, where in raw:
        if missing := [c for c in benchmark.columns if row.get(c) is None]:
            found = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where}: benchmark {name!r} needs the column {missing[0]!r}, found {found}")
        columns = benchmark.convert(row, seed)
        rows.append(PromptRow(columns.pop("prompt"), columns, where))
    rows = _instructed(rows, benchmark.instruction if instruction is None else instruction)
    return ProblemSet(name, rows, SCORERS[benchmark.scorer], f"{source} ({len(rows)} problems)")


def _from_hub(name: str, benchmark: Benchmark) -> Any:
    import datasets

    try:
        return datasets.load_dataset(benchmark.dataset, benchmark.config, split=benchmark.split)
    except Exception as error:  # a hub that is out of reach, a gated dataset, a new layout: each raises its own type
        lines = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
        where = f"{benchmark.dataset} (configuration {benchmark.config or 'default'}, split {benchmark.split})"
        columns = ", ".join(map(repr, benchmark.columns))
        raise DataError(
            f"benchmark {name!r} is the dataset {where} of the Hugging Face Hub, which could not be loaded ({reason}). "
            f"Give a copy of it as --problems {name}:FILE.jsonl (or .parquet) with its columns {columns}"
        ) from error


def _reasoning_gym(text: str, instruction: str | None) -> ProblemSet:
    task, _, query = text.partition("?")
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise ConfigError(
            f"problems {_GYM}{task} need reasoning-gym ({error}); run: pip install 'powerflow-fast[eval]'"
        ) from error
    if task not in DATASETS:
        raise DataError(f"problems {_GYM}{text}: there is no task {task!r}{suggest(task, DATASETS)}")
    try:
        options = {"size": 50, "seed": 0} | {
            key: _value(value) for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        }
    except ValueError as error:
        raise DataError(
            f"problems {_GYM}{text}: what follows '?' must have the form option=value&option=value, got {query!r}"
        ) from error
    try:
        entries = list(reasoning_gym.create_dataset(task, **options))
    except Exception as error:  # tasks check their options by assert, and some need files of their own
        raise DataError(
            f"problems {_GYM}{text}: reasoning-gym refuses these options ({type(error).__name__}: {error})"
        ) from error
    rows = [
        PromptRow(
            str(entry["question"]).strip(),
            {"answer": entry["answer"], "task": task, "entry": entry},
            f"{_GYM}{task}[{i}]",
        )
        for i, entry in enumerate(entries)
    ]
    rows = _instructed(rows, TAGGED if instruction is None else instruction)
    shown = "&".join(f"{key}={value}" for key, value in options.items())
    return ProblemSet(f"{_GYM}{task}", rows, SCORERS["reasoning_gym"], f"reasoning-gym {task} ({shown})")


def _value(text: str) -> Any:
    """A number, true, false, null or a JSON list where ``text`` is one, else itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
