"""Matrix products with fp32 results from operands of any floating dtype, and the exponentials between them: the
arithmetic under the torch backend.

Logits need fp32: a bf16 logit has 8 bits, which puts a summed log-prob off by tenths of a nat. Where the hardware
multiplies half precision several times faster than fp32, the operands stay as they are and only the result is fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .extension import extension_status

HALF = (torch.bfloat16, torch.float16)

# Finite, so that a logit of −inf (a bias that rules a token out) times its probability of 0 is 0.
_LOWEST = -1e30


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for bf16 products; else torch emulates them, slower than fp32."""
    # torch has no public test for these two instruction sets in every version we support.
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe, bool)() for probe in probes)


def bf16_is_fast(device_type: str) -> bool:
    """Whether ``device_type`` (``"cuda"``, ``"cpu"``, ...) multiplies bf16 in hardware: what autocast is chosen by."""
    if device_type == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return device_type == "cpu" and cpu_multiplies_bf16()


@functools.cache
def compiled_products_run() -> bool:
    """Whether the extension's products run here. They need AVX-512 and a libtorch that holds oneDNN's block product,
    which nothing but a call can tell."""
    if not extension_status().available or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    one = torch.eye(16)
    for dtype in (torch.float32, torch.bfloat16) if cpu_multiplies_bf16() else (torch.float32,):
        a = one.to(dtype)
        try:
            product = CompiledProducts(a).product(a, a, torch.empty(16, 16), add=False)
        except RuntimeError:
            return False
        if not torch.equal(product, one):
            return False
    return True


class Products:
    """fp32 (fp64) products of operands converted to it: exact, and the only way without hardware for less."""

    def __init__(self, hidden: Tensor):
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        self.operand_dtype = self.dtype
        self.is_cuda = hidden.is_cuda

    @property
    def rounds_whole(self) -> bool:
        """Whether a product that is complete, and is to be rounded to half precision anyway, is best left to torch.mm:
        it sums in fp32, and needs no second pass for the rounding."""
        return self.operand_dtype == torch.bfloat16

    def tile_shape(self, n: int, v: int) -> tuple[int, int]:
        """(rows, columns) of one tile of logits.

        CPU: 32 MiB of fp32 stays in a last-level cache through the passes over it, and is wide enough that the products
        run at the speed of large ones. GPU: tiles far larger than L2, because each row chunk streams the whole weight.
        """
        return _tile(n, v, 4096, 1 << 26) if self.is_cuda else _tile(n, v, 1024, 1 << 23)

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """``out = hidden @ weight.T`` for operands in ``operand_dtype``."""
        torch.mm(hidden, weight.t(), out=out)

    def add(self, a: Tensor, b: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        """``out += a @ b``, or ``out = a @ b`` if fresh, for operands in ``operand_dtype``."""
        if fresh:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)

    def exponentials(
        self,
        z: Tensor,
        anchor: Tensor,
        label: Tensor,
        at_label: Tensor | None = None,
        *,
        sums: Tensor | None = None,
        energy: Tensor | None = None,
        logits: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """``E = exp(z − anchor)`` of logits z (r, c) in ``out`` or else in z, which is overwritten in any case.

        A row whose ``label`` (r,) lies in [0, c) gets ``at_label`` (r,), by default 0, in that column. Over the other
        columns, ``sums`` (r,) takes the sum of E and ``energy`` (r,) that of E (z − anchor); over all, ``logits`` (r,)
        that of z. Of these two both are given, or none. Without a wait for a GPU.
        """
        if logits is not None:
            logits.add_(z.sum(1))
        x = z.sub_(anchor[:, None])
        e = x.exp_() if energy is None else x.exp()
        here = (label >= 0) & (label < e.shape[1])
        column = label.clamp(0, e.shape[1] - 1)[:, None]
        beside = e.gather(1, column)[:, 0]
        e.scatter_(1, column, beside.masked_fill(here, 0.0)[:, None])
        if sums is not None:
            sums.add_(e.sum(1))
        if energy is not None:
            energy.add_(x.clamp_min_(_LOWEST).mul_(e).sum(1))
            e = x.copy_(e)
        if at_label is not None:
            e.scatter_(1, column, torch.where(here, at_label, beside)[:, None])
        return e if out is None else out.copy_(e)


class CompiledProducts(Products):
    """A CPU with AVX-512: the extension's ops (csrc/head_cpu.cpp). Smaller tiles, which stay in the caches."""

    def __init__(self, hidden: Tensor):
        super().__init__(hidden)
        if hidden.dtype == torch.bfloat16 and cpu_multiplies_bf16():
            self.operand_dtype = torch.bfloat16
        self._memory = hidden.new_empty(0, dtype=self.operand_dtype)

    def tile_shape(self, n: int, v: int) -> tuple[int, int]:
        return _tile(n, v, 1024, 1 << 21)

    def product(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> Tensor:
        if 1 not in b.stride():
            b = b.contiguous()
        needed = -(-b.shape[0] // 32) * 32 * -(-b.shape[1] // 64) * 64  # b in whole blocks
        if self._memory.numel() < needed:
            self._memory = self._memory.new_empty(needed)
        torch.ops.powerflow_fast.head_product(a, b, out, add, self._memory)
        return out

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        self.product(hidden, weight.t(), out, add=False)

    def add(self, a: Tensor, b: Tensor, out: Tensor, *, fresh: bool = False) -> None:
        self.product(a, b, out, add=not fresh)

    def exponentials(
        self,
        z: Tensor,
        anchor: Tensor,
        label: Tensor,
        at_label: Tensor | None = None,
        *,
        sums: Tensor | None = None,
        energy: Tensor | None = None,
        logits: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = z if out is None else out
        torch.ops.powerflow_fast.head_exponentials(z, anchor, label, at_label, sums, energy, logits, out)
        return out


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


def _tile(n: int, v: int, rows: int, elements: int) -> tuple[int, int]:
    rows = max(1, min(n, rows))
    return rows, min(v, max(256, elements // rows))


def products_for(hidden: Tensor) -> Products:
    if hidden.is_cuda and hidden.dtype in HALF:
        return CudaHalfProducts(hidden)
    if hidden.device.type == "cpu" and hidden.dtype != torch.float64:
        if torch.backends.mkldnn.enabled and compiled_products_run():
            return CompiledProducts(hidden)
        if hidden.dtype == torch.bfloat16 and cpu_multiplies_bf16():
            return CpuBf16Products(hidden)
    return Products(hidden)
