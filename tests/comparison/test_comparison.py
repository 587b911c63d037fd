from __future__ import annotations

import html.parser
import json
import math
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from powerflow_fast.comparison import write_comparison
from powerflow_fast.comparison.content import choose_prompts, headline, interval, measure_rows, number
from powerflow_fast.comparison.figures import shorten
from powerflow_fast.errors import DataError, PowerFlowError
from powerflow_fast.evaluation import Evaluation, Measure, evaluate, mean_interval, paired_change, pass_at_k
from powerflow_fast.evaluation.statistics import Change

NAN = float("nan")
QUESTIONS = ("How many primes lie below 40?", "What is the sum of the digits of 2^15?", "Solve 3x + 7 = 25 for x.")


def made(name, *, skill=0.4, words=60, prompts=12, samples=8, seed=0, sampler="temperature=1", cost=1.0, **changes):
    """An evaluation of ``prompts`` sums as a model of that skill and vocabulary would leave it, scores drawn here."""
    draws = numpy.random.default_rng(seed)
    hard = numpy.random.default_rng(99).normal(0, 1.5, prompts)  # the same prompts are hard for everyone
    chance = 1 / (1 + numpy.exp(-(math.log(skill / (1 - skill)) - hard)))
    completions = []
    for i in range(prompts):
        for j in range(samples):
            text = " ".join(f"w{draws.integers(words)}" for _ in range(draws.integers(20, 240)))
            score = float(draws.random() < chance[i])
            completions.append(
                {
                    "problem": i,
                    "sample": j,
                    "prompt": f"{i}. {QUESTIONS[i % 3]}",
                    "completion": f"Step by step: {text}\nSo the answer is \\boxed{{{11 if score else 12}}}.",
                    "tokens": len(text.split()),
                    "generated_tokens": round(cost * len(text.split())),
                    "finished": bool(draws.random() < 0.95),
                    "score": score,
                    "logp": -80.0,
                    "base_logp": -90.0,
                    "answer": "11",
                }
            )
    groups = [completions[i * samples : (i + 1) * samples] for i in range(prompts)]
    correct = [int(sum(c["score"] for c in group)) for group in groups]
    bags = [[w for c in group for w in c["completion"].split()] for group in groups]
    per_prompt = {
        "accuracy": [c / samples for c in correct],
        "length": [float(numpy.mean([c["tokens"] for c in group])) for group in groups],
        "finished": [float(numpy.mean([c["finished"] for c in group])) for group in groups],
        "distinct_1": [len(set(bag)) / len(bag) for bag in bags],
    }
    fields = {
        "name": name,
        "problems": "sums",
        "settings": {
            "model": "tiny",
            "num_samples": samples,
            "sampler": {"name": sampler, "temperature": 1.0},
            "seed": seed,
            "confidence": 0.95,
        },
        "measures": {key: mean_interval(values) for key, values in per_prompt.items()},
        "per_prompt": per_prompt,
        "pass_at_k": {k: mean_interval(pass_at_k(correct, samples, k)) for k in (1, 2, 4, 8, 16, 32) if k <= samples},
        "completions": completions,
        "tokens_generated": sum(c["generated_tokens"] for c in completions),
        "seconds": 12.5,
    }
    return Evaluation(**{**fields, **changes})


def without(evaluation, *keys, **changes):
    """``evaluation`` without these measures."""
    kept = {k: v for k, v in evaluation.measures.items() if k not in keys}
    per_prompt = {k: v for k, v in evaluation.per_prompt.items() if k not in keys}
    return replace(evaluation, measures=kept, per_prompt=per_prompt, **changes)


@pytest.fixture(scope="module")
def pair():
    return made("base model"), made("α = 4", skill=0.75, words=25, seed=1, cost=3)


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory):
    """A comparison of two with histories, its HTML and its Markdown."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"step": s, "length": 60 - s, "entropy": 2 / s, "repetition": None, "eval/acc": s / 9} for s in range(1, 9)]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = write_comparison(
        pair, folder / "out", histories={"α = 4": folder / "history.jsonl"}, text="One.\n\n<Two>."
    )
    return written, written.html.read_text(), written.markdown.read_text()


class Checker(html.parser.HTMLParser):
    """Every element is closed in order; what it loads and which ids it has is kept."""

    void = ("meta", "br", "link", "img", "input", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.ids, self.tags = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href") and not value.startswith("#"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.void:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())


def checked(text):
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    return checker


def test_the_page_is_whole_and_loads_nothing(page):
    _, text, _ = page
    seen = checked(text)
    assert not seen.loads and not {"script", "link", "img", "iframe"} & set(seen.tags)
    assert "@import" not in text and not re.findall(r"url\((?!#)", text)
    assert len(seen.ids) == len(set(seen.ids)), "ids of one picture must not be those of another"
    references = set(re.findall(r'(?:url\(#|href="#|aria-labelledby=")([^")]+)', text))
    assert references and references <= set(seen.ids)
    assert seen.tags.count("svg") == 6  # pass@k, plane, cost; length, entropy, eval/acc
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    styles = text[text.index("<style>") : text.index("</style>")]
    for color in ("#222222", "#1f6fb4"):
        assert color in styles and color not in text[text.index("</style>") :], "pictures follow the page's colours"
    assert set(re.findall(r"var\((--[\w-]+)", text)) - {"--color"} <= set(re.findall(r"(--[\w-]+):", styles))
    assert "&lt;Two&gt;" in text and "<p>One.</p>" in text


def test_numbers_are_those_of_paired_changes(pair, page):
    base, sharp = pair
    change = paired_change(base.per_prompt["accuracy"], sharp.per_prompt["accuracy"])
    assert change.moved
    _, text, markdown = page
    value, low, high = (number(x, 3) for x in vars(sharp.measures["accuracy"]).values() if not isinstance(x, int))
    difference, between = number(change.change, 3, sign=True), interval(change, 3)
    assert f"| {value} ({low} to {high})<br>**{difference} ({between})** |" in markdown
    assert f'<b class="better">{difference}</b>' in text and between in text and f"{low} to {high}" in text
    small = paired_change(base.per_prompt["finished"], sharp.per_prompt["finished"])
    assert not small.moved and f"<br>{number(small.change, 3, sign=True)} ({interval(small, 3)}) |" in markdown
    line = page[0].headline
    assert line.startswith(
        f"α = 4: accuracy {value} against {number(change.before, 3)} for base model: {difference} (95 %"
    )
    assert f"{between}, 12 prompts)" in line and "distinct-1 fell" in line
    tokens = sharp.tokens_generated / base.tokens_generated
    assert f"generated {tokens:.3g} times the tokens" in line and line in text
    assert (
        f"| α = 4 | {sharp.tokens_generated:,} | {sharp.tokens_generated / 96:,.1f} | {tokens:.2f} | 12.5 |" in markdown
    )
    eight = paired_change(
        *([float(any(c["score"] for c in e.completions[i * 8 : i * 8 + 8])) for i in range(12)] for e in pair)
    )
    assert f"| pass@8 (12) | {number(base.pass_at_k[8].value, 3)}" in markdown
    assert f"{number(eight.change, 3, sign=True)} ({interval(eight, 3)})" in markdown


def test_markdown_has_its_pictures_beside_it(page):
    written, _, markdown = page
    files = re.findall(r"!\[[^]]*\]\(([^)]+)\)", markdown)
    assert [Path(f).stem for f in files] == [
        "pass-at-k", "plane", "cost", "history-length", "history-entropy", "history-eval-acc",
    ]  # fmt: skip
    for file in files:
        root = xml.etree.ElementTree.parse(written.markdown.parent / file).getroot()
        assert root.tag.endswith("svg") and root.get("width")
        assert "var(" not in (written.markdown.parent / file).read_text()
    tables = [line for line in markdown.splitlines() if line.startswith("| measure")]
    assert tables == ["| measure (n) | base model | α = 4 |"]


def test_from_folders_is_the_same_page_and_repeats_to_the_byte(pair, page, tmp_path):
    folders = [e.save(tmp_path / f"run {i}") for i, e in enumerate(pair)]
    first, second = (write_comparison(folders, tmp_path / name) for name in ("a", "b"))
    for kind in ("html", "markdown"):
        assert getattr(first, kind).read_bytes() == getattr(second, kind).read_bytes()
    assert first.headline == page[0].headline
    text = first.html.read_text()
    assert "powerflow-fast compare &#39;run 0&#39; &#39;run 1&#39;" in text and str(tmp_path) not in text


def test_what_evaluate_leaves_can_be_compared(tmp_path):
    problems = [{"prompt": "1 + 1?", "answer": "2"}, {"prompt": "2 + 3?", "answer": "5"}]
    folders = []
    for name, given in (("wrong once", ("2", "3", "5", "5")), ("right", ("2", "2", "5", "5"))):
        texts = [f"\\boxed{{{answer}}}" for answer in given]
        completions = [{"problem": i, "completions": texts[2 * i : 2 * i + 2]} for i in range(2)]
        folders.append(tmp_path / name)
        options = {"completions": completions, "scorer": "boxed", "measures": ("accuracy", "lexical"), "name": name}
        evaluate(None, problems, **options, output_dir=folders[-1])
    written = write_comparison(folders, tmp_path / "out", samples_shown=1)
    assert written.headline.startswith(
        "right: accuracy 1.000 against 0.750 for wrong once: +0.250 (95 % interval +0.000"
    )
    text = written.markdown.read_text()
    assert "| accuracy, avg@2 (2) | 0.750" in text and "| pass@2 (2) | 1.000" in text and "| self-BLEU (2) |" in text
    assert "| majority vote, maj@2 (2) |" in text and "accuracy +0.500 for right" in text


def curves(written, name):
    """Lines of a picture as the numbers of their points."""
    root = xml.etree.ElementTree.parse(written.markdown.parent / "figures" / f"{name}.svg").getroot()
    paths = [p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if "clip-path" in p.attrib]
    return [len(re.findall(r"[ML] ", d)) for d in paths if "z" not in d]


def test_curves_of_different_length(tmp_path):
    runs = [made("short", samples=8), made("long", samples=8)]
    runs[0].pass_at_k = {k: m for k, m in runs[0].pass_at_k.items() if k < 8}
    written = write_comparison([*runs, without(runs[1], name="none", pass_at_k={})], tmp_path)
    assert {3, 4} <= set(curves(written, "pass-at-k"))
    text = written.markdown.read_text()
    assert "end at different k. Without pass@k: none." in text
    assert re.search(r"\| pass@4 .*\| – \|", text) and re.search(r"\| pass@8 \(12\) \| – \| ", text)


def test_many_evaluations_with_long_and_equal_names(tmp_path):
    names = ["base", "base", "_hidden", "cost $5 and $x_1$ <b>", "name " * 40, "power sampling α=4, 16 blocks"]
    runs = [made(name, seed=i, skill=0.3 + 0.1 * i, prompts=5, samples=4) for i, name in enumerate(names)]
    runs += [made(f"n{i}", seed=i, prompts=5, samples=4) for i in range(6, 11)]
    written = write_comparison(runs, tmp_path)
    text = written.html.read_text()
    checked(text)
    assert "base (2)" in text and "cost $5 and $x_1$ &lt;b&gt;" in text and "<b>" not in text.replace('<b class="', "")
    assert text.count(("name " * 40).strip()) > 5
    plane = (tmp_path / "figures" / "plane.svg").read_text()
    assert "_hidden" in plane and "$x_1$" in plane and ("name " * 40).strip() not in plane
    assert (
        re.search(r"higher for \d+ of 10, most for ", written.headline) or "within its uncertainty" in written.headline
    )


def test_headline_of_several(pair):
    def rows(*changes):
        measure = Measure(0.5, 0.4, 0.6, 9)
        row = measure_rows(runs)[0]
        cells = [replace(cell, value=measure, change=c) for cell, c in zip(row.cells, (None, *changes), strict=True)]
        return [replace(row, cells=cells)]

    from powerflow_fast.comparison.page import _labelled, _read

    runs = _labelled([_read(replace(pair[0], name=name)) for name in "abcd"])
    up, more, down, same = (Change(0.5, 0.5 + d, d, d - 0.05, d + 0.05, 9) for d in (0.1, 0.2, -0.1, 0.01))
    assert headline(runs, rows(up, more, down)) == (
        "Against a (accuracy 0.500), accuracy is higher for 2 of 3, most for c (0.700, +0.200 (95 % interval +0.150 to "
        "+0.250, 9 prompts)); lower for 1 of 3, for d (0.400, −0.100 (95 % interval −0.150 to −0.050, 9 prompts))."
    )
    assert headline(runs, rows(same, same, same)).endswith("accuracy is within its uncertainty for b, c, d.")
    assert headline(runs, rows(None, None, None)) == "No measure can be compared by prompt with a."


def test_one_prompt_has_no_interval(tmp_path):
    written = write_comparison([made("a", prompts=1), made("b", prompts=1, seed=5)], tmp_path)
    assert "no interval, 1 prompt)" in written.headline and "One prompt cannot say" in written.headline
    text = written.markdown.read_text()
    assert "(no interval)" in text and "nan" not in text.lower().replace("finance", "") and "**+" not in text
    assert "nan" not in "".join(p.read_text().lower() for p in (tmp_path / "figures").iterdir())


def test_missing_values_and_nan(pair, tmp_path):
    base, sharp = (replace(e, measures=dict(e.measures), per_prompt=dict(e.per_prompt)) for e in pair)
    for e in (base, sharp):
        e.per_prompt["quality"] = [NAN if i % 3 else 5.0 + i for i in range(12)]
        e.measures["quality"] = mean_interval(e.per_prompt["quality"])
    base.measures["my_score"] = Measure(NAN, NAN, NAN, 0)
    base.measures["tilt"] = sharp.measures["tilt"] = Measure(0.02, NAN, NAN, 12)  # a fit: no value per prompt
    folders = [e.save(tmp_path / e.name) for e in (base, sharp)]
    (folders[1] / "completions.jsonl").unlink()
    written = write_comparison(folders, tmp_path / "out")
    text = written.markdown.read_text()
    assert "| quality (4) |" in text and "| my score (0) | – (no interval) | – |" in text
    assert "| length tilt λ, nats/token (12) | 0.020 (no interval) | 0.020 (no interval) |" in text
    assert "α = 4 has no completions.jsonl: its completions are not shown." in text
    assert "no completions" in written.html.read_text()
    # a pass@k without scores has an interval of its own, but no change
    assert re.search(r"\| pass@8 \(12\) \| [^|<]+ \| [^|<]+ \|", text)


def test_no_common_measure(pair, tmp_path):
    base, sharp = without(pair[0], "length", "finished", "distinct_1"), without(pair[1], "accuracy", pass_at_k={})
    base.pass_at_k = {}
    written = write_comparison([base, sharp], tmp_path)
    assert written.headline == "No measure can be compared by prompt with base model."
    text = written.markdown.read_text()
    assert "No pass@k plot" in text and "No plane of quality and diversity: fewer than two evaluations" in text
    assert "### Problem" in text and "largest change" not in text and "<svg" not in written.html.read_text()


def test_shown_problems(pair, page):
    from powerflow_fast.comparison.page import _read

    runs = [_read(e) for e in pair]
    rows = measure_rows(runs)
    differences = numpy.abs(numpy.subtract(*(e.per_prompt["accuracy"] for e in pair)))
    shown = choose_prompts(runs, rows, count=5, seed=3)
    assert len({s.problem for s in shown}) == 5
    assert [differences[s.problem] for s in shown[:3]] == sorted(differences, reverse=True)[:3]
    assert [s.reason for s in shown[3:]] == ["drawn at random"] * 2 and "for α = 4" in shown[0].reason
    assert shown == choose_prompts(runs, rows, count=5, seed=3)
    assert any(shown != choose_prompts(runs, rows, count=5, seed=seed) for seed in range(4, 8))
    assert len(choose_prompts(runs, rows, count=99, seed=0)) == 12 and not choose_prompts(runs, rows, count=0, seed=0)
    assert "3 with the largest change and 3 drawn at random (seed 0)" in page[2] and "not the best" in page[1]


def test_samples_are_shown_as_they_are(tmp_path):
    nasty = "</pre><script>alert(1)</script> & ```\n````text\n| a | b |\x00\x1b[31m"
    runs = [made("a", prompts=2, samples=1), made("b", prompts=2, samples=1)]
    for e in runs:
        e.completions[0]["completion"] = nasty
        e.completions[1]["completion"] = "start " + "x" * 4000 + " end"
        e.completions[0]["prompt"] = [{"role": "user", "content": "<hi>"}]
        e.completions[0].update(score=None, finished=False)
    written = write_comparison(runs, tmp_path, samples_shown=1)
    text, markdown = written.html.read_text(), written.markdown.read_text()
    checked(text)
    assert "<script" not in text and "&lt;/pre&gt;&lt;script&gt;" in text and "\x00" not in text and r"\x00\x1b" in text
    assert text.count("user: &lt;hi&gt;") == 1 and "cut off" in text
    assert "3,310 more characters</summary>" in text and "4,010 characters</summary>" in markdown
    fences = [line for line in markdown.splitlines() if re.fullmatch("`{3,}(text)?", line)]
    assert fences.count("`````text") == fences.count("`````") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"problems": "other"}, r"same problems, got 'sums' \(a\) and 'other' \(b\)"),
        (
            {"settings": {"num_samples": 8, "problems_fingerprint": "7"}},
            r"same problems: their problems_fingerprint differs, got None \(a\) and '7' \(b\)",
        ),
        ({"settings": {"num_samples": 4}}, r"same num_samples, got 8 \(a\) and 4 \(b\)"),
        ({"settings": {"num_samples": 8, "confidence": 0.9}}, r"same confidence, got 0.95 \(a\) and 0.9 \(b\)"),
        ({"per_prompt": {"length": [1.0]}}, r"same number of prompts, got 3 \(a\) and 1 \(b\)"),
        (
            {"per_prompt": {"length": [1.0] * 3, "x": [1.0]}},
            "evaluation 'b': per_prompt must have one value per prompt",
        ),
        ({"measures": {"length": {"value": 1}}}, "evaluation 'b' is not an evaluation: KeyError"),
    ],
)
def test_what_cannot_be_compared(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        write_comparison([made("a", prompts=3), replace(made("b", prompts=3), **change)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    one, two = made("a", prompts=2, samples=2), made("b", prompts=2, samples=2)
    folder = one.save(tmp_path / "one")
    for wrong in ([one], folder, []):
        with pytest.raises(ValueError, match="evaluations must be a list of two or more"):
            write_comparison(wrong, tmp_path / "out")
    with pytest.raises(ValueError, match="samples_shown must be >= 0, got -1"):
        write_comparison([one, two], tmp_path / "out", samples_shown=-1)
    with pytest.raises(DataError, match=r"absent: holds no evaluation"):
        write_comparison([folder, tmp_path / "absent"], tmp_path / "out")
    with pytest.raises(DataError, match=r"there is no .*history.jsonl"):
        write_comparison([one, two], tmp_path / "out", histories={"a": tmp_path / "history.jsonl"})
    two.completions[2]["prompt"] = "something else"
    with pytest.raises(DataError, match=r"problem 1 is '1\. What is .* \(a\) and 'something else' \(b\)"):
        write_comparison([one, two], tmp_path / "out")
    (folder / "completions.jsonl").write_text('{"problem"\n{"problem": 0}\n')
    with pytest.raises(DataError, match=r"cannot read .*completions.jsonl"):
        write_comparison([folder, two], tmp_path / "out")
    (folder / "evaluation.json").write_text('{"complete": false}')
    with pytest.raises(DataError, match=r"evaluation.json: this evaluation was not finished"):
        write_comparison([folder, two], tmp_path / "out")
    for text in ("[1", "[1]"):
        (folder / "evaluation.json").write_text(text)
        with pytest.raises(PowerFlowError, match=r"evaluation.json: damaged"):
            write_comparison([folder, two], tmp_path / "out")


def test_matplotlib_is_left_as_it_was(pair, tmp_path):
    import matplotlib

    before = {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams}
    write_comparison(pair, tmp_path)
    assert {key: dict.__getitem__(matplotlib.rcParams, key) for key in matplotlib.rcParams} == before


def test_pieces_of_text():
    assert number(-1234.5, 1) == "−1,234.5" and number(0.1, 2, sign=True) == "+0.10" and number(NAN, 3) == "–"
    assert (
        interval(Measure(1, 0.5, 1.5, 3), 1) == "0.5 to 1.5" and interval(Measure(1, NAN, NAN, 1), 1) == "no interval"
    )
    assert shorten("abcdefghij", 10) == "abcdefghij" and shorten("abcdefghijk", 10) == "abcdef…ijk"
