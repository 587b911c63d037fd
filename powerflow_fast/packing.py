"""Ragged prompts and completions to one right-padded batch, and the packed view of its completion tokens.

A model runs on ``(B, T)`` rows of prompt + completion, padded on the right. Everything after it is packed: the ``N``
completion tokens of all rows lie one after the other, and row ``b`` owns ``[cu_seqlens[b], cu_seqlens[b + 1])``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain

import torch
from torch import Tensor

from .logprobs import segment_sum

__all__ = ["PaddedBatch", "pad_batch", "repeat_by_segment", "segment_sum"]


@dataclass(frozen=True)
class PaddedBatch:
    """A right-padded batch with the indices that turn it into packed completion tokens; made by :func:`pad_batch`.

    The indices are computed once where the lists are, on the CPU, so that no device sync is needed later.
    """

    input_ids: Tensor
    """(B, T) int64, prompt then completion then padding."""
    attention_mask: Tensor
    """(B, T) int64, 1 on real tokens. It comes from the lengths: a real token may have the padding id."""
    prompt_lengths: Tensor
    """(B,) int64, at least 1."""
    completion_lengths: Tensor
    """(B,) int64, 0 for an empty completion."""
    positions: Tensor
    """(N,) int64 indices into the flattened (B * T) rows: position t - 1, whose output predicts completion token t."""
    labels: Tensor
    """(N,) int64, the completion tokens themselves."""
    cu_seqlens: Tensor
    """(B + 1,) int32, the boundaries of the rows in the packed order."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> PaddedBatch:
        """The same batch with every tensor on ``device``."""
        return PaddedBatch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


def pad_batch(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int) -> PaddedBatch:
    """Right-pad ``prompt_ids[b] + completion_ids[b]`` for all b; ``T`` is the longest sum. A completion may be empty.

    ``pad_id`` fills the unused places and is masked: any valid token id will do. Raises ValueError where the two lists
    differ in length, are empty, or a prompt has no token (nothing would then predict the first completion token).
    """
    if len(prompt_ids) != len(completion_ids) or not prompt_ids:
        raise ValueError(
            "pad_batch: prompt_ids and completion_ids must be equally long and not empty, "
            f"got {len(prompt_ids)} and {len(completion_ids)}"
        )
    prompt_lengths = torch.tensor([len(ids) for ids in prompt_ids])
    completion_lengths = torch.tensor([len(ids) for ids in completion_ids])
    if (empty := (prompt_lengths == 0).nonzero()).numel():
        raise ValueError(f"pad_batch: prompt_ids[{int(empty[0])}] is empty; a prompt needs at least one token")

    lengths = prompt_lengths + completion_lengths
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    rows = chain.from_iterable(zip(prompt_ids, completion_ids, strict=True))
    input_ids = torch.full(mask.shape, pad_id)
    input_ids[mask] = torch.tensor(list(chain.from_iterable(rows)))  # row-major, as the mask selects

    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), completion_lengths.cumsum(0)])
    first = torch.arange(len(mask)) * mask.shape[1] + prompt_lengths - 1
    offset = repeat_by_segment(first - cu_seqlens[:-1], cu_seqlens, total=int(cu_seqlens[-1]))
    positions = offset + torch.arange(len(offset))
    return PaddedBatch(
        input_ids=input_ids,
        attention_mask=mask.long(),
        prompt_lengths=prompt_lengths,
        completion_lengths=completion_lengths,
        positions=positions,
        labels=input_ids.flatten()[positions + 1],
        cu_seqlens=cu_seqlens.int(),
    )


def repeat_by_segment(values: Tensor, cu_seqlens: Tensor, *, total: int | None = None) -> Tensor:
    """(N,) with ``values[b]`` (B,) at every token of segment b. ``total`` = N, when known, saves a device sync."""
    return torch.repeat_interleave(values, cu_seqlens.diff().long(), output_size=total)
