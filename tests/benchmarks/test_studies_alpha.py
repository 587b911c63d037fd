"""The study of α: what it takes for exact is exact, its short form runs, and its claims follow the rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import one_thread  # noqa: F401 - matrices are tiny

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
if not (STUDIES / "common.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)

import alpha_sweep  # noqa: E402
import arithmetic  # noqa: E402
import common  # noqa: E402
import enumerable  # noqa: E402
import training  # noqa: E402


@torch.no_grad()
def test_what_is_compared_with_is_exact():
    model, _, words = enumerable.enumerable_lm(ends=True)
    base = enumerable.log_probs(model, words)
    lengths = torch.tensor([len(word) for word in words])
    assert float(base.exp().sum()) == pytest.approx(1, abs=1e-6) and len(set(words)) == len(words)
    one_by_one = [
        model(torch.tensor([[0, *word]])).logits[0, :-1].double().log_softmax(-1)[range(len(word)), list(word)].sum()
        for word in words[::50]
    ]
    torch.testing.assert_close(base[::50], torch.stack(one_by_one), rtol=0, atol=1e-5)
    chances = base.exp()
    ids = torch.tensor([[0, *word, *[0] * (4 - len(word))] for word in words])
    logp = model(ids).logits.double().log_softmax(-1)
    passed = torch.arange(5) < lengths[:, None]  # the places where a letter is drawn
    entropies = (-(logp.exp() * logp).sum(-1)).where(passed, 0.0).sum(1)
    mean = float(chances @ entropies / (chances @ lengths.double()))
    assert alpha_sweep.entropy_of(chances, words) == pytest.approx(mean, rel=1e-5)
    torch.testing.assert_close(alpha_sweep.target_of(base, words, 1.0), chances, rtol=0, atol=1e-6)
    target = alpha_sweep.target_of(base, words, 3.0)
    for quantity, value in alpha_sweep.both(target, base, words).items():
        assert alpha_sweep.exact_alpha(base, words, quantity, value) == pytest.approx(3, rel=1e-6)


def test_the_short_form_measures_and_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "FOLDER", tmp_path)
    arithmetic.arithmetic_base(tmp_path, arithmetic.QUICK)
    study = alpha_sweep.STUDY
    assert common.main(study, ["--quick", "--output", str(tmp_path)]) == 0
    rows = common.load(study.rows_file(tmp_path))
    assert [row["model"] for row in rows] == ["enumerable", "enumerable", "arithmetic"]
    assert common.differences(study, tmp_path) == []
    assert "| enumerable, entropy | 0 |" in study.page_file(tmp_path).read_text()
    search = rows[1]
    assert search["again"] != search["reached"] and len(search["alphas"]) == len(search["values"]) == 2


def row(alpha, reached, **more):
    found = {
        "model": "enumerable",
        "alpha": alpha,
        "seed": 0,
        "reached": reached,
        "exact_alpha": 2.0,
        "found_alpha": 2.1,
    }
    return found | more


def test_claims_follow_the_rows():
    fixed = [
        row(alpha, {"entropy": entropy, "logp": -entropy}, target={"entropy": 1.01 * entropy, "logp": -1.0})
        for alpha, entropy in ((1.0, 1.2), (2.0, 0.8))
    ]
    good = row("auto:entropy=1", {"entropy": 1.04, "logp": -1.0}, again={"entropy": 0.97, "logp": -1.0})
    sums = [
        {"model": "arithmetic", "alpha": a, "reached": {"accuracy": a / 4, "entropy": 0.4, "answers": 5 - a}}
        for a in (1.0, 2.0)
    ]
    claims = alpha_sweep.claims([*fixed, good, *sums])
    assert len(claims) == 7 and all(claim.held for claim in claims)
    assert "1 of 1 runs; the largest distance is +4.0%, for `auto:entropy=1`" in claims[0].numbers
    bad = row("auto:logp=-2", {"entropy": 1.0, "logp": -2.2}, found_alpha=3.0)
    worse = [fixed[0], {**fixed[1], "reached": {"entropy": 1.3, "logp": -0.9}}, good, bad, sums[0], {**sums[1], **bad}]
    worse[-1] |= {"model": "arithmetic", "alpha": 2.0, "reached": {"accuracy": 0.1, "entropy": 0.4, "answers": 6}}
    held = [claim.held for claim in alpha_sweep.claims(worse)]
    assert held == [False, False, True, False, False, False, False]
