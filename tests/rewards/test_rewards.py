"""Rewards: definitions by hand and against logits in fp64, the two forms of user functions, names and errors."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FLOOR

from powerflow_fast.errors import ConfigError
from powerflow_fast.ops import linear_logprob_stats
from powerflow_fast.rewards import (
    REWARDS,
    Reward,
    RewardInputs,
    empo,
    intuitor,
    rent,
    resolve_reward,
    ttrl,
    user_reward,
)


def box(answer: str | None) -> str:
    return "no idea" if answer is None else rf"so \boxed{{{answer}}}"


def make(completions, group_ids, *, lengths=None, columns=None, prompts=None, **stats) -> RewardInputs:
    b = len(completions)
    lengths = [1] * b if lengths is None else lengths
    return RewardInputs(
        prompts=[f"question {g}" for g in group_ids] if prompts is None else prompts,
        completions=completions,
        columns=[{}] * b if columns is None else columns,
        group_ids=torch.tensor(group_ids, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        finished=[True] * b,
        **stats,
    )


# EMPO and TTRL

# two groups, interleaved; in the first "1" three times, "2" twice, and one without an answer
ANSWERS = ["2", "1", "x", "1", None, "y", "2", "1.", None, "x"]
GROUPS = [5, 5, -2, 5, 5, -2, 5, 5, -2, -2]


def test_empo_by_hand():
    out = empo(make([box(a) for a in ANSWERS], GROUPS))
    sixth = 1 / 6
    expected = [2 * sixth, 0.5, 0.5, 0.5, sixth, 0.25, 2 * sixth, 0.5, 0.25, 0.5]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.tensor(expected))


def test_empo_without_answers_gives_each_its_own_cluster():
    assert empo(make(["", "no", "no", r"\boxed{ }"], [0] * 4)).tolist() == [0.25] * 4


def test_ttrl_by_hand():
    assert ttrl(make([box(a) for a in ANSWERS], GROUPS)).tolist() == [0, 1, 1, 1, 0, 0, 0, 1, 0, 1]


def test_ttrl_breaks_ties_by_the_first_answer_and_ignores_missing_ones():
    assert ttrl(make([box(a) for a in ["b", "a", "a", "b"]], [0] * 4)).tolist() == [1, 0, 0, 1]
    assert ttrl(make([box(a) for a in [None, None, None, "a", "b"]], [0] * 5)).tolist() == [0, 0, 0, 1, 0]
    assert ttrl(make([box(None)] * 3, [0] * 3)).tolist() == [0, 0, 0]


def test_rewards_of_answers_use_the_equivalence():
    inputs = make([box(a) for a in ["4", "-4", "5", "6"]], [0] * 4)

    def same_size(first, answer):
        return abs(int(first)) == abs(int(answer))

    assert empo(inputs).tolist() == [0.25] * 4
    assert resolve_reward("empo", answer_equivalence=same_size)(inputs).tolist() == [0.5, 0.5, 0.25, 0.25]
    assert resolve_reward(ttrl, answer_equivalence=same_size)(inputs).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("reward", [empo, ttrl])
def test_a_group_of_one_is_an_error(reward):
    inputs = make([box("1")] * 3, [0, 1, 0])
    with pytest.raises(
        ValueError, match=rf"{reward.__name__}: a group must have two or more .* completion 1 of prompt"
    ):
        reward(inputs)


# Intuitor and RENT


def logit_inputs(lengths, groups, v=37, dtype=torch.float64):
    g = torch.Generator().manual_seed(1)
    n, h = sum(lengths), 8
    hidden, weight = (torch.randn(size, h, generator=g, dtype=torch.float64) for size in (n, v))
    hidden, weight = hidden.to(dtype), (2 * weight).to(dtype)
    logits = hidden.double() @ weight.double().T
    return hidden, weight, logits, functools.partial(make, [""] * len(lengths), groups, lengths=lengths)


def test_self_certainty_is_the_kl_from_uniform_plus_log_v():
    _, _, logits, _ = logit_inputs([6], [0])
    v = logits.shape[-1]
    uniform = torch.full((v,), 1 / v, dtype=torch.float64)
    kl = (uniform * (uniform.log() - logits.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(logits.logsumexp(-1) - logits.mean(-1), kl + math.log(v), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lengths", [[3, 1, 4, 2], [5, 0, 2, 1]])
def test_rewards_of_confidence_against_logits(lengths):
    hidden, weight, logits, inputs_of = logit_inputs(lengths, [0, 0, 1, 1], dtype=torch.float32)
    labels = torch.zeros(len(hidden), dtype=torch.int64)
    stats = linear_logprob_stats(hidden, weight, labels)
    inputs = inputs_of(entropy=stats.entropy, lse=stats.lse, mean_logit=stats.mean_logit, logps=stats.logp)
    logp = logits.log_softmax(-1)
    for reward, per_token in ((intuitor, -logp.mean(-1)), (rent, (logp.exp() * logp).sum(-1))):
        parts = per_token.split(lengths)
        expected = [parts[i].mean() if lengths[i] else parts[1 - i].mean() for i in range(4)]
        out = reward(inputs)
        assert out.dtype == torch.float32 and not out.requires_grad
        error = (out.double() - torch.stack(expected)).abs().max()
        assert error <= 4 * FLOOR[torch.float32] * float(logits.abs().max()), (reward.__name__, error)


def test_completions_without_tokens_move_no_baseline():
    entropy = torch.tensor([1.0, 3.0, 8.0])
    inputs = make([""] * 6, [0, 0, 0, 1, 2, 2], lengths=[1, 1, 0, 0, 0, 1], entropy=entropy)
    # group 1 has no token at all
    assert rent(inputs).tolist() == [-1, -3, -2, 0, -8, -8]


@pytest.mark.parametrize(("reward", "missing"), [(intuitor, "lse and mean_logit"), (rent, "entropy")])
def test_missing_statistics_are_named(reward, missing):
    with pytest.raises(ValueError, match=f"{reward.__name__}: {missing} must be given.*linear_logprob_stats"):
        reward(make(["a"], [0]))


# Functions of text

ROWS = [{"answer": "a", "level": 1}, {"answer": "b", "level": 2, "completion": "reference", "prompt": "x"}]


def text_inputs(**options):
    return make(["a", "c"], [0, 0], columns=ROWS, prompts=["p", "q"], **options)


def test_one_completion_at_a_time():
    def named(prompt, completion, answer):
        return completion == answer

    class Length:
        def __call__(self, prompt, completion, *, level, **rest):
            assert set(rest) == {"answer"}
            return len(completion) + level

    for fn, expected in [
        (named, [1, 0]),
        (Length(), [2, 3]),
        (lambda q, text: np.float32(0.5) if q == "p" else torch.tensor(2.0), [0.5, 2]),
        (lambda *args, **columns: len(args) + len(columns), [4, 4]),
    ]:
        out = user_reward(fn)(text_inputs())
        assert out.dtype == torch.float32 and out.tolist() == expected
    assert [user_reward(named).name, user_reward(Length()).name, user_reward(named, name="x").name] == [
        "named",
        "Length",
        "x",
    ]


def test_whole_batches():
    def named(completions, answer):
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def everything(prompts, completions, **columns):
        assert prompts == ["p", "q"] and columns == {
            "answer": ["a", "b"],
            "level": [1, 2],
            "completion_ids": [[1], [2]],
        }
        return np.array([1, 2])

    assert user_reward(named)(text_inputs()).tolist() == [1, 0]
    assert user_reward(everything)(text_inputs(completion_ids=[[1], [2]])).tolist() == [1, 2]
    assert user_reward(lambda completions, **kw: torch.tensor([3.0, 4.0]))(text_inputs()).tolist() == [3, 4]


def test_a_batch_function_gets_messages_for_chat_prompts():
    def conversational(completions, **kwargs):
        return [len(completion[0]["content"]) for completion in completions]

    chat = [[{"role": "user", "content": "q"}]] * 2
    inputs = make(["abc", "d"], [0, 0], prompts=chat)
    assert user_reward(conversational)(inputs).tolist() == [3, 1]
    assert user_reward(lambda prompt, completion: len(completion))(inputs).tolist() == [3, 1]


@pytest.mark.parametrize(
    ("fn", "match"),
    [
        (lambda p, c: math.nan, r"'<lambda>' must give a finite number, got nan for completion 0 of prompt 'p'"),
        (lambda p, c: "1.0", r"must give a number, got '1\.0' \(str\) for completion 0 of prompt 'p'"),
        (lambda p, c: None if p == "q" else 1, r"got None \(NoneType\) for completion 1 of prompt 'q'; return 0\.0"),
        (lambda p, c: [1.0, 2.0], r"must give a number, got \[1\.0, 2\.0\] \(list\)"),
        (lambda p, c: torch.zeros(2), r"must give a number, got tensor.* \(Tensor\)"),
        (lambda p, c: 1e39, r"must be finite in fp32, got inf for completion 0"),
        (
            lambda p, c, solution: 1.0,
            r"needs the column 'solution', which completion 0 of prompt 'p' lacks.*answer, level",
        ),
        (lambda completions: [1.0], r"must return B=2 numbers, got 1"),
        (lambda completions: 1.0, r"must return a list of B=2 numbers, got 1\.0 \(float\)"),
        (lambda completions: "ab", r"must return a list of B=2 numbers, got 'ab' \(str\)"),
        (lambda completions: [0.0, -math.inf], r"must give a finite number, got -inf for completion 1 of prompt 'q'"),
        (lambda completions, completion_ids: [0, 0], r"needs the column 'completion_ids'"),
    ],
)
def test_faults_of_a_function_name_it_and_the_prompt(fn, match):
    with pytest.raises(ConfigError, match=match):
        user_reward(fn)(text_inputs())


@pytest.mark.parametrize(
    "fn",
    [
        lambda completion: 1,
        lambda **columns: 1,
        lambda completion, answer: 1,
        lambda p, answer, completion: 1,
        lambda: 1,
    ],
)
def test_a_function_of_neither_form_is_refused(fn):
    with pytest.raises(ConfigError, match=r"must take \(prompt, completion, \*\*columns\), or .* `completions`"):
        user_reward(fn)


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda inputs: [1.0, 2.0], "reward 'mine' must return a floating-point tensor, got list"),
        (lambda inputs: torch.ones(2, dtype=torch.int64), "floating-point tensor, got torch.int64"),
        (lambda inputs: torch.ones(2, 1), r"must return shape \(B,\)=\(2,\), got \(2, 1\)"),
        (
            lambda inputs: torch.tensor([0.0, math.nan]),
            "must be finite in fp32, got nan for completion 1 of prompt 'q'",
        ),
    ],
)
def test_faults_of_a_reward_are_named(function, match):
    with pytest.raises(ConfigError, match=match):
        Reward("mine", function)(text_inputs())


def test_long_prompts_are_cut_in_errors():
    inputs = make(["a"], [0], prompts=["word " * 100])
    with pytest.raises(ConfigError) as error:
        user_reward(lambda p, c: None)(inputs)
    assert "word word" in str(error.value) and len(str(error.value)) < 250


# Names, lists, weights


def test_names_and_needs():
    assert list(REWARDS) == ["empo", "intuitor", "rent", "ttrl"]
    for name, stats, groups in [("empo", 0, 1), ("ttrl", 0, 1), ("intuitor", 1, 0), ("rent", 1, 0)]:
        reward = resolve_reward(name)
        assert (reward.needs_stats, reward.needs_groups, reward.names) == (stats, groups, [name])
    both = resolve_reward(["empo", lambda p, c: 0.0, rent])
    assert both.needs_stats and both.needs_groups and both.names == ["empo", "<lambda>", "rent"]


def test_weighted_sum():
    inputs = make([box(a) for a in ["1", "1", "2"]], [0] * 3)
    reward = resolve_reward(["empo", lambda p, c: len(c), lambda p, c: 1.0, ttrl], weights=[3, 0.5, -1, 2.0])
    each = reward.each(inputs)
    assert list(each) == ["empo", "<lambda>", "<lambda>_2", "ttrl"]
    length = len(box("1"))
    expected = torch.tensor([3 * 2 / 3 + length / 2 - 1 + 2] * 2 + [3 * 1 / 3 + length / 2 - 1])
    torch.testing.assert_close(reward(inputs), expected)
    assert torch.equal(reward.total(each), reward(inputs)) and reward(inputs).dtype == torch.float32
    native = Reward("native", lambda i: i.group_ids.double(), needs_stats=True)
    assert resolve_reward(native).needs_stats and resolve_reward((native,))(inputs).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("reward", "options", "match"),
    [
        ("tttrl", {}, "one of empo, intuitor, rent, ttrl, got 'tttrl'; did you mean 'ttrl'"),
        (["empo", "accuracy!"], {}, r"one of empo, intuitor, rent, ttrl, got 'accuracy!'$"),
        (3, {}, "a function or a name, got int"),
        ([], {}, "at least one reward, got an empty list"),
        ("empo", {"weights": [1, 2]}, "one number for each of 1 rewards, got 2"),
        ("empo", {"weights": 1.0}, "one number for each of 1 rewards, got float"),
        ("empo", {"weights": [math.inf]}, "finite numbers, got inf"),
        ("empo", {"weights": [True]}, "finite numbers, got True"),
        ("empo", {"answer_equivalence": "exact"}, "answer_equivalence must be one of normalized, math_verify"),
    ],
)
def test_what_resolve_reward_rejects(reward, options, match):
    with pytest.raises(ConfigError, match=match):
        resolve_reward(reward, **options)


def test_an_empty_rollout():
    inputs = make([], [], entropy=torch.zeros(0), lse=torch.zeros(0), mean_logit=torch.zeros(0))
    reward = resolve_reward([*REWARDS, lambda p, c: 1.0, lambda completions: []])
    assert reward(inputs).shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"completions": ["a"]}, ValueError, "completions must have B=2 entries, as many as group_ids, got 1"),
        ({"finished": [True] * 3}, ValueError, "finished must have B=2 entries"),
        ({"completion_ids": [[1]]}, ValueError, "completion_ids must have B=2 entries"),
        ({"group_ids": [0, 0]}, TypeError, "group_ids must be a torch.Tensor, got list"),
        ({"group_ids": torch.zeros(2, 1)}, ValueError, r"group_ids must have shape \(B,\), got \(2, 1\)"),
        ({"group_ids": torch.zeros(2)}, TypeError, "group_ids must be torch.int64 or torch.int32, got torch.float32"),
        (
            {"cu_seqlens": torch.tensor([0, 2], dtype=torch.int32)},
            ValueError,
            r"cu_seqlens must have shape \(B\+1,\)=\(3,\)",
        ),
        ({"cu_seqlens": [0, 1, 2]}, TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 1, 3], dtype=torch.int32)}, ValueError, "cu_seqlens must rise from 0 to N=2"),
        (
            {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="meta")},
            ValueError,
            "cu_seqlens must be on .* cpu, got",
        ),
        ({"logps": torch.zeros(2, device="meta")}, ValueError, "logps must be on group_ids' device cpu, got meta"),
        ({"lse": torch.zeros(3)}, ValueError, r"lse must have shape \(N,\)=\(2,\), got \(3,\)"),
        ({"logps": torch.zeros(2, dtype=torch.int64)}, TypeError, "logps must be torch.float32 or torch.float64"),
    ],
)
def test_inputs_are_checked(change, error, match):
    valid = vars(text_inputs(entropy=torch.zeros(2)))
    with pytest.raises(error, match=f"RewardInputs: {match}"):
        RewardInputs(**(valid | change))


def test_the_documentation_names_every_reward_and_its_examples_run():
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)`", text, re.MULTILINE) == list(REWARDS)
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        names: dict = {}
        exec(example, names)
        reward = resolve_reward(names["reward"], weights=names.get("weights"))
        inputs = make([box("4"), box(None)], [0, 0], columns=[{"answer": "4"}] * 2, logps=-torch.ones(2))
        assert reward(inputs)[0] > reward(inputs)[1], example


def test_groups_follow_their_first_completions():
    inputs = make(["a"] * 5, [7, -1, 7, 3, -1])
    assert inputs.groups == [[0, 2], [1, 4], [3]] and len(inputs) == 5
