"""Argument and result types of the log-prob launchers, shared by the torch and the Triton backend; no Triton here."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class LogitTransform(NamedTuple):
    """``z = softcap(logit_scale * u) / temperature``, ``softcap(v) = cap * tanh(v / cap)``, for ``u = h @ W.T + b``."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


class HeadCall(NamedTuple):
    """What the log-probs of a linear head are computed from."""

    hidden: Tensor
    """(N, H)"""
    weight: Tensor
    """(V, H)"""
    labels: Tensor
    """(N,) int64"""
    bias: Tensor | None = None
    """(V,)"""
    transform: LogitTransform = LogitTransform()
    ignore_index: int | None = -100
    """label of rows to leave out; None: no row is left out"""

    def of_rows(self, rows: slice | Tensor) -> HeadCall:
        """The same head on some of the rows."""
        return self._replace(hidden=self.hidden[rows], labels=self.labels[rows])


class RowStatistics(NamedTuple):
    """Of the distribution that each row's label is scored under, (N,) float32 each, in nats; 0 in ignored rows."""

    lse: Tensor
    """logsumexp of z"""
    entropy: Tensor
    mean_logit: Tensor


class ForwardOutput(NamedTuple):
    """Per-token results, each (N,) float32, 0 in ignored rows.

    ``others_sum`` is the sum of exp(z - anchor) over the columns other than the label's, for an ``anchor`` of the
    backend's choice, from which the backward pass forms the softmax anew: a rounded logsumexp would cost digits where
    logits are in the hundreds.
    """

    logp: Tensor
    anchor: Tensor
    others_sum: Tensor
    stats: RowStatistics | None = None


class HiddenGradient(NamedTuple):
    """Log-probabilities under a frozen head, and all that their gradient needs but the upstream factor of each row."""

    logp: Tensor
    """(N,) float32"""
    unit: Tensor
    """(N, H) d logp[n] / d hidden[n], in hidden's dtype, or float32 for float16"""
    stats: RowStatistics | None = None


class RowExponentials(NamedTuple):
    """What a forward pass keeps of rows whose backward pass is not to recompute their logits.

    ``d logp[n] / d u[n] = -scale[n] * exps[n]`` for the logits u before the transform: ``exps`` is exp(z - anchor),
    times dz/du where it is not constant, and minus the sum of the others in the label's column.
    """

    logp: Tensor
    """(N,) float32"""
    exps: Tensor
    """(N, V)"""
    scale: Tensor
    """(N,) float32"""
    stats: RowStatistics | None = None


def kept_width(v: int) -> int:
    """Row stride of kept exponentials: rows start at multiples of 16 elements."""
    return -(-v // 16) * 16


@dataclasses.dataclass
class HeadSums:
    """Gradients of a head as float32 sums (float64 for such a head), which several passes add to; None: not needed.

    While ``fresh`` the tensors hold nothing: the first pass writes to them instead.
    """

    d_weight: Tensor | None
    """(V, H)"""
    d_bias: Tensor | None
    """(V,)"""
    fresh: bool = True

    @classmethod
    def like(cls, weight: Tensor | None, bias: Tensor | None, *, own_dtype: bool = False) -> HeadSums:
        """Sums for the gradients of the parameters that are given; for a single pass, in their own dtype."""
        return cls(
            *(
                None
                if x is None
                else x.new_empty(x.shape, dtype=x.dtype if own_dtype else torch.promote_types(x.dtype, torch.float32))
                for x in (weight, bias)
            )
        )

    def columns(self, columns: slice, dtype: torch.dtype) -> HeadSums:
        """Sums of some vocabulary columns, to add to in ``dtype``: these ones, or a copy for `put` where they have
        another dtype."""

        def part(x: Tensor | None) -> Tensor | None:
            if x is None or x.dtype == dtype:
                return x if x is None else x[columns]
            return torch.empty_like(x[columns], dtype=dtype) if self.fresh else x[columns].to(dtype)

        return HeadSums(part(self.d_weight), part(self.d_bias), self.fresh)

    def put(self, columns: slice, total: HeadSums) -> None:
        """Take over what `columns` gave, once it is complete."""
        for mine, its in ((self.d_weight, total.d_weight), (self.d_bias, total.d_bias)):
            if mine is not None and mine.dtype != its.dtype:
                mine[columns] = its

    def finished(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums, which are zero if no pass had a row to add."""
        if self.fresh:
            for x in (self.d_weight, self.d_bias):
                if x is not None:
                    x.zero_()
        return self.d_weight, self.d_bias


class HeadBackend(Protocol):
    """The passes over the vocabulary that a backend gives: modules whose functions are these."""

    def linear_logprob_fwd(self, call: HeadCall, *, stats: bool = False) -> ForwardOutput:
        """Log-probs, and what `linear_logprob_bwd` needs to form the logits anew: 2NVH FLOP."""

    def linear_logprob_fwd_d_hidden(self, call: HeadCall, *, stats: bool = False) -> HiddenGradient:
        """Log-probs under a frozen head with their gradient but for the upstream factor: 4NVH FLOP."""

    def linear_logprob_fwd_exps(
        self, call: HeadCall, *, memory: Tensor | None = None, stats: bool = False
    ) -> RowExponentials:
        """Log-probs, and exponentials from which `linear_logprob_bwd_exps` makes the gradients: 2NVH FLOP. All rows
        count: ``call.ignore_index`` is not looked at. ``memory``: ``N * kept_width(V)`` elements or more to keep them
        in."""

    def linear_logprob_bwd(
        self,
        call: HeadCall,
        forward: ForwardOutput,
        d_logp: Tensor,
        *,
        need_d_hidden: bool,
        need_d_weight: bool,
        need_d_bias: bool,
        add_to: HeadSums | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """d_hidden, d_weight and d_bias from logits that are formed anew: 2NVH FLOP, and 2NVH for each of the first
        two. None where not needed, or where added to the sums ``add_to``."""

    def linear_logprob_bwd_exps(
        self,
        hidden: Tensor,
        weight: Tensor,
        kept: RowExponentials,
        d_logp: Tensor,
        *,
        need_d_hidden: bool,
        add_to: HeadSums,
    ) -> Tensor | None:
        """d_hidden from kept exponentials; the head's gradients are added to ``add_to``: 2NVH FLOP each."""

    def kept_dtype(self, hidden: Tensor) -> torch.dtype:
        """Of the exponentials that `linear_logprob_fwd_exps` keeps."""

    def scaled(self, x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """``(x * factor).to(dtype)``, in x's own memory where that has the dtype."""
