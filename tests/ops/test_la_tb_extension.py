"""The compiled op behind la_tb_loss: registration, tracing, determinism, its library, and life without it."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from powerflow_fast.ops import extension, la_tb, la_tb_loss

STATUS = extension.extension_status()
compiled = pytest.mark.skipif(not STATUS.available, reason=STATUS.reason)


def op_arguments(dtype=torch.float32, *, optional=True, requires_grad=False, lengths=(3, 0, 5)):
    g = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    batch = len(lengths)
    logps = (-torch.rand(int(cu[-1]), generator=g)).to(dtype).requires_grad_(requires_grad)
    base, log_z, psi, old = ((-torch.rand(batch, generator=g)).to(dtype) for _ in range(4))
    log_z.requires_grad_(requires_grad)
    extra = (psi, old) if optional else (None, None)
    return (logps, base, log_z, cu, *extra, 4.0, 0.8, 1.2, False, 0)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(dtype, optional, requires_grad):
    torch.library.opcheck(
        torch.ops.powerflow_fast.la_tb.default,
        op_arguments(dtype, optional=optional, requires_grad=requires_grad),
    )


@compiled
def test_meta_gives_the_shapes_and_dtypes():
    args = op_arguments(torch.float64)
    op = torch.ops.powerflow_fast.la_tb
    on_meta = op(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for meta, real in zip(on_meta, op(*args), strict=True):
        assert meta.device.type == "meta"
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


@compiled
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic):
    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def step(logps, base, log_z, cu, psi, old):
        out = la_tb_loss(logps * 2, base, log_z, cu, alpha=4.0, psi=psi, old_logps=old)
        return 3 * out.loss, out.delta

    for lengths in ((3, 0, 5), (4, 4), (1, 2, 3, 9)):
        logps, base, log_z, cu, psi, old, *_ = op_arguments(requires_grad=True, lengths=lengths)
        loss, delta = step(logps, base, log_z, cu, psi, old)
        eager = la_tb_loss(logps * 2, base, log_z, cu, alpha=4.0, psi=psi, old_logps=old)
        assert torch.equal(loss, 3 * eager.loss) and torch.equal(delta, eager.delta) and not delta.requires_grad
        ours, theirs = (torch.autograd.grad(value, [logps, log_z]) for value in (loss, 3 * eager.loss))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@compiled
@pytest.mark.slow
def test_compiles_with_inductor():
    step = torch.compile(lambda *t: la_tb_loss(*t, alpha=4.0).loss * 2, fullgraph=True)
    tensors = op_arguments(requires_grad=True)[:4]
    ours, theirs = (
        torch.autograd.grad(f, tensors[0])[0] for f in (step(*tensors), la_tb_loss(*tensors, alpha=4.0).loss * 2)
    )
    torch.testing.assert_close(ours, theirs)


@compiled
def test_second_derivatives_are_refused():
    logps, base, log_z, cu, *_ = op_arguments(requires_grad=True)
    loss = la_tb_loss(logps, base, log_z, cu, alpha=4.0).loss
    for leaf in (logps, log_z):
        (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="la_tb_loss: second derivatives are not available"):
            # the first term alone would differentiate without complaint, and miss the op's part
            (leaf.square().sum() + grad.square().sum()).backward()


@compiled
def test_backward_does_not_need_every_input():
    for grad_of in ("logps", "log_z"):
        logps, base, log_z, cu, *_ = op_arguments()
        leaf = {"logps": logps, "log_z": log_z}[grad_of].requires_grad_()
        la_tb_loss(logps, base, log_z, cu, alpha=4.0).loss.backward()
        assert leaf.grad.abs().sum() > 0


@compiled
def test_same_bits_whatever_the_thread_count(poisoned_memory):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 2000, (200,), generator=g)
    args = op_arguments(lengths=lengths.tolist())
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(torch.ops.powerflow_fast.la_tb(*args))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
@pytest.mark.parametrize(
    ("position", "value", "match"),
    [
        (3, torch.tensor([0, 3, 3, 9], dtype=torch.int32), "cu_seqlens must rise"),
        (3, torch.tensor([0, 9, 3, 8], dtype=torch.int32), "cu_seqlens must rise"),
        (3, torch.tensor([-1, 3, 3, 8], dtype=torch.int32), "cu_seqlens must rise"),
        (3, torch.tensor([0, 3, 8], dtype=torch.int32), "shape"),
        (3, torch.tensor([0, 3, 3, 8]), "int32"),
        (1, torch.zeros(2), "shape"),
        (2, torch.zeros(3, dtype=torch.float64), "dtype"),
        (4, torch.zeros(4), "shape"),
        (5, torch.zeros(1), "shape"),
        (0, torch.zeros(8, dtype=torch.bfloat16), "float32 or float64"),
        (0, torch.zeros(4, 2), "one dimension"),
    ],
)
def test_a_direct_call_cannot_read_outside_its_tensors(position, value, match):
    args = list(op_arguments())
    args[position] = value
    with pytest.raises(RuntimeError, match=match):
        torch.ops.powerflow_fast.la_tb(*args)


@compiled
@pytest.mark.skipif(not STATUS.cuda, reason="built without nvcc")
def test_the_library_holds_code_for_every_architecture():
    """Machine code for sm_80, 90 and 100, PTX for later GPUs, few registers and nothing spilled to memory."""
    triton = pytest.importorskip("triton")
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    library = importlib.util.find_spec("powerflow_fast._C").origin

    def dump(option):
        return subprocess.run([cuobjdump, option, library], check=True, capture_output=True, text=True).stdout

    elf, ptx, usage = dump("-lelf"), dump("-lptx"), dump("-res-usage")
    assert all(f"sm_{arch}." in elf for arch in (80, 90, 100)), elf
    assert "sm_100.ptx" in ptx, ptx
    kernels = [line for line in usage.splitlines() if "REG:" in line]
    assert len(kernels) == 3 * 2, usage  # three architectures, two scalar types
    for line in kernels:
        numbers = dict(word.split(":")[:2] for word in line.split() if word.count(":") == 1)
        assert int(numbers["REG"]) <= 64 and numbers["STACK"] == "0" and numbers["LOCAL"] == "0", line


def test_without_the_extension_plain_torch_runs_and_says_why_once(monkeypatch):
    reason = "powerflow_fast._C wasn't built; pip install ..."
    monkeypatch.setattr(extension, "_STATUS", extension.ExtensionStatus(False, False, reason))
    monkeypatch.setattr(la_tb, "_warned", set())
    logps, base, log_z, cu, *_ = op_arguments(requires_grad=True)
    with pytest.warns(RuntimeWarning, match="la_tb_loss runs in plain torch: powerflow_fast._C wasn't built") as caught:
        la_tb_loss(logps, base, log_z, cu, alpha=4.0)
    assert caught[0].filename == __file__, "the warning must point at the caller"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la_tb_loss(logps, base, log_z, cu, alpha=4.0)


def test_a_device_without_a_kernel_takes_plain_torch(monkeypatch):
    monkeypatch.setattr(extension, "_STATUS", extension.ExtensionStatus(True, False, "built for CPU only"))
    monkeypatch.setattr(la_tb, "_warned", set())
    with pytest.warns(RuntimeWarning, match="plain torch on cuda: the compiled op is built for CPU only"):
        assert not la_tb._has_kernel("la_tb_loss", "cuda")
    assert la_tb._has_kernel("la_tb_loss", "cpu")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


HIDE = """
import importlib.machinery, importlib.util, sys
find_spec = importlib.util.find_spec
def patched(name, *rest):
    return {spec} if name == "powerflow_fast._C" else find_spec(name, *rest)
importlib.util.find_spec = patched
"""


def test_status_of_an_extension_that_was_not_built():
    out = run_python(HIDE.format(spec="None") + "import powerflow_fast.ops.extension as e; print(e.extension_status())")
    assert "available=False" in out and "wasn't built" in out and "pip install" in out


def test_a_library_that_cannot_be_loaded_is_not_silent(tmp_path):
    """The loader's own message reaches the user."""
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    code = f"""
import importlib.machinery, importlib.util, sys
class Finder:
    def find_spec(name, path=None, target=None):
        if name == "powerflow_fast._C":
            loader = importlib.machinery.ExtensionFileLoader(name, {str(broken)!r})
            return importlib.util.spec_from_file_location(name, {str(broken)!r}, loader=loader)
sys.meta_path.insert(0, Finder)
import torch, warnings
from powerflow_fast.ops import extension, la_tb
print(extension.extension_status())
z = torch.zeros(1)
with warnings.catch_warnings(record=True) as caught:
    la_tb.la_tb_loss(torch.zeros(2), z, z, torch.tensor([0, 2], dtype=torch.int32), alpha=4.0)
print([str(w.message) for w in caught])
"""
    status, warned = run_python(code).splitlines()
    assert "available=False" in status and "can't be loaded" in status
    assert "file too short" in status or "invalid ELF header" in status, status
    assert "la_tb_loss runs in plain torch" in warned and "can't be loaded" in warned
