"""Measures of an evaluation: one number for each prompt from its completions; NaN where a prompt has none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy

from ..data import PromptRow
from ..rewards.answers import cluster_answers
from .alpha_fit import inversion_rate, length_tilt
from .diversity import Encoder, distinct_n, repetition, self_bleu, semantic_diversity
from .judge import Judge
from .scorers import NamedScorer
from .statistics import Measure

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
    "alpha": "α of log π = α log p_base − λ|y| + c within prompts",
    "tilt": "its λ, nats per token; above 0 the model prefers shorter completions than p_base^α",
}
Groups = Sequence[Sequence[dict[str, Any]]]
TIED = 1e-3  # nats: the same completion, scored in two batches, differs by the rounding of fp32
_WORDS = re.compile(r"\w+|[^\w\s]")


def accuracy_measures(groups: Groups, scorer: NamedScorer) -> dict[str, list[float]]:
    """Measures "accuracy", and with a scorer that reads answers "majority" and "distinct_answers".

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
    """Measures "length" and "finished"."""
    return {
        "length": [_mean(math.nan if r["tokens"] is None else r["tokens"] for r in records) for records in groups],
        "finished": [_mean(float(r["finished"]) for r in records) for records in groups],
    }


def lexical_measures(groups: Groups) -> dict[str, list[float]]:
    """Measures "distinct_1", "distinct_2", "self_bleu" and "repetition", of words, so that no tokenizer comes in."""
    words = [[_WORDS.findall(r["completion"]) for r in records] for records in groups]
    return {
        "distinct_1": [distinct_n(texts, 1) for texts in words],
        "distinct_2": [distinct_n(texts, 2) for texts in words],
        "self_bleu": [self_bleu(texts) for texts in _texts(groups)],
        "repetition": [repetition(texts) for texts in words],
    }


def semantic_measures(groups: Groups, encoder: Encoder) -> dict[str, list[float]]:
    """Measures "semantic_diversity"."""
    return {"semantic_diversity": [semantic_diversity(texts, encoder) for texts in _texts(groups)]}


def judge_measures(groups: Groups, rows: Sequence[PromptRow], judge: Judge) -> dict[str, list[float]]:
    """Measures "quality" and "strategies"; NaN where the judge's replies cannot be read."""
    asked = [(_question(row), texts) for row, texts in zip(rows, _texts(groups), strict=True)]
    grades = [[grade for grade in grades if not math.isnan(grade)] for grades in judge.quality_of_all(asked)]
    clusters = judge.strategies_of_all(asked)
    return {
        "quality": [_mean(group) for group in grades],
        "strategies": [math.nan if found is None else float(len(set(found))) for found in clusters],
    }


def likelihood_measures(groups: Groups) -> dict[str, list[float]]:
    """Measures "entropy" and "logp", and of completions scored under a base too "base_logp" and "inversion_rate"."""
    measures = {
        "entropy": [_mean(r["entropy"] for r in records if r["entropy"] is not None) for records in groups],
        "logp": [_mean(r["logp"] / len(r["ids"]) for r in records if r["ids"]) for records in groups],
    }
    if any(r["base_logp"] is None for records in groups for r in records):
        return measures
    everything = _scored(groups)
    measures["base_logp"] = [_mean(r["base_logp"] / len(r["ids"]) for r in records if r["ids"]) for records in groups]
    measures["inversion_rate"] = inversion_rate(
        everything["policy_logps"], everything["base_logps"], everything["group_ids"], tolerance=TIED
    )
    return measures


def tilt_measures(groups: Groups, *, alpha: float | None, confidence: float) -> dict[str, Measure]:
    """Measures "alpha" and "tilt" of completions scored under a base: of all prompts together, no means over them."""
    everything = _scored(groups)
    lengths = [len(r["ids"]) for records in groups for r in records]
    found = length_tilt(**everything, lengths=lengths, alpha=alpha, confidence=confidence)
    return {"alpha": found.alpha, "tilt": found.tilt}


def _scored(groups: Groups) -> dict[str, list[Any]]:
    pairs = [(i, r) for i, records in enumerate(groups) for r in records]
    return {
        "policy_logps": [r["logp"] for _, r in pairs],
        "base_logps": [r["base_logp"] for _, r in pairs],
        "group_ids": [i for i, _ in pairs],
    }


def _question(row: PromptRow) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return "\n\n".join(message["content"] for message in row.prompt)


def _texts(groups: Groups) -> list[list[str]]:
    return [[r["completion"] for r in records] for records in groups]


def _mean(values: Any) -> float:
    values = list(values)
    return float(numpy.mean(values)) if values else math.nan
