"""A buffer of finished groups of completions, to train on more than once.

Whole groups, since group log Z' and group advantages need all completions of a prompt. What is stored with each token
is what an importance ratio and the loss need later: its log-prob under the base model, which never changes, and under
the policy that sampled it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..ops.checks import require_tensor


@dataclass
class ReplayBatch:
    """B completions, whole groups: what :meth:`ReplayBuffer.add` takes and :meth:`ReplayBuffer.sample` returns."""

    prompt_ids: list[list[int]]
    """B prompts; those of a group are equal."""
    completion_ids: list[list[int]]
    """B completions of N tokens together."""
    finished: list[bool]
    group_ids: Tensor
    """(B,) int64: completions with the same number answer the same prompt."""
    psi: Tensor
    """(B,) fp32 format penalty."""
    base_logps: Tensor
    """(N,) fp32 log-probs of the completion tokens under p_base, completion after completion."""
    old_logps: Tensor
    """(N,) fp32 log-probs under the policy that sampled them: the behaviour policy of the importance ratio."""
    rewards: Tensor | None = None
    """(B,) fp32, or None in a buffer without rewards."""
    steps: Tensor | None = None
    """(B,) int64: the optimiser step whose weights sampled each; filled in by the buffer."""

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completion_ids]

    def to(self, device: torch.device | str) -> ReplayBatch:
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return ReplayBatch(**(vars(self) | moved))


@dataclass
class _Group:
    """K completions of one prompt as CPU tensors; the names are those of the saved state."""

    prompt_ids: Tensor
    completion_ids: Tensor
    lengths: Tensor
    finished: Tensor
    psi: Tensor
    base_logps: Tensor
    old_logps: Tensor
    rewards: Tensor | None
    step: int
    priority: float


_TOKENS = {"completion_ids", "base_logps", "old_logps"}
_COMPLETIONS = {"lengths", "finished", "psi", "rewards"}


class ReplayBuffer:
    """Up to ``capacity`` groups on the CPU, sampled uniformly or by priority.

    With ``prioritized`` a group is drawn with a probability proportional to ``exp(priority / priority_temperature)``,
    and a full buffer drops its lowest priority (the older of equal ones, and the newcomer if it is the lowest). The
    priority is the mean reward of the group, or what :meth:`add` is given. With log-rewards and temperature 1 that is
    sampling in proportion to the reward, the scheme of the GFlowNet fine-tuning of language models by Hu et al. 2023
    (arXiv 2310.04363; in the code of their classification task, for single completions with replacement); rewards
    between 0 and 1 want a lower temperature, e.g. 0.1. Without ``prioritized`` every group is as likely as another, and
    a full buffer drops its oldest.

    Draws are without replacement and come from the buffer's own generator, so equal seeds and calls give equal batches
    whatever else draws random numbers; its state is saved with the contents.

    Args:
        capacity: groups, >= 1.
        seed: of the generator.
        priority_temperature: > 0, used with ``prioritized`` only.

    Raises:
        TypeError, ValueError: an option out of range; what :meth:`add` and :meth:`sample` are given in another shape,
            dtype or number, by name.
    """

    def __init__(self, capacity: int, *, prioritized: bool = False, seed: int = 0, priority_temperature: float = 1.0):
        for name, value in (("capacity", capacity), ("seed", seed)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"ReplayBuffer: {name} must be an int, got {type(value).__name__}")
        if capacity < 1:
            raise ValueError(f"ReplayBuffer: capacity must be >= 1, got {capacity}")
        if not isinstance(prioritized, bool):
            raise TypeError(f"ReplayBuffer: prioritized must be a bool, got {type(prioritized).__name__}")
        if not (isinstance(priority_temperature, (int, float)) and 0 < priority_temperature < math.inf):
            raise ValueError(f"ReplayBuffer: priority_temperature must be finite and > 0, got {priority_temperature!r}")
        self.capacity, self.prioritized = capacity, prioritized
        self.priority_temperature = float(priority_temperature)
        self._generator = torch.Generator().manual_seed(seed)
        self._groups: list[_Group] = []  # oldest first

    def __len__(self) -> int:
        """The number of groups."""
        return len(self._groups)

    @property
    def num_completions(self) -> int:
        return sum(len(group.lengths) for group in self._groups)

    def add(self, batch: ReplayBatch, *, step: int, priorities: Sequence[float] | None = None) -> None:
        """Store copies of the groups of ``batch``, in the order of their first completions; a full buffer drops others.

        Args:
            step: the optimiser step whose weights sampled them.
            priorities: one finite number per group, in that order; None takes the groups' mean rewards. Only with
                ``prioritized``.
        """
        op = "ReplayBuffer.add"
        _check(op, batch)
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"{op}: step must be an int, got {type(step).__name__}")
        if self._groups and (self._groups[0].rewards is None) != (batch.rewards is None):
            has = "no rewards" if self._groups[0].rewards is None else "rewards"
            raise ValueError(f"{op}: rewards must be given for all groups or for none; those in the buffer have {has}")
        members: dict[int, list[int]] = {}
        for number, group in enumerate(batch.group_ids.tolist()):
            members.setdefault(group, []).append(number)
        numbers = list(members.values())
        order = self._priorities(op, batch, numbers, priorities)
        new = [_group(op, batch, group, step, priority) for group, priority in zip(numbers, order, strict=True)]
        for group in new:  # after all were checked: a batch is added whole or not at all
            self._groups.append(group)
            if len(self._groups) > self.capacity:
                # the oldest of the lowest: without priorities, which are all zero then, simply the oldest
                del self._groups[min(range(len(self._groups)), key=lambda i: self._groups[i].priority)]

    def _priorities(
        self, op: str, batch: ReplayBatch, groups: list[list[int]], priorities: Sequence[float] | None
    ) -> list[float]:
        if not self.prioritized:
            if priorities is not None:
                raise ValueError(f"{op}: priorities must be None in a buffer with prioritized=False")
            return [0.0] * len(groups)
        if priorities is None:
            if batch.rewards is None:
                raise ValueError(f"{op}: rewards or priorities must be given in a buffer with prioritized=True")
            rewards = batch.rewards.tolist()
            priorities = [math.fsum(rewards[i] for i in group) / len(group) for group in groups]
        priorities = [float(priority) for priority in priorities]
        if len(priorities) != len(groups):
            raise ValueError(f"{op}: priorities must have one entry per group ({len(groups)}), got {len(priorities)}")
        if not all(map(math.isfinite, priorities)):
            raise ValueError(f"{op}: priorities must be finite, got {priorities}")
        return priorities

    def drop_before(self, step: int) -> int:
        """Drop the groups that weights older than ``step`` sampled; return how many. Their ratios say little."""
        before = len(self._groups)
        self._groups = [group for group in self._groups if group.step >= step]
        return before - len(self._groups)

    def sample(self, num_groups: int) -> ReplayBatch:
        """``num_groups`` different groups, in the order drawn; ``group_ids`` are 0, 1, ... ; all on the CPU.

        Raises:
            ValueError: fewer groups are stored.
        """
        op = "ReplayBuffer.sample"
        if isinstance(num_groups, bool) or not isinstance(num_groups, int):
            raise TypeError(f"{op}: num_groups must be an int, got {type(num_groups).__name__}")
        if not 1 <= num_groups <= len(self._groups):
            raise ValueError(f"{op}: num_groups must lie in [1, {len(self)}], the groups stored, got {num_groups}")
        # The largest of log-weights plus Gumbel noise are a draw without replacement in proportion to the weights, and
        # no weight can underflow.
        noise = torch.empty(len(self._groups), dtype=torch.float64).exponential_(generator=self._generator).log().neg()
        priorities = torch.tensor([group.priority for group in self._groups], dtype=torch.float64)
        keys = priorities / self.priority_temperature + noise
        drawn = [self._groups[i] for i in keys.argsort(descending=True, stable=True)[:num_groups].tolist()]
        sizes = torch.tensor([len(group.lengths) for group in drawn])
        flat = {name: torch.cat([getattr(g, name) for g in drawn]) for name in ("psi", "base_logps", "old_logps")}
        return ReplayBatch(
            prompt_ids=[group.prompt_ids.tolist() for group in drawn for _ in group.lengths],
            completion_ids=[
                part.tolist() for group in drawn for part in group.completion_ids.split(group.lengths.tolist())
            ],
            finished=[flag for group in drawn for flag in group.finished.tolist()],
            group_ids=torch.arange(len(drawn)).repeat_interleave(sizes),
            rewards=None if drawn[0].rewards is None else torch.cat([group.rewards for group in drawn]),
            steps=torch.tensor([group.step for group in drawn]).repeat_interleave(sizes),
            **flat,
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for ``save_checkpoint``; :meth:`load_state_dict` continues from them bit for bit.

        Ragged lists are flat, with the numbers to split them again beside them.
        """
        groups = self._groups
        fields = ("prompt_ids", *sorted(_TOKENS | _COMPLETIONS))
        with_rewards = bool(groups) and groups[0].rewards is not None
        tensors = {
            name: torch.cat([getattr(group, name) for group in groups])
            for name in fields
            if groups and (name != "rewards" or with_rewards)
        }
        tensors["prompt_lengths"] = torch.tensor([len(group.prompt_ids) for group in groups], dtype=torch.int64)
        tensors["group_sizes"] = torch.tensor([len(group.lengths) for group in groups], dtype=torch.int64)
        tensors["steps"] = torch.tensor([group.step for group in groups], dtype=torch.int64)
        tensors["priorities"] = torch.tensor([group.priority for group in groups], dtype=torch.float64)
        tensors["generator"] = self._generator.get_state()
        return tensors, self._options()

    def _options(self) -> dict[str, Any]:
        names = ("capacity", "prioritized", "priority_temperature")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace contents and random state by those saved; :class:`CheckpointError` if the buffer's options differ."""
        differences = [f"{k}={meta.get(k)!r} instead of {v!r}" for k, v in self._options().items() if meta.get(k) != v]
        if differences:
            raise CheckpointError(f"ReplayBuffer: the checkpoint is of a buffer with {', '.join(differences)}")
        sizes = tensors["group_sizes"].tolist()
        groups: list[_Group] = []
        if sizes:
            lengths = tensors["lengths"].split(sizes)
            tokens = [int(part.sum()) for part in lengths]
            splits = {"prompt_ids": tensors["prompt_lengths"].tolist()}
            splits |= dict.fromkeys(_TOKENS, tokens) | dict.fromkeys(_COMPLETIONS, sizes)
            parts = {name: tensors[name].split(split) for name, split in splits.items() if name in tensors}
            for number in range(len(sizes)):
                fields = {name: part[number].clone() for name, part in parts.items()}
                groups.append(
                    _Group(
                        **({"rewards": None} | fields),
                        step=int(tensors["steps"][number]),
                        priority=float(tensors["priorities"][number]),
                    )
                )
        self._groups = groups
        self._generator.set_state(tensors["generator"])


def _check(op: str, batch: ReplayBatch) -> None:
    b, n = len(batch.completion_ids), sum(batch.lengths)
    for name in ("prompt_ids", "finished"):
        if len(getattr(batch, name)) != b:
            raise ValueError(
                f"{op}: {name} must have B={b} entries, as many as completion_ids, got {len(getattr(batch, name))}"
            )
    require_tensor(op, "group_ids", batch.group_ids, shape=(b,), symbols="(B,)", dtypes=(torch.int64,))
    sizes = {"psi": (b, "(B,)"), "rewards": (b, "(B,)"), "base_logps": (n, "(N,)"), "old_logps": (n, "(N,)")}
    for name, (size, symbols) in sizes.items():
        if name == "rewards" and batch.rewards is None:
            continue
        require_tensor(op, name, getattr(batch, name), shape=(size,), symbols=symbols, dtypes=(torch.float32,))


def _group(op: str, batch: ReplayBatch, members: list[int], step: int, priority: float) -> _Group:
    prompt = batch.prompt_ids[members[0]]
    for number in members:
        if list(batch.prompt_ids[number]) != list(prompt):
            raise ValueError(
                f"{op}: prompt_ids must be equal within a group, completions {members[0]} and {number} of group "
                f"{int(batch.group_ids[number])} have different ones"
            )
    starts = list(itertools.accumulate(batch.lengths, initial=0))
    tokens = torch.tensor([t for i in members for t in range(starts[i], starts[i + 1])], dtype=torch.int64)
    at = torch.tensor(members, dtype=torch.int64)

    def pick(values: Tensor, indices: Tensor) -> Tensor:
        return values.detach().cpu()[indices]  # a copy

    return _Group(
        prompt_ids=torch.tensor(prompt, dtype=torch.int32),
        completion_ids=torch.tensor([t for i in members for t in batch.completion_ids[i]], dtype=torch.int32),
        lengths=torch.tensor([len(batch.completion_ids[i]) for i in members], dtype=torch.int64),
        finished=torch.tensor([batch.finished[i] for i in members], dtype=torch.bool),
        psi=pick(batch.psi, at),
        base_logps=pick(batch.base_logps, tokens),
        old_logps=pick(batch.old_logps, tokens),
        rewards=None if batch.rewards is None else pick(batch.rewards, at),
        step=step,
        priority=priority,
    )
