"""Rewards of the policy-gradient objectives: one number for each completion of a rollout.

A reward takes :class:`RewardInputs` and returns (B,) fp32. Ready-made ones that need no labels: :func:`empo` and
:func:`ttrl` compare the answers of a group, :func:`intuitor` and :func:`rent` read the policy's confidence. Functions
of text, one completion or a whole batch at a time, become rewards by :func:`user_reward`; :func:`resolve_reward` takes
names, functions and lists of them, with weights.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .answers import Equivalence, cluster_answers, extract_answer, resolve_equivalence, same_answer
from .errors import ConfigError, suggest
from .ops.checks import require_tensor
from .ops.segments import check_cu_seqlens, segment_sum
from .tools.user_functions import Columns, number_of

__all__ = [
    "REWARDS",
    "Reward",
    "RewardInputs",
    "RewardSum",
    "empo",
    "intuitor",
    "rent",
    "resolve_reward",
    "ttrl",
    "user_reward",
]


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
    """``function`` takes the keyword ``equivalent``: see :func:`powerflow_fast.answers.resolve_equivalence`."""

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
    return _tensor(values, inputs)


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
    return _tensor(values, inputs)


# Rewards of confidence


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


def _tensor(values: list[float], inputs: RewardInputs) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=inputs.group_ids.device)


# Functions of text


def user_reward(fn: Callable[..., Any], *, name: str | None = None) -> Reward:
    """A reward from a function of text. Its parameters say which of two forms it has:

    * one completion at a time, ``fn(prompt, completion, **columns) -> float``, as for format functions;
    * a whole batch, for a function with a parameter named ``completions``, by keyword only:
      ``fn(prompts=..., completions=..., completion_ids=..., **columns) -> list of B floats``, columns as lists. This is
      TRL's form, and a completion of a chat prompt is a list of one message here, as there.

    A function without ``**kwargs`` gets only what it names. Columns of these names ("prompt", "completion") are left
    out.

    Args:
        name: for logs and errors; None takes the function's own.

    Raises:
        ConfigError: ``fn`` has neither form; when the reward is called: a column that ``fn`` requires is missing, its
            result is no finite number, or there are not B of them. Function and prompt are named.
    """
    name = name or getattr(fn, "__name__", None) or type(fn).__name__
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r} must be a function with a signature: {error}") from error
    parameters = signature.parameters.values()
    if "completions" in signature.parameters:
        return Reward(name, _TextReward(fn, name, Columns(parameters)).batch)
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    enough = len(positional) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    if not enough or "completion" in positional[:1] + positional[2:]:
        raise ConfigError(
            f"reward {name!r} must take (prompt, completion, **columns), or for whole batches keywords with "
            f"`completions` among them, got {name}{signature}"
        )
    return Reward(name, _TextReward(fn, name, Columns.of(signature)).single)


class _TextReward:
    """``fn`` under the conventions of :func:`user_reward`."""

    def __init__(self, fn: Callable[..., Any], name: str, columns: Columns):
        self.fn, self.name, self.columns = fn, name, columns

    def single(self, inputs: RewardInputs) -> Tensor:
        values = []
        rows = zip(inputs.prompts, inputs.completions, inputs.columns, strict=True)
        for number, (prompt, completion, row) in enumerate(rows):
            result = self.fn(prompt, completion, **self._keywords(row, inputs, number))
            values.append(_number(self.name, result, inputs, number))
        return _tensor(values, inputs)

    def batch(self, inputs: RewardInputs) -> Tensor:
        names = dict.fromkeys(name for row in inputs.columns for name in row)
        given: dict[str, Any] = {name: [row.get(name) for row in inputs.columns] for name in names}
        given["prompts"] = list(inputs.prompts)
        given["completions"] = [
            completion if isinstance(prompt, str) else [{"role": "assistant", "content": completion}]
            for prompt, completion in zip(inputs.prompts, inputs.completions, strict=True)
        ]
        if inputs.completion_ids is not None:
            given["completion_ids"] = [list(ids) for ids in inputs.completion_ids]
        result = self.fn(**self._keywords(given, inputs, 0)) if len(inputs) else []
        if isinstance(result, (str, bytes)) or not hasattr(result, "__len__"):
            raise ConfigError(
                f"reward {self.name!r} must return a list of B={len(inputs)} numbers, got {_shown(result)}"
            )
        if len(result) != len(inputs):
            raise ConfigError(f"reward {self.name!r} must return B={len(inputs)} numbers, got {len(result)}")
        return _tensor([_number(self.name, value, inputs, i) for i, value in enumerate(result)], inputs)

    def _keywords(self, given: Mapping[str, Any], inputs: RewardInputs, number: int) -> dict[str, Any]:
        chosen = self.columns.chosen(given)
        if missing := [name for name in self.columns.required if name not in chosen]:
            raise ConfigError(
                f"reward {self.name!r} needs the column {missing[0]!r}, which {inputs.describe(number)} lacks; its "
                f"columns: {', '.join(inputs.columns[number]) or 'none'}"
            )
        return chosen


def _number(name: str, value: Any, inputs: RewardInputs, number: int) -> float:
    result = number_of(value)
    if result is None:
        raise ConfigError(
            f"reward {name!r} must give a number, got {_shown(value)} for {inputs.describe(number)}"
            + ("; return 0.0 where the reward does not apply" if value is None else "")
        )
    if not math.isfinite(result):
        raise ConfigError(f"reward {name!r} must give a finite number, got {result} for {inputs.describe(number)}")
    return result


def _shown(value: Any) -> str:
    return f"{repr(value)[:60]} ({type(value).__name__})"


# Names

REWARDS: dict[str, Reward] = {
    "empo": Reward("empo", empo, needs_groups=True, compares_answers=True),
    "intuitor": Reward("intuitor", intuitor, needs_stats=True),
    "rent": Reward("rent", rent, needs_stats=True),
    "ttrl": Reward("ttrl", ttrl, needs_groups=True, compares_answers=True),
}


def resolve_reward(
    reward: str | Callable[..., Any] | Reward | Sequence[str | Callable[..., Any] | Reward],
    *,
    weights: Sequence[float] | None = None,
    answer_equivalence: str | Equivalence = "normalized",
) -> RewardSum:
    """The reward to train with, from a name in :data:`REWARDS`, a function, a :class:`Reward`, or a list of these.

    Args:
        reward: a function is wrapped by :func:`user_reward`; one that takes :class:`RewardInputs` is wrapped by the
            caller: ``Reward("mine", fn, needs_stats=True)``.
        weights: one finite number for each reward; None: all 1.
        answer_equivalence: for the rewards that compare answers: "normalized", "math_verify" or a function.

    Raises:
        ConfigError: an unknown name, an object that is no reward, or weights of the wrong number or kind.
    """
    rewards = list(reward) if isinstance(reward, (list, tuple)) else [reward]
    if not rewards:
        raise ConfigError("reward must name at least one reward, got an empty list")
    equivalent = resolve_equivalence(answer_equivalence)
    parts = [_resolve_one(one) for one in rewards]
    parts = [
        replace(part, function=functools.partial(part.function, equivalent=equivalent))
        if part.compares_answers
        else part
        for part in parts
    ]
    return RewardSum(tuple(parts), _weights(weights, len(parts)))


def _resolve_one(reward: str | Callable[..., Any] | Reward) -> Reward:
    if isinstance(reward, Reward):
        return reward
    if isinstance(reward, str):
        if reward not in REWARDS:
            raise ConfigError(
                f"reward must be a function or one of {', '.join(REWARDS)}, got {reward!r}{suggest(reward, REWARDS)}"
            )
        return REWARDS[reward]
    if not callable(reward):
        raise ConfigError(f"reward must be a function or a name, got {type(reward).__name__}")
    ready_made = next((known for known in REWARDS.values() if known.function is reward), None)
    return ready_made or user_reward(reward)


def _weights(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1.0,) * count
    if not isinstance(weights, (list, tuple)) or len(weights) != count:
        got = len(weights) if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise ConfigError(f"reward_weights must be a list with one number for each of {count} rewards, got {got}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"reward_weights must be finite numbers, got {weight!r}")
    return tuple(float(weight) for weight in weights)
