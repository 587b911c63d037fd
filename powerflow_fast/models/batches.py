"""Ragged prompts and completions to one batch of a model, padded or packed, and the packed view of its completions.

A model runs on ``(B, T)`` rows of prompt + completion, padded on the right, or on fewer rows in which the sequences
lie end to end and the position ids restart at each. Everything after it is packed: the ``N`` completion
tokens of all sequences lie one after the other, and sequence ``b`` owns ``[cu_seqlens[b], cu_seqlens[b + 1])``.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """What a model reads, and the indices that turn its output into packed prompt and completion tokens.

    The indices are computed once where the lists are, on the CPU, so that no device sync is needed later.
    """

    input_ids: Tensor
    """(R, T) int64 rows, prompt then completion of each sequence; R = B where they are padded."""
    prompt_lengths: Tensor
    """(B,) int64, at least 1."""
    completion_lengths: Tensor
    """(B,) int64, 0 for an empty completion."""
    prompt_positions: Tensor
    """(P,) int64 indices of all prompt tokens into the flattened rows."""
    positions: Tensor
    """(N,) int64 indices into the flattened rows: the place before completion token t, whose output predicts it."""
    labels: Tensor
    """(N,) int64, the completion tokens themselves."""
    cu_seqlens: Tensor
    """(B + 1,) int32, the boundaries of the sequences in the packed order."""

    def __len__(self) -> int:
        return self.prompt_lengths.shape[0]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on ``device``."""
        return type(self)(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of the model's forward."""
        raise NotImplementedError


@dataclass(frozen=True)
class PaddedBatch(Batch):
    """Rows (B, T), padded on the right; made by :func:`pad_batch`."""

    attention_mask: Tensor
    """(B, T) int64, 1 on real tokens. It comes from the lengths: a real token may have the padding id."""

    def model_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}


@dataclass(frozen=True)
class PackedBatch(Batch):
    """Rows (R, T) of several sequences each, one row as a rule; made by :func:`pack_batch`."""

    position_ids: Tensor
    """(R, T) int64, from 0 in each sequence: where they restart, transformers lets attention begin anew.

    It does so without an attention mask and without a key-value cache only; with either, tokens would silently see
    the sequences before theirs.
    """

    def model_inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "position_ids": self.position_ids}


def pad_batch(prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], pad_id: int) -> PaddedBatch:
    """Right-pad ``prompt_ids[b] + completion_ids[b]`` for all b; ``T`` is the longest sum. A completion may be empty.

    ``pad_id`` fills the unused places and is masked: any valid token id will do. Raises ValueError where the two lists
    differ in length, are empty, or a prompt has no token (nothing would then predict the first completion token).
    """
    prompts, completions, tokens = _ragged("pad_batch", prompt_ids, completion_ids)
    mask = torch.arange(int((prompts + completions).max())) < (prompts + completions)[:, None]
    input_ids = torch.full(mask.shape, pad_id)
    input_ids[mask] = tokens  # row-major, as the mask selects
    starts = torch.arange(len(mask)) * mask.shape[1]
    return PaddedBatch(**_indices(input_ids, starts, prompts, completions), attention_mask=mask.long())


def pack_batch(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    break_even: float | None = None,
    max_tokens: int | None = None,
) -> PackedBatch:
    """``prompt_ids[b] + completion_ids[b]`` for all b end to end in one row. A completion may be empty.

    Attention that computes a row's whole square wants several shorter rows, which may leave gaps. For it,
    ``break_even`` is the row length at which attention costs as much as all else: of R balanced rows of T tokens,
    those of least cost R·T·(T + break_even) are taken, with R·T at most ``max_tokens`` unless R is 1.

    Raises ValueError as :func:`pad_batch` does.
    """
    prompts, completions, tokens = _ragged("pack_batch", prompt_ids, completion_ids)
    lengths = prompts + completions
    rows = [list(range(len(lengths)))]
    if break_even is not None:
        rows = _cheapest_rows(lengths.tolist(), break_even, max_tokens)
    width = max(int(lengths[row].sum()) for row in rows)
    starts = torch.empty_like(lengths)
    for number, row in enumerate(rows):
        starts[row] = number * width + lengths[row].cumsum(0) - lengths[row]
    # A gap is tokens 0 at position 0: each a sequence of its own, which nothing sees.
    input_ids, position_ids = torch.zeros(2, len(rows) * width, dtype=torch.int64)
    places = _places(starts, lengths)
    input_ids[places] = tokens
    position_ids[places] = places - starts.repeat_interleave(lengths)
    shape = (len(rows), width)
    indices = _indices(input_ids.view(shape), starts, prompts, completions)
    return PackedBatch(**indices, position_ids=position_ids.view(shape))


def _cheapest_rows(lengths: list[int], break_even: float, max_tokens: int | None) -> list[list[int]]:
    """Sequences of each row; see :func:`pack_batch`."""
    best, least = [], float("inf")
    for count in range(1, len(lengths) + 1):
        rows, sums = _balanced(lengths, count)
        width = max(sums)
        cost = count * width * (width + break_even)
        if cost < least and (count == 1 or max_tokens is None or count * width <= max_tokens):
            best, least = rows, cost
        if width == max(lengths):  # more rows would only be emptier
            break
    return best


def _balanced(lengths: Sequence[int], count: int) -> tuple[list[list[int]], list[int]]:
    """Indices of ``lengths`` in ``count`` parts of about equal sums, and the sums: the longest to the emptiest."""
    parts: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, number) for number in range(count)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        total, emptiest = heap[0]
        parts[emptiest].append(i)
        heapq.heapreplace(heap, (total + lengths[i], emptiest))
    return parts, [total for total, _ in sorted(heap, key=lambda entry: entry[1])]


def _ragged(
    name: str, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) lengths of the prompts and of the completions, and all tokens, sequence after sequence; or ValueError."""
    if len(prompt_ids) != len(completion_ids) or not prompt_ids:
        raise ValueError(
            f"{name}: prompt_ids and completion_ids must be equally long and not empty, "
            f"got {len(prompt_ids)} and {len(completion_ids)}"
        )
    prompts = torch.tensor([len(ids) for ids in prompt_ids])
    completions = torch.tensor([len(ids) for ids in completion_ids])
    if (empty := (prompts == 0).nonzero()).numel():
        raise ValueError(f"{name}: prompt_ids[{int(empty[0])}] is empty; a prompt needs at least one token")
    rows = chain.from_iterable(zip(prompt_ids, completion_ids, strict=True))
    return prompts, completions, torch.tensor(list(chain.from_iterable(rows)))


def _indices(input_ids: Tensor, starts: Tensor, prompts: Tensor, completions: Tensor) -> dict[str, Any]:
    """The fields of :class:`Batch`; sequence b begins at ``starts[b]`` of the flattened rows."""
    positions = _places(starts + prompts - 1, completions)
    return {
        "input_ids": input_ids,
        "prompt_lengths": prompts,
        "completion_lengths": completions,
        "prompt_positions": _places(starts, prompts),
        "positions": positions,
        "labels": input_ids.flatten()[positions + 1],
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), completions.cumsum(0)]).int(),
    }


def _places(first: Tensor, lengths: Tensor) -> Tensor:
    """(sum of lengths,) ``first[b], first[b] + 1, ...`` for each b."""
    offset = first - (lengths.cumsum(0) - lengths)
    return offset.repeat_interleave(lengths) + torch.arange(int(lengths.sum()))


def token_batches(
    lengths: Sequence[int], max_tokens: int, *, padded: bool = False, at_least: int = 1
) -> list[list[int]]:
    """Indices of ``lengths`` in batches of at most ``max_tokens`` each, a longer one alone; each index appears once.

    A batch counts the sum of its lengths; the sums are balanced, the longest going first to the emptiest batch. With
    ``padded`` it counts its longest times their number, and lengths that are alike go together. ``at_least`` asks for
    more batches than needed, up to one for each length. The same arguments give the same batches.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    if padded:
        batches: list[list[int]] = []
        for i in longest_first:
            if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        while len(batches) < at_least and (most := max(batches, key=len))[1:]:
            half = len(most) // 2
            batches.append(most[half:])
            del most[half:]
        return batches
    fewest = -(-sum(min(length, max_tokens) for length in lengths) // max_tokens)
    for count in range(max(at_least, fewest), len(lengths)):
        batches, sums = _balanced(lengths, count)
        if all(total <= max_tokens or len(batch) == 1 for total, batch in zip(sums, batches, strict=True)):
            return batches
    return [[i] for i in longest_first]


def runs(count: int, size: int) -> list[Sequence[int]]:
    """0, 1, ... count - 1 in runs of ``size``."""
    return [range(count)[start : start + size] for start in range(0, count, size)]
