"""Sums, maxima and prefix sums over packed sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .checks import require_tensor, values_are_readable


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of ``values`` (N,) over each packed sequence, (B,), accumulated in fp64, deterministic, differentiable."""
    if cu_seqlens.shape[0] == 1:
        return values[:0]
    # unsafe=True skips a check of the offsets that would make the host wait for a GPU.
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0.0)
    return sums.to(values.dtype)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, n: int) -> None:
    """Shape and dtype always, values on a CPU only."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must have shape (B+1,), got {tuple(cu_seqlens.shape)}")
    require_tensor(op, "cu_seqlens", cu_seqlens, shape=cu_seqlens.shape, symbols="(B+1,)", dtypes=(torch.int32,))
    if not values_are_readable(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to N={n} without decreasing, got {cu_seqlens[:8].tolist()}"
            f"{'...' if cu_seqlens.shape[0] > 8 else ''} ending in {int(cu_seqlens[-1])}"
        )


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Largest of ``values`` (N,) in each packed sequence, (B,); -inf for an empty one."""
    if cu_seqlens.shape[0] == 1:
        return values[:0]
    return torch.segment_reduce(values, "max", offsets=cu_seqlens.long(), unsafe=True, initial=-math.inf)


def prefix_sums(values: Tensor) -> Tensor:
    """(B, T) to (B, T): inclusive sums along each row. torch.cumsum may differ from run to run on CUDA."""
    step = 1
    while step < values.shape[1]:
        values = torch.cat([values[:, :step], values[:, step:] + values[:, :-step]], 1)
        step *= 2
    return values
