"""What the log-prob kernels share on the host: tile sizes, chunk plans, operands and products.

Every kernel works on one tile of logits, ``BLOCK_N`` rows (tokens) by ``BLOCK_V`` columns (vocabulary), that lives in
registers; what differs is what becomes of the tile. Tile sizes come from one small table and are never tuned at run
time, so that a result depends on the inputs and the device alone.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .interface import HeadCall, LogitTransform

SCRATCH_BYTES = 512 * 2**20  # bound on the one [rows, vocabulary] buffer that a gradient needs at a time
SCRATCH_ROWS = 8192  # rows per forward launch: bounds the gathered rows and the partial sums; 64 row tiles fill any GPU


def logit_factors(transform: LogitTransform) -> tuple[float, float, float]:
    """(factor before tanh, factor after it, dz/du where the softcap is not felt). Without a softcap there is no tanh,
    and the first is the whole factor."""
    temperature, scale, cap = transform
    slope = scale / temperature
    return (slope, 1.0, slope) if cap is None else (scale / cap, cap / temperature, slope)


class Tile(NamedTuple):
    """Shape of one logit tile and how a program runs it; ``tma``: operands come through Hopper's copy engine. With a
    ``block_h`` of 0 the program multiplies nothing: it reads products that `operands` made."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    tma: bool

    def meta(self) -> dict[str, int]:
        """The keyword arguments of a tile kernel's launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_V": self.block_v,
            "BLOCK_H": self.block_h,
            "GROUP": 16,
            "TMA": self.tma,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def tile_for(dtype: torch.dtype, capability: tuple[int, int] | None, *, heavy: bool) -> Tile:
    """The tile for a dtype on a compute capability; ``None`` is the CPU interpreter, which likes few, large blocks.

    ``heavy``: the arithmetic after the product keeps several values per logit, and a wide tile would spill registers.
    """
    if capability is None:
        return Tile(64, 256, 64, 4, 1, True)
    if dtype == torch.float32:  # IEEE products run outside the tensor cores: cuBLAS's, expected at twice a tile's rate
        return Tile(16, 512 if heavy else 1024, 0, 8, 1, False)
    if capability[0] in (9, 10):
        return Tile(128, 128 if heavy else 256, 64, 8, 4, True)
    return Tile(128, 128 if heavy else 256, 32, 8, 4, False)  # within the 99 KB of shared memory of sm_86, 89 and 120


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, ``None`` for the CPU interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def choose_tile(x: Tensor, *, heavy: bool) -> Tile:
    """`tile_for` the dtype and device of ``x``."""
    return tile_for(x.dtype, capability_of(x.device), heavy=heavy)


class Setup(NamedTuple):
    """A head as the kernels take it."""

    weight: Tensor
    """`readable`"""
    bias: Tensor | None
    """contiguous"""
    softcap: bool
    pre: float
    post: float
    slope: float
    """of `logit_factors`"""
    tile: Tile


def setup_of(call: HeadCall) -> Setup:
    softcap = call.transform.logit_softcap is not None
    bias = None if call.bias is None else call.bias.contiguous()
    tile = choose_tile(call.hidden, heavy=softcap)
    return Setup(readable(call.weight), bias, softcap, *logit_factors(call.transform), tile)


def num_sms(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for the CPU interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def plan_rows(num_rows: int, row_bytes: int, tile: Tile) -> int:
    """Rows per chunk, a multiple of the tile, so that a ``[rows, V]`` buffer keeps to SCRATCH_BYTES (one tile at the
    least) and the chunks come out of one size.

    Not waves of tiles over the device: where a ``[rows, V] @ [V, H]`` product has too few, cuBLAS splits the sum. On an
    H200 chunks of this size took 0.86 to 1.09 of the time of all rows at once (benchmarks/results/DEVICE.md).
    """
    most = max(1, SCRATCH_BYTES // (row_bytes * tile.block_n)) * tile.block_n
    chunks = max(1, triton.cdiv(num_rows, most))
    return min(num_rows, triton.cdiv(triton.cdiv(num_rows, chunks), tile.block_n) * tile.block_n)


def plan_columns(num_columns: int, column_bytes: int, tile: Tile) -> int:
    """Vocabulary entries per chunk, a multiple of the tile, so that a ``[N, columns]`` buffer keeps to SCRATCH_BYTES
    (one tile at the least) and the chunks come out of one size."""
    most = max(1, SCRATCH_BYTES // (column_bytes * tile.block_v)) * tile.block_v
    chunks = triton.cdiv(num_columns, most)
    return triton.cdiv(triton.cdiv(num_columns, chunks), tile.block_v) * tile.block_v


def launcher(function: Callable) -> Callable:
    """Run ``function(x, ...)``, x a tensor or a `HeadCall`, with its device current, which is where Triton launches,
    and without autocast, which would round the float32 products."""

    @functools.wraps(function)
    def launch(x: Tensor | HeadCall, *args, **kwargs):
        hidden = x.hidden if isinstance(x, HeadCall) else x
        with torch.cuda.device_of(hidden), torch.autocast("cuda" if hidden.is_cuda else "cpu", enabled=False):
            return function(x, *args, **kwargs)

    return launch


def readable(x: Tensor) -> Tensor:
    """``x`` (rows, H) itself where a kernel can read it: unit inner stride, separate rows that start at multiples of 16
    bytes. Otherwise a copy laid out so; a head whose H is a multiple of 8 needs none."""
    granule = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % granule == 0 and x.data_ptr() % 16 == 0:
        return x
    padded = x.new_empty(x.shape[0], triton.cdiv(x.shape[1], granule) * granule)
    return padded[:, : x.shape[1]].copy_(x)


def operands(
    hidden: Tensor, weight: Tensor, tile: Tile, *, out: Tensor | None = None
) -> tuple[Tensor | TensorDescriptor, Tensor | TensorDescriptor, int, int]:
    """What a tile kernel reads its products from, and the row strides: boxes of hidden and of weight, which are 0
    outside of the tensors, or the tensors themselves. For a tile that multiplies nothing, ``hidden @ weight.T``, in
    ``out`` where that is given, and the weight, which is not read."""
    if tile.block_h == 0:
        with ieee_products():
            hidden = torch.mm(hidden, weight.t(), out=out)
        return hidden, weight, hidden.stride(0), weight.stride(0)
    a, b = hidden, weight
    if tile.tma:
        a, b = (
            TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, tile.block_h])
            for x, rows in ((hidden, tile.block_n), (weight, tile.block_v))
        )
    return a, b, hidden.stride(0), weight.stride(0)


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """float32 products by cuBLAS without TF32, whatever is set: ten bits are too few for a logit."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        yield
    finally:
        settings.fp32_precision = before


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` accumulated and returned in float32."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.mm(a, b, out_dtype=torch.float32)


def add_matmul_fp32_(total: Tensor, a: Tensor, b: Tensor, *, fresh: bool = False) -> None:
    """``total += a @ b``, summed in float32 and without a float32 copy of the operands on a GPU; ``total = a @ b``,
    whatever it held, if fresh."""
    if fresh and total.dtype == a.dtype and a.is_cuda:  # cuBLAS sums in float32 and rounds once
        torch.mm(a, b, out=total)
        return
    if total.dtype != torch.float32:  # in pieces: a float32 product of a head's size would be the peak
        rows = max(1, SCRATCH_BYTES // (4 * total.shape[1]) // 128) * 128  # transposed operands stay aligned
        for part, its in zip(total.split(rows), a.split(rows), strict=True):
            product = matmul_fp32(its, b)
            part.copy_(product) if fresh else part.add_(product)
        return
    beta = 0 if fresh else 1
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float(), beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)
