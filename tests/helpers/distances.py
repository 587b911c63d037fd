"""How far samples are from the distribution that they should have."""

from __future__ import annotations

import torch
from tiny import EOS, PAD, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> float:
    """p-value of Pearson's test; entries with an expectation under 5 are pooled."""
    from scipy.stats import chisquare

    expected = p * counts.sum()
    rare = expected < 5
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    keep = expected > 1e-9
    return float(
        chisquare(observed[keep].numpy(), (expected[keep] / expected[keep].sum() * counts.sum()).numpy()).pvalue
    )


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)
