"""Answers: extraction against a brute-force scanner, equivalence, clusters."""

from __future__ import annotations

import sys
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerflow_fast.errors import ConfigError
from powerflow_fast.rewards import boxed_answer, extract_answer, same_answer
from powerflow_fast.rewards.answers import cluster_answers, normalized_answer, resolve_equivalence, same_answer_math


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        (r"\boxed{1} then \boxed{ }", "1"),
        (r"\boxed{1} then \boxed{2", "1"),
        (r"\boxed {  \frac{1}{2} }", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"} \boxed{3} {", "3"),
        ("\\boxed\n{x\ny}", "x\ny"),
        (r"a \\ \boxed{1 \\ 2} b", r"1 \\ 2"),
        (r"a\\\boxed{1}", "1"),
        ("", None),
        (r"\boxed 42", None),
        (r"boxed{42}", None),
        (r"\boxed{42\}", None),
        (r"\boxed{}", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer
    assert boxed_answer("q", text) is (answer is not None)


def brute_force(text: str) -> str | None:
    """Every start of a box by itself, the last that closes wins."""
    answer, start = None, 0
    while (start := text.find(r"\boxed", start)) >= 0:
        start += len(r"\boxed")
        rest = text[start:].lstrip()
        depth, k = 0, 0
        while rest.startswith("{") and k < len(rest):
            if rest[k] == "\\":
                k += 1  # and the character behind it
            else:
                depth += {"{": 1, "}": -1}.get(rest[k], 0)
            if depth == 0:
                answer = rest[1:k].strip() or answer
                break
            k += 1
    return answer


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([r"\boxed", "{", "}", "\\", " ", "7", "\n", r"\{", r"\}"]), max_size=14))
def test_extract_answer_is_the_last_box_that_closes(parts):
    text = "".join(parts)
    assert extract_answer(text) == brute_force(text), repr(text)


def test_extract_answer_of_a_degenerate_completion_is_linear():
    start = time.perf_counter()
    assert extract_answer(r"\boxed{" * 20_000) is None
    assert time.perf_counter() - start < 5, "a scan from every box would take minutes"


@pytest.mark.parametrize(
    ("answer", "other"),
    [
        (r"\dfrac{1}{2}", r"\tfrac {1} {2}."),
        ("$ 42 $", "42"),
        (r"\text{New York}", r"New\ York"),
        (r"\left( 1,\, 2 \right)", "(1,2)"),
        (r"\mathrm{cm}", " cm. "),
        (r"3~\mbox{kg}", "3kg"),
    ],
)
def test_same_answer(answer, other):
    assert same_answer(answer, other) and same_answer(other, answer)


@pytest.mark.parametrize(
    ("answer", "other"),
    [("1,000", "1000"), ("0.5", r"\frac{1}{2}"), ("a", "A"), (r"\leftarrow", "arrow"), ("1.5", "15"), (r"\$5", "5")],
)
def test_other_answer(answer, other):
    assert not same_answer(answer, other)


def test_normalized_answer_keeps_escaped_dollars_and_line_breaks():
    assert normalized_answer(r"$5\$") == r"$5\$"
    assert normalized_answer(r"1 \\ 2") == r"1\\2"


def test_cluster_answers():
    assert cluster_answers(["1", None, "2", "1.", "", None, " 2", "$ $"]) == [0, 1, 2, 0, 3, 4, 2, 5]
    assert cluster_answers([]) == []


def test_cluster_answers_asks_with_the_first_answer_of_a_cluster_as_reference():
    asked = []

    def within_one(first, answer):
        asked.append((first, answer))
        return abs(int(first) - int(answer)) <= 1

    # 3 is within one of 2, but 2's cluster began with 1
    assert cluster_answers(["1", "2", "3"], within_one) == [0, 0, 1]
    assert asked == [("1", "2"), ("1", "3")]


def test_resolve_equivalence(monkeypatch):
    assert resolve_equivalence("normalized") is same_answer
    assert resolve_equivalence(str.startswith) is str.startswith
    with pytest.raises(
        ConfigError, match="one of normalized, math_verify, got 'math_verfy'; did you mean 'math_verify'"
    ):
        resolve_equivalence("math_verfy")
    with pytest.raises(ConfigError, match="a function or a name, got int"):
        resolve_equivalence(3)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"needs math-verify .*pip install 'powerflow-fast\[math\]'"):
        resolve_equivalence("math_verify")


def test_same_answer_math():
    pytest.importorskip("math_verify")
    assert resolve_equivalence("math_verify") is same_answer_math
    for answer, other in [
        (r"\frac{1}{2}", "0.5"),
        ("1,000", "1000"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("London", "London"),
    ]:
        assert same_answer_math(answer, other), (answer, other)
    for answer, other in [("1", "2"), (r"\frac{1}{2}", r"\frac{1}{"), ("x", "}{"), ("London", "Paris"), ("", "0")]:
        assert not same_answer_math(answer, other), (answer, other)
    assert cluster_answers([r"\frac12", "0.5", "2", None], same_answer_math) == [0, 0, 1, 2]


def test_same_answer_math_in_another_thread_says_why_not():
    pytest.importorskip("math_verify")
    errors = []

    def compare():
        try:
            same_answer_math("1", "2")
        except ConfigError as error:
            errors.append(str(error))

    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert len(errors) == 1 and "main thread only" in errors[0]


def test_same_answer_math_takes_a_late_alarm_for_no():
    library = pytest.importorskip("math_verify")
    errors = pytest.importorskip("math_verify.errors")

    def late(*_):
        raise errors.TimeoutException

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "verify", late)
        assert not same_answer_math("1", "2")
