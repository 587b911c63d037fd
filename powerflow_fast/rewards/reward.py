"""Rewards of the policy-gradient objectives: one number for each completion of a rollout.

A reward takes :class:`RewardInputs` and returns (B,) fp32. Ready-made ones that need no labels: :func:`empo` and
:func:`ttrl` compare the answers of a group, :func:`intuitor` and :func:`rent` read the policy's confidence. Functions
of text, one completion or a whole batch at a time, become rewards by :func:`user_reward`; :func:`resolve_reward` takes
names, functions and lists of them, with weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..ops.checks import require_tensor
from ..ops.segments import check_cu_seqlens


@dataclass(frozen=True, eq=False)
class RewardInputs:
    """B completions of one rollout, whole groups, and what a reward may want to know of them.

    Raises:
        TypeError, ValueError: a list of another length than B, or a tensor of another shape or dtype; it is named.
    """

    prompts: Sequence[Any]
    """B prompts, text or chat messages, as the user gave them."""
    completions: Sequence[str]
    """B texts."""
    columns: Sequence[Mapping[str, Any]]
    """B rows: the other columns of each prompt."""
    group_ids: Tensor
    """(B,) int64, equal for the completions of one prompt; any values, in any order."""
    cu_seqlens: Tensor
    """(B+1,) int32: the tokens of completion b are rows cu_seqlens[b] to cu_seqlens[b+1] of the (N,) tensors."""
    finished: Sequence[bool]
    """B: whether the completion ended by itself, not at the limit on its length."""
    entropy: Tensor | None = None
    """(N,) entropy of the policy's distribution at each token, nats; from ``linear_logprob_stats``, as the next two."""
    lse: Tensor | None = None
    """(N,) log-sum-exp of the logits."""
    mean_logit: Tensor | None = None
    """(N,) mean of the logits over the vocabulary."""
    logps: Tensor | None = None
    """(N,) log-prob of each token under the policy, nats."""
    completion_ids: Sequence[Sequence[int]] | None = None
    """B lists of token ids, for batch functions that ask for them."""

    def __post_init__(self) -> None:
        op = "RewardInputs"
        if not isinstance(self.group_ids, Tensor):
            raise TypeError(f"{op}: group_ids must be a torch.Tensor, got {type(self.group_ids).__name__}")
        if self.group_ids.dim() != 1:
            raise ValueError(f"{op}: group_ids must have shape (B,), got {tuple(self.group_ids.shape)}")
        b = len(self.group_ids)
        require_tensor(op, "group_ids", self.group_ids, shape=(b,), symbols="(B,)", dtypes=(torch.int64, torch.int32))
        for name in ("prompts", "completions", "columns", "finished", "completion_ids"):
            values = getattr(self, name)
            if values is None and name == "completion_ids":
                continue
            if len(values) != b:
                raise ValueError(f"{op}: {name} must have B={b} entries, as many as group_ids, got {len(values)}")
        require_tensor(op, "cu_seqlens", self.cu_seqlens, shape=(b + 1,), symbols="(B+1,)", dtypes=(torch.int32,))
        self._require_device(op, "cu_seqlens", self.cu_seqlens)
        per_token = {name: getattr(self, name) for name in ("entropy", "lse", "mean_logit", "logps")}
        given = {name: value for name, value in per_token.items() if value is not None}
        sizes = [value.numel() for value in given.values() if isinstance(value, Tensor)]
        n = sizes[0] if sizes else int(self.cu_seqlens[-1])
        check_cu_seqlens(op, self.cu_seqlens, n)
        for name, value in given.items():
            require_tensor(op, name, value, shape=(n,), symbols="(N,)", dtypes=(torch.float32, torch.float64))
            self._require_device(op, name, value)

    def _require_device(self, op: str, name: str, value: Tensor) -> None:
        if value.device != self.group_ids.device:
            raise ValueError(f"{op}: {name} must be on group_ids' device {self.group_ids.device}, got {value.device}")

    def __len__(self) -> int:
        return len(self.completions)

    @functools.cached_property
    def groups(self) -> list[list[int]]:
        """The numbers of each group's completions; groups in the order of their first ones."""
        members: dict[int, list[int]] = {}
        for number, group in enumerate(self.group_ids.tolist()):
            members.setdefault(group, []).append(number)
        return list(members.values())

    def describe(self, number: int) -> str:
        """Completion ``number`` and its prompt in a few words, for error messages."""
        prompt = repr(self.prompts[number])
        return f"completion {number} of prompt {prompt[:60]}{'...' if len(prompt) > 60 else ''}"


RewardFunction = Callable[[RewardInputs], Tensor]


@dataclass(frozen=True)
class Reward:
    """A named reward; calling it checks what ``function`` returns.

    Raises:
        ConfigError: the result is no floating-point tensor (B,), or not finite; the reward and the prompt are named.
    """

    name: str
    function: RewardFunction
    """Takes :class:`RewardInputs`, returns (B,)."""
    needs_stats: bool = False
    """Reads ``entropy``, ``lse`` or ``mean_logit``: the caller computes them with ``linear_logprob_stats``."""
    needs_groups: bool = False
    """Compares the completions of a group: every group must have two or more."""
    compares_answers: bool = False
    """``function`` takes the keyword ``equivalent``: see :func:`powerflow_fast.rewards.answers.resolve_equivalence`."""

    def __call__(self, inputs: RewardInputs) -> Tensor:
        values = self.function(inputs)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            kind = values.dtype if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(f"reward {self.name!r} must return a floating-point tensor, got {kind}")
        if values.shape != (len(inputs),):
            raise ConfigError(
                f"reward {self.name!r} must return shape (B,)=({len(inputs)},), got {tuple(values.shape)}"
            )
        values = values.detach().float()
        finite = values.isfinite()
        if not finite.all():
            number = int((~finite).nonzero()[0])
            raise ConfigError(
                f"reward {self.name!r} must be finite in fp32, got {float(values[number])} for "
                f"{inputs.describe(number)}"
            )
        return values


@dataclass(frozen=True)
class RewardSum:
    """``sum(weight * part(inputs))`` of one or more rewards: what :func:`resolve_reward` returns."""

    parts: tuple[Reward, ...]
    weights: tuple[float, ...]

    @property
    def needs_stats(self) -> bool:
        return any(part.needs_stats for part in self.parts)

    @property
    def needs_groups(self) -> bool:
        return any(part.needs_groups for part in self.parts)

    @property
    def names(self) -> list[str]:
        """A name for each part; the second of two equal ones gets ``_2``, and so on."""
        names: list[str] = []
        for part in self.parts:
            count = sum(p.name == part.name for p in self.parts[: len(names)])
            names.append(f"{part.name}_{count + 1}" if count else part.name)
        return names

    def each(self, inputs: RewardInputs) -> dict[str, Tensor]:
        """(B,) fp32 of each part before its weight, by name: for logs, and for :meth:`total`."""
        return dict(zip(self.names, (part(inputs) for part in self.parts), strict=True))

    def total(self, each: Mapping[str, Tensor]) -> Tensor:
        """(B,) fp32 weighted sum of what :meth:`each` returned."""
        return sum(weight * each[name].double() for name, weight in zip(self.names, self.weights, strict=True)).float()

    def __call__(self, inputs: RewardInputs) -> Tensor:
        return self.total(self.each(inputs))


# Rewards of answers


# Rewards of confidence


def one_per_completion(values: list[float], inputs: RewardInputs) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=inputs.group_ids.device)


# Functions of text


# Names
