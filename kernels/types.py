"""Argument and result types of the log-prob launchers, shared by the torch and the Triton backend; no Triton here."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LogitTransform(NamedTuple):
    """``z = softcap(logit_scale * u) / temperature``, ``softcap(v) = cap * tanh(v / cap)``, for ``u = h @ W.T + b``."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


class ForwardOutput(NamedTuple):
    """Per-token results, each (N,) float32, 0 in ignored rows; the last three only where statistics are asked for.

    ``others_max`` and ``others_sum`` are max z and sum exp(z - max) over the columns other than the label's, from which
    the backward pass forms the softmax anew: a rounded logsumexp would cost digits where logits are in the hundreds.
    """

    logp: Tensor
    others_max: Tensor
    others_sum: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None
    mean_logit: Tensor | None = None
