"""Measures of an evaluation: one number for each prompt from its completions; NaN where a prompt has none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy

from .answers import cluster_answers
from .diversity import Encoder, distinct_n, repetition, self_bleu, semantic_diversity
from .scorers import NamedScorer

__all__ = [
    "MEASURES",
    "accuracy_measures",
    "correct_counts",
    "length_measures",
    "lexical_measures",
    "semantic_measures",
]

# What each measure is, and its unit.
MEASURES = {
    "accuracy": "mean score of the completions (avg@n)",
    "majority": "score of the answer that most completions give (maj@n)",
    "distinct_answers": "different answers among the completions that have one",
    "length": "tokens, end-of-sequence token included",
    "finished": "share that ended by itself, not at the limit on its length",
    "distinct_1": "share of different words among all words of the prompt's completions",
    "distinct_2": "share of different pairs of words",
    "self_bleu": "BLEU of each completion against the prompt's others, 0 to 1; low: diverse",
    "repetition": "share of 4-grams of words that came before in the same completion",
    "semantic_diversity": "mean cosine distance between the embeddings of two completions, 0 to 2",
    "quality": "mean mark by the judge, 1 to 10",
    "strategies": "different strategies among the completions, by the judge",
    "entropy": "mean entropy of the next-token distribution along the completions, nats",
    "logp": "mean log-prob per token under the model, nats",
    "base_logp": "mean log-prob per token under the base model, nats",
    "inversion_rate": "share of pairs of completions in another order under the model than under the base; 0: p_base^α",
    "tilt": "λ of log π = α log p_base − λ|y| + c within prompts, nats per token",
}
Groups = Sequence[Sequence[dict[str, Any]]]
_WORDS = re.compile(r"\w+|[^\w\s]")


def accuracy_measures(groups: Groups, scorer: NamedScorer) -> dict[str, list[float]]:
    """ "accuracy", and with a scorer that reads answers "majority" and "distinct_answers"; of completions with scores.

    Of answers with as many votes the one that comes first wins; where no completion has an answer, the vote scores 0.
    """
    measures = {"accuracy": [_mean(r["score"] for r in records) for records in groups]}
    if scorer.read_answer is None:
        return measures
    measures |= {"majority": [], "distinct_answers": []}
    for records in groups:
        clusters = cluster_answers([r["answer"] for r in records], scorer.equivalent)
        votes = [c for c, r in zip(clusters, records, strict=True) if r["answer"] and r["answer"].strip()]
        winner = max(votes, key=votes.count, default=None)  # of equal counts max takes the first
        measures["majority"].append(0.0 if winner is None else records[clusters.index(winner)]["score"])
        measures["distinct_answers"].append(float(len(set(votes))))
    return measures


def correct_counts(groups: Groups) -> list[int]:
    """Completions of each prompt with a score of 1 or more."""
    return [sum(r["score"] >= 1 for r in records) for records in groups]


def length_measures(groups: Groups) -> dict[str, list[float]]:
    """ "length" and "finished"."""
    return {
        "length": [_mean(math.nan if r["tokens"] is None else r["tokens"] for r in records) for records in groups],
        "finished": [_mean(float(r["finished"]) for r in records) for records in groups],
    }


def lexical_measures(groups: Groups) -> dict[str, list[float]]:
    """ "distinct_1", "distinct_2", "self_bleu" and "repetition", of words, so that no tokenizer comes in."""
    words = [[_WORDS.findall(r["completion"]) for r in records] for records in groups]
    return {
        "distinct_1": [distinct_n(texts, 1) for texts in words],
        "distinct_2": [distinct_n(texts, 2) for texts in words],
        "self_bleu": [self_bleu(texts) for texts in _texts(groups)],
        "repetition": [repetition(texts) for texts in words],
    }


def semantic_measures(groups: Groups, encoder: Encoder) -> dict[str, list[float]]:
    """ "semantic_diversity"."""
    return {"semantic_diversity": [semantic_diversity(texts, encoder) for texts in _texts(groups)]}


def _texts(groups: Groups) -> list[list[str]]:
    return [[r["completion"] for r in records] for records in groups]


def _mean(values: Any) -> float:
    values = list(values)
    return float(numpy.mean(values)) if values else math.nan
