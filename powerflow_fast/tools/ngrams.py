"""N-grams that a text repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def repeated_ngrams(sequences: Sequence[Sequence[Any]], n: int = 4) -> tuple[int, int]:
    """N-grams that came before in the same sequence, and all n-grams, summed over ``sequences``."""
    repeated = total = 0
    for sequence in sequences:
        grams = ngrams("repetition", sequence, n)
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated, total


def ngrams(op: str, sequence: Sequence[Any], n: int) -> list[tuple[Any, ...]]:
    if n < 1:
        raise ValueError(f"{op}: n must be at least 1, got {n}")
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
