"""Rewards that need no label: EMPO, TTRL, Intuitor, RENT."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..ops.segments import segment_sum
from .answers import Equivalence, cluster_answers, extract_answer, same_answer
from .reward import RewardInputs, one_per_completion


def _clusters(op: str, inputs: RewardInputs, equivalent: Equivalence) -> Iterable[tuple[list[int], list[int]]]:
    """For each group the numbers of its completions, and their answers' clusters."""
    answers = [extract_answer(completion) for completion in inputs.completions]
    for members in inputs.groups:
        if len(members) < 2:
            raise ValueError(
                f"{op}: a group must have two or more completions to compare (num_generations >= 2), got only "
                f"{inputs.describe(members[0])}"
            )
        yield members, cluster_answers([answers[i] for i in members], equivalent)


def empo(inputs: RewardInputs, *, equivalent: Equivalence = same_answer) -> Tensor:
    r"""The share of the group whose answers fall into the completion's cluster. For a group of K completions:

        reward[i] = sum(cluster[j] == cluster[i] for j in group) / K

    The answer is that of the last ``\boxed{...}``; a completion without one is a cluster of its own, 1/K. (The authors'
    code gives it 0, and 0 to all of a group without two equal answers, which moves no group-relative advantage.)

    Returns:
        (B,) fp32 in [1/K, 1], on the device of ``group_ids``.

    Raises:
        ValueError: a group of one completion.

    Source: EMPO, arXiv 2504.05812, the probability of the semantic cluster.
    """
    values = [0.0] * len(inputs)
    for members, clusters in _clusters("empo", inputs, equivalent):
        for number, cluster in zip(members, clusters, strict=True):
            values[number] = clusters.count(cluster) / len(members)
    return one_per_completion(values, inputs)


def ttrl(inputs: RewardInputs, *, equivalent: Equivalence = same_answer) -> Tensor:
    r"""1 where the completion's answer is the one that most of its group gives, else 0.

    A completion without a ``\boxed{...}`` casts no vote and gets 0. Of several answers with as many votes the one that
    comes first in the group wins, as ``collections.Counter.most_common`` has it in the authors' code.

    Returns:
        (B,) fp32, 0 or 1, on the device of ``group_ids``.

    Raises:
        ValueError: a group of one completion.

    Source: TTRL, arXiv 2504.16084, majority voting reward.
    """
    values = [0.0] * len(inputs)
    for members, clusters in _clusters("ttrl", inputs, equivalent):
        votes = [
            cluster
            for number, cluster in zip(members, clusters, strict=True)
            if extract_answer(inputs.completions[number]) is not None
        ]
        winner = max(votes, key=votes.count, default=None)  # of equal counts max takes the first
        for number, cluster in zip(members, clusters, strict=True):
            values[number] = float(cluster == winner)
    return one_per_completion(values, inputs)


def intuitor(inputs: RewardInputs) -> Tensor:
    """Self-certainty: the mean over the completion's tokens of ``lse - mean_logit``. With p the policy's distribution
    over the V tokens of the vocabulary at each position,

        lse - mean_logit = -mean_v(log p[v]) = KL(uniform || p) + log V

    so it is the paper's KL, averaged, plus the constant log V, which no group-relative advantage sees.

    Returns:
        (B,) fp32, nats, >= log V. A completion without tokens gets the mean of its group's others, so that it moves no
        baseline (0 if none has tokens).

    Raises:
        ValueError: ``lse`` or ``mean_logit`` is missing.

    Source: Intuitor, arXiv 2505.19590; self-certainty is Kang et al. 2025, arXiv 2502.18581.
    """
    lse, mean_logit = _stats("intuitor", inputs, "lse", "mean_logit")
    return _token_means(lse.double() - mean_logit.double(), inputs)


def rent(inputs: RewardInputs) -> Tensor:
    """Minus the mean over the completion's tokens of the policy's entropy ``-(p * log p).sum()``.

    Returns:
        (B,) fp32, nats, in [-log V, 0]. A completion without tokens as in :func:`intuitor`.

    Raises:
        ValueError: ``entropy`` is missing.

    Source: RENT, arXiv 2505.22660, over all tokens.
    """
    (entropy,) = _stats("rent", inputs, "entropy")
    return _token_means(-entropy.double(), inputs)


def _stats(op: str, inputs: RewardInputs, *names: str) -> list[Tensor]:
    missing = [name for name in names if getattr(inputs, name) is None]
    if missing:
        raise ValueError(f"{op}: {' and '.join(missing)} must be given, (N,) from linear_logprob_stats, got None")
    return [getattr(inputs, name) for name in names]


def _token_means(values: Tensor, inputs: RewardInputs) -> Tensor:
    lengths = inputs.cu_seqlens.diff()
    means = segment_sum(values, inputs.cu_seqlens) / lengths.clamp(min=1)
    empty = {number for number, length in enumerate(lengths.tolist()) if length == 0}
    for members in inputs.groups if empty else ():
        others = [i for i in members if i not in empty]
        if 0 < len(others) < len(members):
            means[[i for i in members if i in empty]] = means[others].mean()
    return means.float()
