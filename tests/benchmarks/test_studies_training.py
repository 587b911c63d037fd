"""The studies of training: the model that they train, their short forms, and claims that follow the rows."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path

import pytest
import torch
from tiny import one_thread  # noqa: F401 - matrices are tiny

from powerflow_fast.evaluation.scorers import boxed_score
from powerflow_fast.models import load_model

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
if not (STUDIES / "common.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)

import arithmetic  # noqa: E402
import baselines  # noqa: E402
import common  # noqa: E402
import stability  # noqa: E402
import training  # noqa: E402


@pytest.fixture(scope="module")
def demonstrations():
    rng = random.Random(0)
    terms = [tuple(rng.choices(arithmetic.DIGITS, k=4)) for _ in range(4000)]
    return [(t, arithmetic.prompt_of(t), arithmetic.demonstration(t, rng)) for t in terms]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the base model of the short forms is made, once."""
    folder = tmp_path_factory.mktemp("bases")
    arithmetic.arithmetic_base(folder, arithmetic.QUICK)
    return folder


# The base model


def test_the_tokenizer_keeps_demonstrations_and_knows_every_token(demonstrations):
    tokenizer = arithmetic.arithmetic_tokenizer()
    for _, prompt, text in demonstrations:
        ids = tokenizer(prompt + text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == prompt + text
        assert len(tokenizer(text)["input_ids"]) < arithmetic.MAX_COMPLETION  # one is left for the end


def test_demonstrations_have_the_strategies_and_errors_that_the_pages_name(demonstrations):
    found = [arithmetic.strategy_of(prompt, text) for _, prompt, text in demonstrations]
    for strategy, share in arithmetic.STRATEGIES.items():
        # "right" of equal products reads as "left"
        assert found.count(strategy) / len(found) == pytest.approx(share, abs=0.04), strategy
    right = [boxed_score(p, text, answer=str(arithmetic.answer_of(t))) for t, p, text in demonstrations]
    of_left = [r for r, name in zip(right, found, strict=True) if name == "left"]
    of_direct = [r for r, name in zip(right, found, strict=True) if name == "direct"]
    # three steps, of which two errors may cancel
    assert sum(of_left) / len(of_left) == pytest.approx((1 - arithmetic.STEP_ERROR) ** 3, abs=0.05)
    assert sum(of_direct) / len(of_direct) == pytest.approx(1 - arithmetic.DIRECT_ERROR, abs=0.06)


@pytest.mark.parametrize(
    ("completion", "strategy"),
    [
        ("3*7=21; 5*6=30, so 21+30=51. So \\boxed{51}", "left"),
        ("6*5=30; 3*7=20, so 30+20=50. So \\boxed{50}", "right"),
        ("3*7=21; 5*6=30, so 21+30=51, so 30+21=51. So \\boxed{51}", "check"),
        ("7*3=21; 5*6=30. Answer: \\boxed{51}", "brief"),
        ("\\boxed{51}", "direct"),
        ("", "other"),
        ("3*7=21; 5*5=25, so 21+25=46. So \\boxed{46}", "other"),  # another problem
        ("3*7=21. So \\boxed{21}", "other"),
        ("3*7=. So \\boxed{21}", "other"),
    ],
)
def test_strategies_are_read_from_the_steps(completion, strategy):
    assert arithmetic.strategy_of("3*7+5*6=", completion) == strategy


def test_held_out_problems_are_in_no_demonstration():
    held_out, known = (arithmetic.problems(held_out=h) for h in (True, False))
    assert len(held_out) + len(known) == len(list(product(arithmetic.DIGITS, repeat=4)))
    assert 100 < len(held_out) < 220 and not {r["prompt"] for r in held_out} & {r["prompt"] for r in known}
    assert training.FULL.tracked + training.FULL.tested <= len(held_out)
    assert held_out == arithmetic.problems(held_out=True)


def test_the_base_model_is_made_once_and_is_the_same_for_the_same_seed(folder, tmp_path):
    made = arithmetic.arithmetic_base(folder, arithmetic.QUICK)
    assert [path.name for path in folder.iterdir()] == [made.name]
    again = arithmetic.arithmetic_base(tmp_path, arithmetic.QUICK)
    assert again.name == made.name
    first, second = load_model(made).model.state_dict(), load_model(again).model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = arithmetic.arithmetic_base(tmp_path, arithmetic.BaseSettings(**vars(arithmetic.QUICK) | {"seed": 1}))
    assert other.name != made.name


# The short forms


@pytest.mark.parametrize("study", [stability.STUDY, baselines.STUDY], ids=lambda study: study.name)
def test_the_short_form_measures_and_writes_a_page(study, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FOLDER", folder)
    assert common.main(study, ["--quick", "--output", str(tmp_path)]) == 0
    rows = common.load(study.rows_file(tmp_path))
    assert len(rows) == len(study.cases(True, study.quick_seeds))
    assert common.differences(study, tmp_path) == []
    text = study.page_file(tmp_path).read_text()
    assert all(row["method"] in text for row in rows)
    if study is stability.STUDY:
        assert all(len(row[m]) == len(row["steps"]) == 3 for row in rows for m in training.MEASURES)
    else:
        assert all(len(row["correct"]) == training.SHORT.tested for row in rows)


# Claims


def run_of(method, *, alpha=4.0, seed=0, rate=stability.LEARNING_RATE, **ends):
    """A row of study b whose measures go from 10 to ``ends``, or stay."""
    curves = {m: [10.0, ends.get(m, 10.0), ends.get(m, 10.0)] for m in training.MEASURES}
    return {"method": method, "alpha": alpha, "seed": seed, "learning_rate": rate, "steps": [0, 1, 2], **curves}


def verdicts(rows, start):
    found = [claim.held for claim in stability.claims(rows) if claim.text.startswith(start)]
    assert found
    return found


def test_a_collapse_must_show_in_every_seed():
    both = [run_of("TB-traj", alpha=a, length=4.0, seed=s) for s in (0, 1) for a in (4.0, 0.5)]
    la_tb = [run_of("LA-TB", alpha=a) for a in (4.0, 0.5)]
    assert verdicts(both + la_tb, "TB-traj at α = 4 collapses") == [True]
    both[2] = run_of("TB-traj", length=6.0, seed=1)
    assert verdicts(both + la_tb, "TB-traj at α = 4 collapses") == [False]


def test_la_tb_is_compared_at_the_better_rate_of_each():
    other = stability.OTHER_RATES[0]
    rows = [run_of(m, alpha=a) for a in (4.0, 0.5) for m in ("LA-TB", "RL-token")]
    rows += [run_of("LA-TB", rate=other, accuracy=12.0), run_of("RL-token", rate=other, accuracy=11.0)]
    assert verdicts(rows, "LA-TB at α = 4 ends above RL-token") == [True]
    rows[-1] = run_of("RL-token", rate=other, accuracy=13.0)
    assert verdicts(rows, "LA-TB at α = 4 ends above RL-token") == [False]


def test_a_comparison_of_baselines_is_open_where_its_interval_holds_both():
    def row(method, correct):
        rate = {"learning_rate": baselines.BEST_RATE[method]} if method in baselines.TRAINED else {}
        return {"method": method, "seed": 0, "correct": correct, **rate}

    def held(ours, theirs, slack=0.0):
        rows = [row(baselines.OURS, ours), row("base model", theirs)]
        return baselines.compare(rows, "Ours is above.", "base model", "pass", slack=slack)[0].held

    assert held([12, 14, 10, 13], [8, 9, 8, 9]) is True
    assert held([8, 9, 8, 9], [12, 14, 10, 13]) is False
    assert held([8, 14, 8, 14], [10, 11, 10, 11]) is None
    assert held([8, 9, 8, 9], [8, 9, 8, 9]) is False and held([8, 9, 8, 9], [8, 9, 8, 9], slack=0.02) is True
    assert baselines.compare([row(baselines.OURS, [1])], "Ours is above.", "EMPO", "pass") == []


@pytest.mark.parametrize("study", [stability.STUDY, baselines.STUDY], ids=lambda study: study.name)
def test_committed_rows_are_of_the_cases_of_now(study):
    rows = common.load(study.rows_file(STUDIES))
    cases = study.cases(False, study.seeds)
    assert len(rows) == len(cases) and all(len(common.select(rows, **case)) == 1 for case in cases)


def test_each_baseline_has_its_best_learning_rate():
    rows = common.load(baselines.STUDY.rows_file(STUDIES))
    for method, rate in baselines.BEST_RATE.items():
        swept = [row for row in rows if row["method"] == method and row["seed"] == 0]
        assert {row["learning_rate"] for row in swept} == set(baselines.RATES[method])
        best = max(swept, key=baselines.accuracy)
        assert best["learning_rate"] == rate, method
