"""Runs the Gluon kernels of kernels/hopper_tiles.py on a CPU, with those of hopper_pipeline.py that they are made of:
their own Python source over stand-ins for Gluon.

`Emulated` takes a kernel's place. It runs the partitions of each program one after the other, the producer first, on
torch tensors: a box of shared memory keeps everything that was copied into it, in order, and its n-th reader gets the
n-th filling. That this is what the hardware does is for the barriers to see to; so each partition's events on barriers,
copies and products are recorded as well, for `tests/test_hopper_tiles.py` to explore every order of them.
"""

from __future__ import annotations

import builtins
import types
from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as real
from triton.experimental.gluon._runtime import GluonJITFunction

from powerflow_fast.kernels import hopper_pipeline, hopper_tiles


class Block(torch.Tensor):
    """A tensor with Gluon's idea of ``split``; a scalar counts as one with no dimension."""

    def split(self):
        return self.unbind(-1)


def block(x, dtype: torch.dtype | None = None) -> Block:
    return torch.as_tensor(x, dtype=dtype).as_subclass(Block)


class Pointer(NamedTuple):
    """Elements of a tensor's memory, counted from its first one."""

    memory: Tensor
    offsets: Tensor | int = 0

    def __add__(self, offsets):
        return Pointer(self.memory, self.offsets + offsets)


class InFlight(NamedTuple):
    """An accumulator that nothing but a product or a wait may touch."""

    value: Tensor


class Box:
    """Boxes of shared memory, or of barriers. ``index`` gives one; a matrix's transpose is taken at its reader."""

    def __init__(self, name: str, dtype, shape: list[int], note):
        self.shape = shape
        self.parts = [Part(name, i, dtype, note) for i in range(shape[0])]

    def index(self, i) -> Part:
        return self.parts[int(i)]


class Part:
    def __init__(self, name: str, i: int, dtype, note):
        self.name, self.i, self.dtype, self.note = name, i, dtype, note
        self.fillings: list[Tensor] = []
        self.reads: dict[str, int] = {}
        self.stored = None

    def permute(self, order):
        assert order == (1, 0)
        return self

    def store(self, x):
        self.stored = x
        self.note("box", self.key)

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.i


class Descriptor(NamedTuple):
    """What a kernel sees of a host's TensorDescriptor."""

    base: Tensor
    block_shape: list[int]
    layout: object
    dtype: torch.dtype

    @property
    def block_type(self):
        return types.SimpleNamespace(shape=self.block_shape)


class Machine:
    """One program's run: the stand-ins that a kernel calls, and the events of each partition."""

    def __init__(self, program: int, programs: int):
        self.program, self.programs = program, programs
        self.partition = "start"
        self.events: dict[str, list[tuple]] = {"start": []}
        self.names = iter(("rows", "columns", "full", "empty", "turn", "out"))

    def note(self, *event) -> None:
        self.events.setdefault(self.partition, []).append(event)

    # --- language ---
    def load(self, pointer, mask=None, other=0):
        at = torch.as_tensor(pointer.offsets)
        if mask is None:
            return block(pointer.memory.view(-1)[at])
        value = pointer.memory.view(-1)[torch.where(mask, at, 0)]
        return block(torch.where(mask, value, torch.as_tensor(other, dtype=value.dtype)))

    def store(self, pointer, value, mask):
        offsets, value, mask = torch.broadcast_tensors(pointer.offsets, value, mask)
        pointer.memory.view(-1)[offsets[mask]] = value[mask].to(pointer.memory.dtype)

    def allocate_shared_memory(self, dtype, shape, layout):
        shape = [int(x) for x in shape]
        name = next(self.names)
        return Part(name, 0, dtype, self.note) if name == "turn" else Box(name, dtype, shape, self.note)

    def warp_specialize(self, partitions, warps, registers):
        assert warps == [4, 1] and 240 + sum(registers) <= 504  # 64K registers, 128 threads to a number
        names = ("first", "second", "producer")
        for i in (2, 0, 1):
            self.partition = names[i]
            function, arguments = partitions[i]
            function(*arguments)

    # --- barriers, copies and products ---
    def expect(self, bar, count):
        self.note("expect", bar.key, int(count))

    def copy_in(self, source, at, bar, box):
        (row, col), (height, width) = (int(x) for x in at), source.block_shape
        filling = torch.zeros(height, width)
        part = source.base[row : row + height, col : col + width].float()
        filling[: part.shape[0], : part.shape[1]] = part
        box.fillings.append(filling)
        self.note("copy", bar.key, box.key, height * width * source.base.element_size())

    def copy_out(self, target, at, box):
        (row, col), (height, width) = (int(x) for x in at), target.block_shape
        part = target.base[row : row + height, col : col + width]
        assert list(box.stored.shape) == [height, width]
        part.copy_(box.stored[: part.shape[0], : part.shape[1]])
        self.note("send", box.key)

    def read(self, box) -> Tensor:
        turn = box.reads.get(self.partition, 0)
        box.reads[self.partition] = turn + 1
        return box.fillings[turn]

    def product(self, a, b, acc, is_async):
        assert is_async
        self.note("product", a.key, b.key)
        acc = acc.value if isinstance(acc, InFlight) else acc
        return InFlight(block(acc + self.read(a) @ self.read(b).t()))

    def product_wait(self, outstanding, deps):
        self.note("finish", int(outstanding))
        (acc,) = deps
        return acc if outstanding else acc.value

    def globals(self) -> dict:
        """The modules' names as a kernel of this program finds them."""

        gl = types.SimpleNamespace(
            constexpr=real.constexpr,
            int32=torch.int32,
            int64=torch.int64,
            float32=torch.float32,
            program_id=lambda axis: block(self.program),
            num_programs=lambda axis: block(self.programs),
            cdiv=lambda a, b: -(-a // b),
            minimum=lambda a, b: torch.minimum(block(a), block(b)),
            maximum=lambda a, b: torch.maximum(block(a), block(b)),
            load=self.load,
            store=self.store,
            arange=lambda begin, end, layout: block(torch.arange(begin, end)),
            zeros=lambda shape, dtype, layout: block(torch.zeros(shape, dtype=dtype)),
            full=lambda shape, value, dtype, layout: block(torch.full(shape, value, dtype=dtype)),
            where=lambda mask, a, b: block(torch.where(mask, a, b)),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis, dtype=x.dtype),
            reduce_or=lambda x, axis: block(torch.stack([(x >> i & 1).amax(axis) << i for i in range(2)]).sum(0)),
            static_range=builtins.range,
            convert_layout=lambda x, layout, assert_trivial: x,
            allocate_shared_memory=self.allocate_shared_memory,
            warp_specialize=self.warp_specialize,
        )
        barrier = types.SimpleNamespace(
            MBarrierLayout=lambda: None,
            init=lambda bar, count: self.note("init", bar.key, count),
            wait=lambda bar, parity: self.note("wait", bar.key, int(parity)),
            expect=self.expect,
            arrive=lambda bar: self.note("arrive", bar.key),
        )
        tma = types.SimpleNamespace(
            async_copy_global_to_shared=self.copy_in,
            async_copy_shared_to_global=self.copy_out,
            store_wait=lambda pending: self.note("sent", pending),
        )
        modules = vars(hopper_pipeline) | vars(hopper_tiles)
        names = {name: plain(value) for name, value in modules.items()}
        names |= {
            "gl": gl,
            "mbarrier": barrier,
            "tma": tma,
            "warpgroup_mma": self.product,
            "warpgroup_mma_wait": self.product_wait,
            "fence_async_shared": lambda: self.note("fence"),
            "_barrier": lambda: self.note("barrier"),
            "_exp2": lambda x: flushed(torch.exp2(x)),
        }
        for name, value in names.items():
            value = value.kernel if isinstance(value, Emulated) else value
            if isinstance(value, GluonJITFunction):
                names[name] = types.FunctionType(value.fn.__code__, names, name)
        return names


def flushed(x: Tensor) -> Tensor:
    """Without the numbers below float32's normal range, as ``ex2.approx.ftz`` gives them."""
    return torch.where(x < 2.0**-126, 0.0, x)


def plain(value):
    return value.value if isinstance(value, real.constexpr) else value


class Emulated:
    """In place of a Gluon kernel of the module: ``kernel[grid](*arguments, **options)`` runs on the CPU. ``machines``
    are those of the last launch."""

    def __init__(self, kernel: GluonJITFunction):
        self.kernel = kernel.kernel if isinstance(kernel, Emulated) else kernel
        self.machines: list[Machine] = []

    def __getitem__(self, grid):
        def launch(*arguments, num_warps: int, **constants):
            assert num_warps == 4
            seen = [
                Descriptor(x.base, x.block_shape, x.layout, x.base.dtype)
                if hasattr(x, "block_shape")
                else Pointer(as_memory(x))
                if isinstance(x, Tensor)
                else x
                for x in arguments
            ]
            self.machines = [Machine(i, grid[0]) for i in range(grid[0])]
            for machine in self.machines:
                machine.globals()[self.kernel.fn.__name__](*seen, **constants)

        return launch


def as_memory(x: Tensor) -> Tensor:
    """All of x's memory from its first element on."""
    size = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
    return x.as_strided((size,), (1,))


def install(monkeypatch) -> dict[str, Emulated]:
    """Lets the module's launch functions run the emulation."""
    names = ("_rest_tile_sm90_kernel", "_exp_tile_sm90_kernel", "_gradient_tile_sm90_kernel")
    kernels = {name: Emulated(getattr(hopper_tiles, name)) for name in names}
    for name, kernel in kernels.items():
        monkeypatch.setattr(hopper_tiles, name, kernel)
    return kernels
