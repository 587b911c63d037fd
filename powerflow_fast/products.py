"""Matrix products with fp32 results from operands of any floating dtype: the arithmetic under the torch backend.

Logits need fp32: a bf16 logit has 8 bits, which puts a summed log-prob off by tenths of a nat. Where the hardware
multiplies half precision several times faster than fp32, the operands stay as they are and only the result is fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; else torch emulates them, slower than fp32."""
    # torch has no public test for these two instruction sets in every version we support.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


class Products:
    """fp32 (fp64) products of operands converted to it: exact, and the only way without hardware for less."""

    def __init__(self, hidden: Tensor):
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.operand_dtype = self.dtype

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """``out = hidden @ weight.T`` for operands in ``operand_dtype``."""
        torch.mm(hidden, weight.t(), out=out)

    def add(self, a: Tensor, b: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        """``out += a @ b``, or ``out = a @ b`` if fresh, for operands in ``operand_dtype``."""
        if fresh:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)


class CudaHalfProducts(Products):
    """Tensor cores: half-precision operands, fp32 sums and results."""

    def __init__(self, hidden: Tensor):
        super().__init__(hidden)
        self.operand_dtype = hidden.dtype

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        out.copy_(torch.mm(hidden, weight.t(), out_dtype=torch.float32))

    def add(self, a: Tensor, b: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        product = torch.mm(a, b, out_dtype=torch.float32)
        if fresh:
            out.copy_(product)
        else:
            out.add_(product)


class CpuBf16Products(Products):
    """A CPU that multiplies bf16 natively, through torch products that sum in fp32 and round the result to bf16.

    The logits are formed twice: the second product subtracts the rounded first one before it is rounded itself, which
    leaves the 8 bits that the first lost. On such a CPU that takes half of the time of one fp32 product, or less.
    """

    def __init__(self, hidden: Tensor):
        super().__init__(hidden)
        self.operand_dtype = torch.bfloat16
        self._rounded = hidden.new_empty(0)
        self._rest = hidden.new_empty(0, dtype=torch.float32)

    def _buffers(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Two of ``out``'s shape, bf16 and fp32, reused: to touch new pages costs as much as a product."""
        shape, count = out.shape, out.numel()
        if self._rounded.numel() < count:
            self._rounded, self._rest = self._rounded.new_empty(count), self._rest.new_empty(count)
        return self._rounded[:count].view(shape), self._rest[:count].view(shape)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        rounded, rest = self._buffers(out)
        torch.mm(hidden, weight.t(), out=rounded)
        out.copy_(rounded)
        rounded.addmm_(hidden, weight.t(), beta=-1)
        # a sum of two dtypes would leave torch's vectorised path, at thirty times the cost of the conversion
        rest.copy_(rounded)
        out.add_(rest)

    def add(self, a: Tensor, b: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        rounded, rest = self._buffers(out)
        torch.mm(a, b, out=rounded)
        if fresh:
            out.copy_(rounded)
        else:
            rest.copy_(rounded)
            out.add_(rest)


def products_for(hidden: Tensor) -> Products:
    if hidden.is_cuda and hidden.dtype in HALF:
        return CudaHalfProducts(hidden)
    if hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 and cpu_multiplies_bf16():
        return CpuBf16Products(hidden)
    return Products(hidden)
