"""What an objective takes and gives: packed log-probs of completions, and the loss with what made it.

An objective is any function from :class:`Trajectories` to an :class:`ObjectiveOutput` or to a scalar loss. This file
holds the sums, means and group statistics that such functions are written with; ``docs/objectives.md`` shows one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..ops.checks import ImportanceLevel, check_clip, require_positive, require_tensor, values_are_readable
from ..ops.segments import check_cu_seqlens, segment_max, segment_sum


class ObjectiveOutput(NamedTuple):
    """The loss and, per sequence, what made it; only ``loss`` is differentiable.

    A sequence without tokens has zeros, save for log_z, which is its prompt's.
    """

    loss: Tensor
    """() this call's share of the loss of the optimiser step."""
    weight: Tensor
    """(B,) the importance weight of each sequence; 1 on-policy."""
    logp_mean: Tensor
    """(B,) mean log-prob per token under the policy, nats."""
    delta: Tensor | None = None
    """(B,) the residual of a balance condition; of the whole sequence, per token, where its parts have their own."""
    log_z: Tensor | None = None
    """(B,) the log-partition of each prompt that was used, given or estimated; its unit is the objective's."""
    advantage: Tensor | None = None
    """(B,) the advantage of a policy gradient (its mean over the tokens where each has its own)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trajectories:
    """B packed completions of N tokens in all, as every objective takes them. Frozen; results are cached.

    Args:
        logps: (N,) fp32 or fp64, log-probs of the completion tokens under the policy at the sampling temperature, the
            completions one after the other. The one input, with log_z, that gets a gradient.
        base_logps: (N,) the same under the base model.
        cu_seqlens: (B+1,) int32, from 0 to N, not decreasing: completion b is ``logps[cu_seqlens[b]:cu_seqlens[b+1]]``.
        alpha: exponent of the target ``p_base(y|q)^alpha``, finite and > 0.
        log_z: (B,) log-partition of each completion's prompt, may require grad. Its meaning is the objective's: nats
            per token (log Z') for the length-aware ones, nats for the others. None: the objective's own estimate from
            the completions of a prompt, which needs ``group_ids``.
        group_ids: (B,) int64 or int32, equal for the completions of one prompt; any values, in any order.
        psi: (B,) format penalty per token, 0 or negative, added to base_logps before the multiplication by alpha.
        rewards: (B,) external reward of each completion, finite.
        old_logps: (N,) log-probs under the policy that sampled the completions. None: that is this policy.
        clip: bounds of the importance weight, ``0 <= low <= 1 <= high``.
        importance_level: ``"sequence"`` or ``"length_normalized"``, see :meth:`importance_weight`.
        num_sequences: divisor of means over sequences: the sequences with tokens of the whole optimiser step, so that
            the losses of its micro-batches add up to the step's. None (or 0): those of this call.
        num_tokens: the same for means over tokens.
        step: optimiser steps made before this one, for schedules: the trainer counts on when a run is resumed. None
            where nobody counts.

    All floating tensors have logps' dtype, all tensors its device. A completion without tokens adds nothing to any sum,
    mean, group statistic or divisor.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range. The values of cu_seqlens
            and rewards are checked on a CPU only: looking at them on a GPU would make the host wait for the device.
    """

    logps: Tensor
    base_logps: Tensor
    cu_seqlens: Tensor
    alpha: float = 1.0
    log_z: Tensor | None = None
    group_ids: Tensor | None = None
    psi: Tensor | None = None
    rewards: Tensor | None = None
    old_logps: Tensor | None = None
    clip: tuple[float, float] = (0.8, 1.2)
    importance_level: ImportanceLevel = "sequence"
    num_sequences: int | None = None
    num_tokens: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        op = "Trajectories"
        if not isinstance(self.logps, Tensor):
            raise TypeError(f"{op}: logps must be a torch.Tensor, got {type(self.logps).__name__}")
        if self.logps.dim() != 1:
            raise ValueError(f"{op}: logps must have shape (N,), got {tuple(self.logps.shape)}")
        if self.logps.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: logps must be torch.float32 or torch.float64, got {self.logps.dtype}")
        check_cu_seqlens(op, self.cu_seqlens, self.logps.shape[0])
        floats, integers = (self.logps.dtype,), (torch.int64, torch.int32)
        of_tokens, of_sequences = (tuple(self.logps.shape), "(N,)"), ((self.cu_seqlens.shape[0] - 1,), "(B,)")
        for name, (shape, symbols), dtypes in (
            ("base_logps", of_tokens, floats),
            ("old_logps", of_tokens, floats),
            ("log_z", of_sequences, floats),
            ("psi", of_sequences, floats),
            ("rewards", of_sequences, floats),
            ("group_ids", of_sequences, integers),
            ("cu_seqlens", (tuple(self.cu_seqlens.shape), "(B+1,)"), (torch.int32,)),
        ):
            tensor = getattr(self, name)
            if tensor is None and name != "base_logps":
                continue
            require_tensor(op, name, tensor, shape=shape, symbols=symbols, dtypes=dtypes)
            if tensor.device != self.logps.device:
                raise ValueError(f"{op}: {name} must be on logps' device {self.logps.device}, got {tensor.device}")
        if self.rewards is not None and values_are_readable(self.rewards) and not self.rewards.isfinite().all():
            at = int((~self.rewards.isfinite()).nonzero()[0])
            raise ValueError(f"{op}: rewards must be finite, got {self.rewards[at].item()} at {at}")
        require_positive(op, "alpha", self.alpha)
        check_clip(op, self.clip)
        if self.importance_level not in ("sequence", "length_normalized"):
            raise ValueError(
                f"{op}: importance_level must be 'sequence' or 'length_normalized', got {self.importance_level!r}"
            )
        for name in ("num_sequences", "num_tokens", "step"):
            number = getattr(self, name)
            if number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{op}: {name} must be an int or None, got {type(number).__name__}")
            if number < 0:
                raise ValueError(f"{op}: {name} must be >= 0, got {number}")

    # Shapes

    @functools.cached_property
    def lengths(self) -> Tensor:
        """(B,) int32 tokens of each completion."""
        return self.cu_seqlens.diff()

    @functools.cached_property
    def has_tokens(self) -> Tensor:
        """(B,) bool."""
        return self.lengths > 0

    # Sums and means. They run in fp64: a sum of thousands of tokens in fp32 loses the digits that a ratio needs.

    def sums(self, values: Tensor) -> Tensor:
        """(N,) to (B,): the sum over each completion, in values' dtype; differentiable."""
        return segment_sum(self._check("sums", values, self.logps, "(N,)"), self.cu_seqlens)

    def means(self, values: Tensor) -> Tensor:
        """(N,) to (B,): the mean over each completion, 0 for one without tokens, in values' dtype; differentiable."""
        sums = segment_sum(self._check("means", values, self.logps, "(N,)").double(), self.cu_seqlens)
        return (sums / self.lengths.clamp(min=1)).to(values.dtype)

    def per_token(self, values: Tensor) -> Tensor:
        """(B,) to (N,): each completion's value at each of its tokens; differentiable."""
        values = self._check("per_token", values, self.lengths, "(B,)")
        return _PerToken.apply(values, self.token_sequence, self.cu_seqlens)

    def sequence_mean(self, values: Tensor) -> Tensor:
        """(B,) to (): the sum over the completions with tokens / ``num_sequences``; differentiable."""
        values = self._check("sequence_mean", values, self.lengths, "(B,)").where(self.has_tokens, 0.0)
        number = self.num_sequences or self.has_tokens.sum().clamp(min=1)
        return (values.double().sum() / number).to(values.dtype)

    def token_mean(self, values: Tensor) -> Tensor:
        """(N,) to (): the sum over all tokens / ``num_tokens``; differentiable."""
        values = self._check("token_mean", values, self.logps, "(N,)")
        return (values.double().sum() / (self.num_tokens or max(values.shape[0], 1))).to(values.dtype)

    # What most objectives start from

    @functools.cached_property
    def target_logps(self) -> Tensor:
        """(N,) fp64, detached: α (log p_base + ψ) of each token. Its sum over a completion is the log of the target."""
        base = self.base_logps.detach().double()
        return self.alpha * (base if self.psi is None else base + self.per_token(self.psi.detach().double()))

    @functools.cached_property
    def logp_mean(self) -> Tensor:
        """(B,) detached: s, the mean log-prob per token under the policy."""
        return self.means(self.logps.detach())

    def importance_weight(self) -> Tensor:
        """(B,) detached: the clipped importance weight, 1 on-policy and 0 for a completion without tokens. With
        ``log_ratio = sums(logps - old_logps)``, divided by the length if ``"length_normalized"``:

            weight = log_ratio.exp().clamp(*clip)

        where a ratio of any size is clipped before it can overflow.
        """
        if self.old_logps is None:
            return self.has_tokens.to(self.logps.dtype)
        log_ratio = segment_sum(self.logps.detach().double() - self.old_logps.detach().double(), self.cu_seqlens)
        if self.importance_level == "length_normalized":
            log_ratio = log_ratio / self.lengths.clamp(min=1)
        bounds = (math.log(bound) if bound > 0 else -math.inf for bound in self.clip)
        return log_ratio.clamp(*bounds).exp().where(self.has_tokens, 0.0).to(self.logps.dtype)

    # Statistics of the completions of one prompt. Groups become segments of a stable order: sums with fixed bits on
    # any device, and no wait for the number of groups. A group must be in one call: a part of it has other statistics.

    @torch.no_grad()
    def group_sum(self, values: Tensor) -> Tensor:
        """(B,) to (B,) detached: at each completion, the sum over those of its prompt that have tokens."""
        values = self._check("group_sum", values, self.lengths, "(B,)").detach()
        order, rank, offsets, inverse = self._groups
        sums = segment_sum(values.where(self.has_tokens, 0.0)[order], offsets)
        return sums[rank][inverse]

    @torch.no_grad()
    def group_mean(self, values: Tensor, weights: Tensor | None = None) -> Tensor:
        """(B,) to (B,) detached: the (weighted) mean over the completions of a prompt that have tokens. Where the
        weights add up to 0, or no completion has tokens: 0."""
        weights = torch.ones_like(values) if weights is None else weights
        weights = self._check("group_mean", weights, self.lengths, "(B,)").detach().double()
        total = self.group_sum(weights)
        return (self.group_sum(weights * values.detach().double()) / total).where(total != 0, 0.0).to(values.dtype)

    @torch.no_grad()
    def group_max(self, values: Tensor) -> Tensor:
        """(B,) to (B,) detached: the largest over the completions of a prompt that have tokens; -inf without any."""
        values = self._check("group_max", values, self.lengths, "(B,)").detach().where(self.has_tokens, -math.inf)
        order, rank, offsets, inverse = self._groups
        return segment_max(values[order], offsets)[rank][inverse]

    @functools.cached_property
    def group_sizes(self) -> Tensor:
        """(B,) fp64: completions with tokens of each completion's prompt."""
        return self.group_sum(self.has_tokens.double())

    @torch.no_grad()
    def group_advantages(self, scale_rewards: str = "group", *, op: str = "Trajectories.group_advantages") -> Tensor:
        """(B,) detached: rewards minus their mean over the prompt's completions that have tokens, and divided by their
        standard deviation (Bessel's correction) plus 1e-4 if ``scale_rewards`` is ``"group"``, not if it is ``"none"``.

        ``op`` is the name that errors begin with.
        """
        if scale_rewards not in ("group", "none"):
            raise ValueError(f"{op}: scale_rewards must be 'group' or 'none', got {scale_rewards!r}")
        if self.rewards is None:
            raise ValueError(f"{op}: needs rewards (B,), got None")
        self.require_groups(op, "the advantage")
        rewards = self.rewards.detach().double()
        advantages = (rewards - self.group_mean(rewards)).where(self.has_tokens, 0.0)
        if scale_rewards == "group":
            variance = self.group_sum(advantages.square()) / (self.group_sizes - 1).clamp(min=1)
            advantages = advantages / (variance.sqrt() + 1e-4)
        return advantages.to(self.logps.dtype)

    def require_groups(self, op: str, purpose: str) -> None:
        """ValueError without ``group_ids``, or on a CPU where a prompt has one completion: it is its own mean, and
        nothing is left to learn from. On a GPU, where looking would make the host wait, such a group adds nothing."""
        if self.group_ids is None:
            raise ValueError(f"{op}: {purpose} needs group_ids (B,), got None")
        if not values_are_readable(self.group_ids):
            return
        ids, counts = self.group_ids.unique(return_counts=True)
        if (counts == 1).any():
            alone = int(ids[counts == 1][0])
            raise ValueError(f"{op}: {purpose} needs two completions of a prompt or more, got one in group {alone}")

    @functools.cached_property
    def _groups(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(order that brings groups together, group number of each place, offsets of the groups, the way back)."""
        if self.group_ids is None:
            raise ValueError("Trajectories: group statistics need group_ids (B,), got None")
        order = torch.argsort(self.group_ids, stable=True)
        ids = self.group_ids[order]
        rank = torch.zeros_like(order)
        rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
        places = torch.arange(len(order) + 1, device=order.device)
        return order, rank, torch.searchsorted(rank, places, out_int32=True), torch.argsort(order)

    @functools.cached_property
    def token_sequence(self) -> Tensor:
        """(N,) int64: the completion of each token."""
        places = torch.arange(self.logps.shape[0], device=self.logps.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:].contiguous(), places, right=True)

    def _check(self, method: str, values: Tensor, like: Tensor, symbols: str) -> Tensor:
        dtypes = (torch.float32, torch.float64)
        shape = tuple(like.shape)
        require_tensor(f"Trajectories.{method}", "values", values, shape=shape, symbols=symbols, dtypes=dtypes)
        return values


ObjectiveFunction: TypeAlias = Callable[[Trajectories], "ObjectiveOutput | Tensor"]
"""An objective with its options bound."""


class _PerToken(torch.autograd.Function):
    """Values of sequences at their tokens. A gather, whose own gradient would add with atomics on CUDA."""

    @staticmethod
    def forward(ctx, values, sequence, cu_seqlens):
        ctx.save_for_backward(cu_seqlens)
        return values[sequence]

    @staticmethod
    def backward(ctx, grad):
        return segment_sum(grad, *ctx.saved_tensors), None, None
