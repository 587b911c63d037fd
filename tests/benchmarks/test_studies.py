"""Studies: their frame, their pages as functions of their rows, and the short form of the study of exact targets."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

from powerflow_fast.objectives import OBJECTIVES

STUDIES = Path(__file__).resolve().parents[2] / "benchmarks" / "studies"
if not (STUDIES / "common.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)

import common  # noqa: E402
import exact_targets  # noqa: E402
from common import Claim, Picture, Study  # noqa: E402

NAMES = sorted(path.stem for path in STUDIES.glob("*.py") if re.search(r"^STUDY\b", path.read_text("utf-8"), re.M))
FIGURES_KB = 300


def fake(**changes):
    """A study of 1/3 and NaN, in two cases for each seed."""

    def draw(figure, rows):
        figure.subplots().plot([row["value"][0] for row in rows], label="line of the fake")

    parts = {
        "name": "fake",
        "title": "Is one third small?",
        "about": "A division.",
        "cases": lambda quick, seeds: [{"side": side, "seed": seed} for seed in seeds for side in ("left", "right")],
        "run": lambda case: [{"value": [1 / 3, float("nan")]}],
        "claims": lambda rows: [
            Claim("It is small.", rows[0]["value"][0] < 0.5, f"It is {rows[0]['value'][0]:.2f}."),
            Claim("It is large.", rows[0]["value"][0] > 0.5, f"Only {rows[0]['value'][0]:.2f}."),
            Claim("It is prime.", None, "Who knows."),
        ],
        "figures": {"line": Picture("One third.", draw, (2.0, 2.0))},
        "body": lambda rows: "## Table\n\n" + common.table(["side"], [[row["side"]] for row in rows]),
    }
    return Study(**parts | changes)


def quick(study, folder, *options):
    return common.main(study, ["--quick", "--output", str(folder), *options])


def test_rows_have_settings_measurements_and_circumstances(tmp_path):
    assert quick(fake(), tmp_path, "--seeds", "3", "4") == 0
    rows = common.load(tmp_path / "results/fake.jsonl")
    assert [(row["side"], row["seed"]) for row in rows] == [("left", 3), ("right", 3), ("left", 4), ("right", 4)]
    assert set(common.ENVIRONMENT) <= set(rows[0]) and rows[0]["quick"] is True and rows[0]["study"] == "fake"
    assert rows[0]["value"] == [0.333333, None] and rows[0]["seconds"] >= 0
    assert len({row["case"] for row in rows}) == 4
    assert "NaN" not in (tmp_path / "results/fake.jsonl").read_text()


def test_a_page_says_first_what_did_not_hold(tmp_path):
    quick(fake(), tmp_path)
    text = (tmp_path / "fake.md").read_text()
    order = ["`python benchmarks/studies/fake.py --quick --seeds 0`", "did not hold", "**It is large.** Only 0.33."]
    order += ["can't be decided", "**It is prime.** Who knows.", "Claims that held", "**It is small.** It is 0.33."]
    order += ["![One third.](figures/fake-line.svg)", "## Table"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    assert "line of the fake" not in text and (tmp_path / "figures/fake-line.svg").is_file()
    none = common.page(fake(claims=lambda rows: []), common.load(tmp_path / "results/fake.jsonl"))
    assert none.count("None.") == 2 and "can't be decided" not in none


def test_a_run_that_was_cut_short_goes_on(tmp_path):
    calls = []

    def run(case):
        calls.append(case["side"])
        if len(calls) == 2:
            raise RuntimeError("power cut")
        yield {"value": [len(calls)]}

    study = fake(run=run)
    with pytest.raises(RuntimeError, match="power cut"):
        quick(study, tmp_path)
    assert [row["side"] for row in common.load(tmp_path / "results/fake.jsonl")] == ["left"]
    quick(study, tmp_path, "--resume")
    rows = common.load(tmp_path / "results/fake.jsonl")
    assert calls == ["left", "right", "right"] and [row["value"] for row in rows] == [[1], [3]]
    assert len({row["case"] for row in rows}) == 2
    quick(study, tmp_path)
    assert len(calls) == 5, "without --resume everything is measured again"


def test_quick_rows_are_never_published(tmp_path, capsys):
    with pytest.raises(SystemExit):
        common.main(fake(), ["--quick"])
    assert "--quick needs an --output of its own" in capsys.readouterr().err
    quick(fake(), tmp_path)
    with pytest.raises(SystemExit, match="other form"):
        common.main(fake(), ["--output", str(tmp_path), "--resume"])


def test_a_case_without_a_seed_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"every case of fake must have a seed, got \{'side': 'left'\}"):
        quick(fake(cases=lambda quick, seeds: [{"side": "left"}]), tmp_path)


def test_differences_see_a_changed_row_page_or_figure(tmp_path, capsys):
    study = fake()
    quick(study, tmp_path)
    assert common.differences(study, tmp_path) == []
    page, figure = tmp_path / "fake.md", tmp_path / "figures/fake-line.svg"
    page.write_text(page.read_text().replace("0.33", "0.34"))
    assert common.differences(study, tmp_path) == ["fake.md"]
    assert common.main(study, ["render", "--check", "--output", str(tmp_path)]) == 1
    assert "fake.md differ" in capsys.readouterr().err
    assert common.main(study, ["render", "--output", str(tmp_path)]) == 0
    assert common.main(study, ["render", "--check", "--output", str(tmp_path)]) == 0
    rows = common.load(tmp_path / "results/fake.jsonl")
    rows[0]["value"][0] = 0.9
    (tmp_path / "results/fake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert common.differences(study, tmp_path) == ["fake.md", "fake-line.svg"]
    common.render(study, tmp_path)
    figure.rename(figure.with_name("fake-old.svg"))
    assert common.differences(study, tmp_path) == ["fake-line.svg", "fake-old.svg"]


def test_every_method_has_a_look_of_its_own():
    assert set(OBJECTIVES) <= set(common.LOOKS)
    for looks in (common.LOOKS, common.LOG_Z_LOOKS):
        assert len({(look.color, look.linestyle, look.marker) for look in looks.values()}) == len(looks)
        assert len({look.label for look in looks.values()}) == len(looks)


@pytest.mark.parametrize("name", NAMES)
def test_committed_pages_are_what_their_rows_give(name):
    study = importlib.import_module(name).STUDY
    assert study.name == name and f"]({name}.md)" in (STUDIES / "README.md").read_text("utf-8")
    if not study.rows_file(STUDIES).is_file():
        assert not study.page_file(STUDIES).exists(), "a page without rows"
        pytest.skip("not measured yet")
    rows = common.load(study.rows_file(STUDIES))
    assert not any(row["quick"] for row in rows) and all(row["commit"] for row in rows)
    assert common.differences(study, STUDIES) == [], f"run: python benchmarks/studies/{name}.py render"
    text = study.rows_file(STUDIES).read_text("utf-8") + study.page_file(STUDIES).read_text("utf-8")
    assert not re.search(r"/(work|home|tmp|root)/", text)
    assert sum(path.stat().st_size for path in (STUDIES / "figures").glob(f"{name}-*.svg")) <= FIGURES_KB * 1000


# The study of exact targets


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact_targets")
    assert quick(exact_targets.STUDY, folder) == 0
    return folder


@pytest.fixture
def rows(short):
    return common.load(exact_targets.STUDY.rows_file(short))


def test_every_objective_is_trained_at_every_alpha(rows):
    assert {row["objective"] for row in rows} == set(OBJECTIVES)
    for alpha in {row["alpha"] for row in rows}:
        exact = common.select(rows, alpha=alpha, samples=None, world="ending")
        assert {row["objective"] for row in exact} == set(OBJECTIVES) - {"grpo"}
    assert {row["log_z"] for row in common.select(rows, objective="la_tb")} == {
        "group",
        "learned",
        "table",
        "one_for_all",
    }
    for row in rows:
        series = [value for value in row.values() if isinstance(value, list)]
        assert {len(value) for value in series} == {len(row["at"])} and len(series) >= 10
        assert row["at"][0] == 0 and row["at"][-1] == row["steps"]
        assert all(0 <= value <= 1 for value in row["tv_power"]) and min(row["kl_tilted"]) > -1e-6
    trained = common.select(rows, objective="la_tb", samples=None, world="ending")
    assert all(row["tv_own"][-1] < 0.6 * row["tv_own"][0] for row in trained)
    tb = common.select(rows, objective="tb", alpha=4.0, samples=None, world="ending")
    assert all(row["length"][-1] < row["length_base"] and row["length_power"] < row["length_base"] for row in tb)


def test_the_short_form_has_page_and_figures(short):
    study = exact_targets.STUDY
    assert common.differences(study, short) == []
    text = study.page_file(short).read_text("utf-8")
    assert "α = 4, 16 steps exact, 16 from samples" in text and text.count("| LA-TB (PowerFlow) | of the group |") == 2
    figures = {name: study.figure_file(short, name).read_text("utf-8") for name in study.figures}
    assert "TB" in figures["length"] and "from the table" in figures["log_z"] and "GRPO" not in figures["exact"]


def verdicts(rows):
    return {claim.text: claim.held for claim in exact_targets.claims(rows)}


def only(found, part):
    (text,) = [text for text in found if part in text]
    return found[text]


def test_claims_follow_the_rows(rows):
    """Rows of a world where the claims are true, and of one where they are false."""

    def altered(exact, length, group, rate):
        changed = []
        for row in rows:
            row = dict(row)
            count = len(row["at"])
            if "tv_own" in row:
                row["tv_own"] = [exact if row["samples"] is None else 0.1] * count
            row["tv_power"] = [exact] * count
            if row["objective"] == "tb":
                row["length"] = [row["length_base"] * length] * count
            elif row["objective"] == "la_tb":
                row["length"] = [row["length_base"] * 1.2] * count
            if row["log_z"] == "group" and row["objective"] == "la_tb" and row["samples"] is not None:
                row["tv_own"] = [0.1 * group] * count
            if row["log_z_rate"] == 0.01:
                row["tv_own"] = [0.1 * rate] * count
            changed.append(row)
        return verdicts(changed)

    good, bad = altered(0.005, 0.5, 0.8, 0.8), altered(0.2, 0.9, 1.3, 3.0)
    for part in ("LA-TB (PowerFlow) trains to", "log-variance TB and RL-traj train", "relative TB trains", "FlowRL"):
        assert only(good, part) is True and only(bad, part) is False, part
    assert only(good, "With one fixed length LA-TB") is True and only(bad, "With one fixed length LA-TB") is False
    assert only(good, "collapse in length") is True and only(bad, "collapse in length") is False
    assert only(good, "LA-TB keeps the mean length") is False
    assert only(good, "less than TB does") is True and only(bad, "less than TB does") is False
    assert only(good, "From K = 4 samples") is True and only(bad, "From K = 4 samples") is False
    even = altered(0.2, 0.9, 1.0, 1.0)
    assert only(even, "From K = 4 samples") is True
    assert only(even, "as good at any learning rate") is True and only(bad, "as good at any learning rate") is False


def test_ratio_of_distances(rows):
    group = exact_targets.log_z_rows(rows, "group", 16)
    worse = [row | {"tv_own": [2 * value for value in row["tv_own"]]} for row in group]
    assert exact_targets.ratio(worse, group) == pytest.approx((2, 2, 2))
    assert exact_targets.smaller((0.9, 0.8, 0.99)) and exact_targets.smaller((1.2, 1.1, 1.3)) is False
    assert exact_targets.smaller((1.0, 0.9, 1.1)) is None
    assert exact_targets.within((1.0, 0.9, 1.1)) and exact_targets.within((1.2, 1.1, 1.3)) is False
    assert exact_targets.within((1.05, 1.01, 1.2)) is None and exact_targets.within((1.2, 0.9, 1.5)) is None


def test_the_readme_has_what_the_studies_found():
    import overview

    assert overview.main(["--check"]) == 0, "run python benchmarks/studies/overview.py"
    block = overview.block()
    for study in overview.studies():
        assert f"(benchmarks/studies/{study.name}.md): " in block
    assert {study.name for study in overview.studies()} == {
        name for name in NAMES if (STUDIES / f"results/{name}.jsonl").is_file()
    }, "every study that has rows is in it"


def test_a_readme_that_is_not_up_to_date_is_told(tmp_path, monkeypatch):
    import overview

    monkeypatch.setattr(overview, "README", tmp_path / "README.md")
    overview.README.write_text(f"a {overview.BEGIN}\nold\n{overview.END} z\n", encoding="utf-8")
    assert overview.main(["--check"]) == 1
    assert overview.main([]) == 0 and overview.main(["--check"]) == 0
    assert overview.README.read_text("utf-8") == f"a {overview.BEGIN}\n{overview.block()}\n{overview.END} z\n"
