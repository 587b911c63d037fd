"""The study of a real model, on a tiny one: its rows, its page, its scorer."""

from __future__ import annotations

import importlib
import itertools
from pathlib import Path

import numpy
import pytest
from tiny import tiny_model, tiny_tokenizer

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
if not (STUDIES / "common.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)

import common  # noqa: E402
import real_model  # noqa: E402


@pytest.fixture
def tiny_smollm2(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    model = tiny_model()
    model.config.max_position_embeddings = 512  # the prompts are long for one token per letter
    model.save_pretrained(folder)
    tiny_tokenizer(chat_template=True).save_pretrained(folder)
    monkeypatch.setattr(real_model, "smollm2_model", lambda: folder)
    lengths = lambda texts: numpy.array([[1.0, len(text)] for text in texts])  # noqa: E731
    stages = importlib.import_module("powerflow_fast.evaluation.evaluate")
    monkeypatch.setattr(stages, "minilm_encoder", lambda: lengths)


def test_before_and_after(tiny_smollm2, tmp_path, monkeypatch):
    turns = itertools.cycle([1.0, 0.0])  # one of the two completions of each problem is right
    monkeypatch.setattr(real_model, "last_number", lambda prompt, completion, **columns: next(turns))
    assert common.main(real_model.STUDY, ["--quick", "--output", str(tmp_path)]) == 0
    rows = common.load(tmp_path / "results/real_model.jsonl")
    assert [(row["task"], row["alpha"]) for row in rows] == [("creative", 0.5), ("reasoning", 2.0)]
    creative, reasoning = (row["changes"] for row in rows)
    assert set(real_model.UNITS) - set(creative) == {"accuracy", "pass@8", "distinct_answers"}
    assert {"accuracy", "pass@2"} <= set(reasoning)
    assert reasoning["accuracy"][:2] == [0.5, 0.5] and reasoning["pass@2"][:2] == [1.0, 1.0]
    assert len(rows[0]["alpha_reached"]) == 3
    for row in rows:
        before, after, low, high, prompts = row["changes"]["base_logp"]
        assert prompts == 2 and low <= after - before <= high
        assert len(row["history"]["length"]) == row["steps"] == 1
        assert row["tokens_trained"] == row["history"]["length"][0] * 2
        assert len(row["samples"]) == len(row["prompts"]) == 2
    page = (tmp_path / "real_model.md").read_text("utf-8")
    assert "α = 2 makes more answers right" in page and "before:" in page


def test_a_direction_needs_the_interval_of_every_seed():
    def rows(*intervals):
        return [{"task": "creative", "changes": {"entropy": [1.0, 1.5, *interval, 12]}} for interval in intervals]

    def held(*intervals):
        return real_model.claims(rows(*intervals))[0].held

    assert held((0.1, 0.9)) is True
    assert held((0.1, 0.9), (0.2, 0.3)) is True
    assert held((0.1, 0.9), (-0.1, 0.3)) is None and held((None, None)) is None


def test_the_last_number_is_the_answer():
    problem = real_model.prompts_of("reasoning", 1, held_out=True)[0]
    score = lambda text: real_model.last_number(problem.text, text, family=problem.family, entry=problem.entry)  # noqa: E731
    assert score(f"It is 77, no: {problem.entry['answer']}.") == 1.0
    assert score(f"{problem.entry['answer']} or 977") == 0.0 and score("no idea") == 0.0
