from __future__ import annotations

import numpy as np
import pytest

from powerflow_fast.errors import ConfigError
from powerflow_fast.rewards import boxed_answer
from powerflow_fast.rewards.formats import format_penalties, resolve_format


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (r"so the answer is \boxed{42}.", True),
        (r"\boxed {\frac{1}{2}}", True),
        (r"\boxed{} then \boxed{x}", True),
        (r"\boxed{\{1, 2\}}", True),
        (r"\boxed{\text{a \} b}}", True),
        (r"\boxed\boxed{1}", True),
        ("", False),
        ("42", False),
        (r"\boxed", False),
        (r"\boxed 42", False),
        (r"\boxed{}", False),
        (r"\boxed{ " + "\n}", False),
        (r"\boxed{42", False),
        (r"\boxed{\frac{1}{2}", False),
        (r"\boxed{42\}", False),
        ("boxed{42}", False),
        ("\\boxed{1\\", False),
    ],
)
def test_boxed_answer(text, ok):
    assert boxed_answer("q", text, answer=1) is ok


def test_resolve_format():
    assert resolve_format("boxed") is boxed_answer and resolve_format(None) is None
    assert resolve_format(boxed_answer) is boxed_answer
    with pytest.raises(ConfigError, match="one of boxed, got 'boxd'; did you mean 'boxed'"):
        resolve_format("boxd")
    with pytest.raises(ConfigError, match="a function or a name, got int"):
        resolve_format(3)


def test_format_penalties():
    rows = [{"answer": "a", "level": 1}, {"answer": "b", "completion": "the reference", "prompt": "x"}]
    penalties = [
        format_penalties(f, ["p", "q"], ["a", "c"], rows, penalty=-0.5)
        for f in (
            None,
            lambda prompt, completion, answer: completion == answer,
            lambda prompt, completion, **columns: columns == {"answer": "b"},
            lambda prompt, completion: np.bool_(prompt == "p"),
        )
    ]
    assert penalties == [[0, 0], [0, -0.5], [-0.5, 0], [0, -0.5]]
    with pytest.raises(ConfigError, match=r"must return True or False, got 0\.5 \(float\)"):
        format_penalties(lambda p, c: 0.5, ["p"], ["a"], [{}], penalty=-0.5)
