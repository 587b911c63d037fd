"""The completions of a rollout, and what stays fixed while they are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.batches import runs

_OF_SEQUENCES = ("group_ids", "psi", "rewards")
_OF_TOKENS = ("base_logps", "old_logps")


@dataclass
class Samples:
    """Completions of one rollout on this device, N tokens in all, one after the other."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    group_ids: Tensor
    """(B,) int64: completions with the same number answer the same prompt."""
    psi: Tensor
    """(B,) fp32 format penalty, 0 or negative."""
    base_logps: Tensor = field(default_factory=lambda: torch.empty(0))
    """(N,) fp32 log-probs under p_base."""
    old_logps: Tensor | None = None
    """(N,) fp32 under the policy that drew them; None when the rollout serves a single update."""
    rewards: Tensor | None = None
    """(B,) fp32, for objectives that take one."""

    def __len__(self) -> int:
        return len(self.completion_ids)

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completion_ids]

    @property
    def cu_seqlens(self) -> Tensor:
        """(B + 1,) int32 boundaries of the completions in what has N elements."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int().to(self.psi.device)

    def take(self, indices: Sequence[int]) -> Samples:
        """The sequences with these numbers, in this order; ``base_logps`` must be there."""
        lists = [[values[i] for i in indices] for values in (self.prompt_ids, self.completion_ids, self.finished)]
        starts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        tokens = [torch.arange(starts[i], starts[i + 1]) for i in indices]
        at = {name: torch.tensor(list(indices), dtype=torch.int64) for name in _OF_SEQUENCES}
        at |= dict.fromkeys(_OF_TOKENS, torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64))
        taken = {name: None if v is None else v[at[name].to(v.device)] for name, v in self.tensors().items()}
        return Samples(*lists, **taken)

    def split(self, size: int) -> Iterator[Samples]:
        for indices in runs(len(self), size):
            yield self.take(indices)

    def to(self, device: torch.device) -> Samples:
        moved = {name: None if value is None else value.to(device) for name, value in self.tensors().items()}
        return Samples(self.prompt_ids, self.completion_ids, self.finished, **moved)

    def tensors(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name) for name in (*_OF_SEQUENCES, *_OF_TOKENS)}
