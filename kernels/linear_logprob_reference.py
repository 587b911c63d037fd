"""Oracles in plain torch: they materialise every logit, accept any floating dtype and are differentiable.

Tests and benchmarks compare against these in fp64 on the *same rounded inputs*; nothing in the library calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits_ref(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """``softcap(logit_scale · (h Wᵀ + b)) / temperature``, (N, V)."""
    logits = logit_scale * torch.nn.functional.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    return logits / temperature


def linear_logprobs_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, **logit_options
) -> Tensor:
    """``log_softmax(logits)[n, labels[n]]``, (N,), and 0 where ``labels == ignore_index``.

    With ``d_j = z_j − z_y`` it is ``−log1p(Σ_{j≠y} exp(d_j))`` wherever that sum stays below one, because
    ``z_y − logsumexp(z)`` loses every digit of a token whose probability is one to rounding, even in fp64.
    """
    z = logits_ref(hidden, weight, **logit_options)
    keep = labels != ignore_index
    y = labels.where(keep, 0)[:, None]
    others = (z - z.gather(1, y)).scatter(1, y, float("-inf"))
    logp = torch.nn.functional.logsigmoid(-torch.logsumexp(others, 1))
    return logp.where(keep, 0.0)


def linear_logprob_stats_ref(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, **logit_options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(logp, lse, entropy, mean_logit)``, each (N,); ignored rows give zeros."""
    z = logits_ref(hidden, weight, **logit_options)
    keep = labels != ignore_index
    logp = linear_logprobs_ref(hidden, weight, labels, ignore_index=ignore_index, **logit_options)
    log_p = torch.log_softmax(z, 1)
    entropy = -(log_p.exp() * log_p).sum(1)
    return logp, *(x.where(keep, 0.0) for x in (torch.logsumexp(z, 1), entropy, z.mean(1)))
