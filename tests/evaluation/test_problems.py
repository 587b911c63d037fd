from __future__ import annotations

import json
import random

import pytest

from powerflow_fast.data import PromptRow
from powerflow_fast.errors import ConfigError, DataError
from powerflow_fast.evaluation import SCORERS, ProblemSet, load_problems
from powerflow_fast.evaluation.creative_prompts import CREATIVE_HELD_OUT
from powerflow_fast.evaluation.problems import BENCHMARKS, BOXED, LETTER, TAGGED

# A row of each dataset, with the columns that it has on the hub.
RAW = {
    "math500": {"problem": " What is $1+1$? ", "solution": "...", "answer": "2", "level": 1, "subject": "Prealgebra"},
    "olympiadbench": {"question": "Find all x.", "final_answer": ["1", "$-2$"], "is_multiple_answer": True},
    "aime24": {"id": 60, "problem": "How many?", "solution": "...", "answer": "204", "year": "2024"},
    "aime25": {"problem": "How many?", "answer": "70", "id": "0"},
    "amc23": {"id": 0, "question": "Which?", "answer": "27.0", "url": "u"},
    "gpqa_diamond": {
        "Question": "Which one?\n",
        "Correct Answer": "right ",
        "Incorrect Answer 1": "wrong 1",
        "Incorrect Answer 2": "wrong 2",
        "Incorrect Answer 3": "wrong 3",
    },
    "mmlu_pro": {"question": "Which?", "options": [f"option {k}" for k in range(10)], "answer": "I", "category": "law"},
}
ANSWERS = {
    "math500": "2",
    "olympiadbench": "1, $-2$",
    "aime24": "204",
    "aime25": "70",
    "amc23": "27.0",
    "mmlu_pro": "I",
}


@pytest.fixture
def hub(monkeypatch):
    """``datasets.load_dataset`` that knows what is put into it, and records what it is asked for."""
    import datasets

    known, calls = {}, []

    def load_dataset(path, name=None, *, split):
        calls.append((path, name, split))
        if path not in known:
            raise ConnectionError(f"Couldn't reach '{path}' on the Hub\nlong trace")
        return datasets.Dataset.from_list(known[path])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return known, calls


@pytest.mark.parametrize("name", RAW)
def test_benchmarks_from_the_hub(hub, name):
    known, calls = hub
    benchmark = BENCHMARKS[name]
    known[benchmark.dataset] = [RAW[name]]
    problems = load_problems(name)
    assert calls == [(benchmark.dataset, benchmark.config, benchmark.split)]
    (row,) = problems.rows
    letters = benchmark.scorer == "choice"
    assert problems.name == name and problems.scorer is SCORERS[benchmark.scorer]
    assert row.prompt.endswith(LETTER if letters else BOXED) and row.where == f"{benchmark.dataset}[0]"
    assert row.extra["answer"] == ANSWERS.get(name, row.extra["answer"])
    assert benchmark.dataset in problems.description and "(1 problems)" in problems.description
    if not letters:
        assert row.prompt.split("\n\n")[0] == RAW[name][benchmark.columns[0]].strip()


def test_every_benchmark_is_tested():
    assert set(RAW) == set(BENCHMARKS)


def test_mmlu_pro_lists_its_options(hub):
    hub[0]["TIGER-Lab/MMLU-Pro"] = [RAW["mmlu_pro"]]
    prompt = load_problems("mmlu_pro").rows[0].prompt
    assert prompt.startswith("Which?\n\nA) option 0\nB) option 1\n") and "\nJ) option 9\n\nReason" in prompt


def test_gpqa_choices_have_an_order_of_their_own_that_the_seed_fixes(hub):
    known, _ = hub
    known["Idavidrein/gpqa"] = [{**RAW["gpqa_diamond"], "Question": f"Which one of {k}?"} for k in range(40)]
    rows = load_problems("gpqa_diamond").rows
    for row in rows:
        lines = dict(line.split(") ") for line in row.prompt.split("\n")[2:6])
        assert lines[row.extra["answer"]] == "right" and sorted(lines) == list("ABCD")
    letters = [row.extra["answer"] for row in rows]
    assert {letters.count(letter) > 3 for letter in "ABCD"} == {True}
    random.seed(5)  # no dependence on anything but seed and text
    assert [r.prompt for r in load_problems("gpqa_diamond").rows] == [r.prompt for r in rows]
    assert [r.extra["answer"] for r in load_problems("gpqa_diamond", seed=1).rows] != letters
    known["Idavidrein/gpqa"] = known["Idavidrein/gpqa"][7:8]
    assert load_problems("gpqa_diamond").rows[0].prompt == rows[7].prompt


def test_a_hub_out_of_reach_is_told_with_the_file_that_does_instead(hub, tmp_path):
    with pytest.raises(DataError) as error:
        load_problems("olympiadbench")
    message = str(error.value)
    assert "Hothan/OlympiadBench (configuration OE_TO_maths_en_COMP, split train)" in message
    assert "ConnectionError: Couldn't reach 'Hothan/OlympiadBench' on the Hub)" in message
    assert "--problems olympiadbench:FILE.jsonl (or .parquet) with its columns 'question', 'final_answer'" in message
    file = tmp_path / "copy.jsonl"
    file.write_text(json.dumps(RAW["olympiadbench"]) + "\n")
    problems = load_problems(f"olympiadbench:{file}")
    assert problems.rows[0].prompt == "Find all x." + BOXED and problems.rows[0].extra["answer"] == "1, $-2$"
    assert problems.rows[0].where == f"{file}:1" and str(tmp_path) not in problems.description
    file.write_text(json.dumps({"question": "Find all x.", "answer": "1"}) + "\n")
    with pytest.raises(
        DataError, match=r"copy.jsonl:1: benchmark 'olympiadbench' needs the column 'final_answer', found"
    ):
        load_problems(f"olympiadbench:{file}")


def test_files_and_lists(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "1+1?", "answer": 2}\n{"question": "2+2?", "answer": 4}\n')
    problems = load_problems(str(file))
    assert problems.name == "mine" and len(problems) == 2 and problems.scorer is SCORERS["math"]
    assert (problems.rows[1].prompt, problems.rows[1].extra) == ("2+2?", {"answer": 4})
    assert str(tmp_path) not in problems.description
    assert load_problems(file, scorer="exact").scorer is SCORERS["exact"]
    assert load_problems(["a", "b"]).scorer is None
    assert load_problems([{"prompt": "a", "answer": 1}, {"prompt": "b"}]).scorer is SCORERS["math"]
    with pytest.raises(DataError, match=r"prompts\[1\]: the prompt is not Unicode text: surrogates not allowed"):
        load_problems(["a", "half of \ud83d"])
    chat = [{"role": "user", "content": "hi"}]
    assert load_problems([chat], instruction=" there").rows[0].prompt == [{"role": "user", "content": "hi there"}]


def test_a_problem_set_can_be_cut_and_rescored():
    problems = load_problems([{"prompt": f"p{i}", "answer": i} for i in range(20)])
    few = load_problems(problems, limit=5, scorer="exact")
    numbers = [int(row.prompt[1:]) for row in few.rows]
    assert few.scorer is SCORERS["exact"] and numbers == sorted(numbers) and numbers != list(range(5))
    assert [r.prompt for r in load_problems(problems, limit=5).rows] == [r.prompt for r in few.rows]
    assert [r.prompt for r in load_problems(problems, limit=5, seed=1).rows] != [r.prompt for r in few.rows]
    assert len(load_problems(problems, limit=50)) == 20 and "5 of them" in few.description
    assert few.fingerprint != problems.fingerprint == load_problems(problems).fingerprint


def test_the_fingerprint_reads_prompts_and_columns():
    def of(*rows):
        return ProblemSet("n", rows, None, "d").fingerprint

    row = PromptRow("p", {"answer": "1"}, "here")
    assert of(row) == of(PromptRow("p", {"answer": "1"}, "elsewhere"))
    assert of(row) != of(PromptRow("p", {"answer": "2"})) != of(PromptRow("q", {"answer": "2"}))
    assert of(PromptRow("p", {"entry": {1, 2}})) == of(PromptRow("p", {"entry": {3}}))  # no JSON: its type counts


def test_creative():
    problems = load_problems("creative", limit=3)
    assert len(problems) == 3 and problems.scorer is None
    assert all(row.prompt in CREATIVE_HELD_OUT for row in problems.rows)


def test_reasoning_gym_tasks():
    gym = pytest.importorskip("reasoning_gym")
    problems = load_problems("reasoning_gym:chain_sum?size=4&seed=2&min_terms=2&max_terms=2")
    entries = list(gym.create_dataset("chain_sum", size=4, seed=2, min_terms=2, max_terms=2))
    assert [row.prompt for row in problems.rows] == [entry["question"].strip() + TAGGED for entry in entries]
    assert problems.scorer is SCORERS["reasoning_gym"] and "max_terms=2" in problems.description
    for row, entry in zip(problems.rows, entries, strict=True):
        assert problems.scorer(row.prompt, f"<answer>{entry['answer']}</answer>", **row.extra) == 1.0
    assert len(load_problems("reasoning_gym:chain_sum")) == 50


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("math50", "problems 'math50' are neither a benchmark (math500, "),
        ("math50", "did you mean 'math500'?"),
        ("nowhere.jsonl", "nowhere.jsonl: does not exist"),
        ("reasoning_gym:chain_sun", "there is no task 'chain_sun'; did you mean 'chain_sum'?"),
        ("reasoning_gym:chain_sum?size", "must have the form option=value&option=value, got 'size'"),
        ("reasoning_gym:chain_sum?sise=3", "reasoning-gym refuses these options (TypeError: "),
        ("reasoning_gym:chain_sum?min_terms=0", "reasoning-gym refuses these options (AssertionError: "),
        (3, "prompts must be a list"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(DataError) as error:
        load_problems(source)
    assert message in str(error.value)


@pytest.mark.parametrize("limit", [0, -1, True, 2.0])
def test_bad_limits(limit):
    with pytest.raises(ConfigError, match=r"load_problems: limit must be a positive integer or None, got"):
        load_problems(["a"], limit=limit)
