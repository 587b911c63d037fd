from __future__ import annotations

import inspect

import numpy
import pytest
import torch

from powerflow_fast.evaluation.scorers import NamedScorer
from powerflow_fast.rewards import RewardInputs, user_reward
from powerflow_fast.rewards.formats import format_penalties
from powerflow_fast.tools.user_functions import Columns, number_of

ROW = {"prompt": "p", "completion": "c", "question": "q", "answer": 4, "level": 2}


@pytest.mark.parametrize(
    ("function", "chosen", "required"),
    [
        (lambda prompt, completion: 0, {}, ()),
        (lambda prompt, completion, answer, other=1: 0, {"answer": 4}, ("answer",)),
        (lambda prompt, completion, *rest, answer: 0, {"answer": 4}, ("answer",)),
        (lambda prompt, completion, **columns: 0, {"question": "q", "answer": 4, "level": 2}, ()),
        (lambda question, text, answer, **columns: 0, {"answer": 4, "level": 2}, ("answer",)),
        (lambda question, text, /, **columns: 0, {"question": "q", "answer": 4, "level": 2}, ()),
    ],
)
def test_columns_that_a_function_gets(function, chosen, required):
    columns = Columns.of(inspect.signature(function))
    assert columns.chosen(ROW) == chosen and columns.required == required
    function("p", "c", **columns.chosen(ROW))


def test_a_column_may_have_the_name_of_the_first_parameter():
    """A file's column "question" and ``score(question, text, **columns)``: given once."""

    def score(question, text, **columns):
        assert set(columns) == {"answer", "level"}
        return float(text == str(columns["answer"]))

    def right(question, text, **columns):
        return score(question, text, **columns) == 1.0

    assert NamedScorer("score", score)("What?", "4", **ROW) == 1.0
    assert format_penalties(right, ["What?"] * 2, ["4", "5"], [ROW] * 2, penalty=-0.5) == [0.0, -0.5]
    inputs = RewardInputs(
        prompts=["What?"] * 2,
        completions=["4", "5"],
        columns=[ROW] * 2,
        group_ids=torch.tensor([0, 0]),
        cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32),
        finished=[True] * 2,
    )
    assert user_reward(score).function(inputs).tolist() == [1.0, 0.0]


def test_what_counts_as_a_number():
    for value in (1, 1.0, True, numpy.float32(1), numpy.ones(1)[0], torch.tensor(1.0), torch.ones(1)):
        assert number_of(value) == 1.0
    for value in (None, "1", b"1", [], [1], torch.ones(2), object()):
        assert number_of(value) is None
