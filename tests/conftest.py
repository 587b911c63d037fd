"""Shared rules of the test suite: the Triton interpreter, tolerances, poisoned memory."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

# These run in verl's environment, by `make test-verl`, and bring a conftest of their own.
collect_ignore = ["integrations_verl"]

# What tests share: helpers of their own, and the studies' models that can be enumerated.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "helpers"), str(ROOT / "benchmarks" / "studies")]

# Without a GPU the Triton kernels run in Triton's interpreter, which is chosen when triton is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import triton_interpreter

    triton_interpreter.install()

# Tiny tensors gain nothing from a second thread, and results do not depend on the machine's cores.
torch.set_num_threads(1)

# Smallest error that a result may have per dtype, relative to the largest reference value (at least one nat or unit).
# A result passes when its error against fp64 on the same rounded inputs is at most twice torch's own error at that
# dtype, plus this floor. The table is never loosened for CI.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def own_accelerator_state():
    """accelerate keeps the precision of the last run for the whole process, and "auto" is bf16 on some CPUs."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state()


@pytest.fixture
def poisoned_memory():
    """Fill what ``torch.empty`` returns with NaN, so that a kernel which forgets an element shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def assert_as_accurate_as_torch(ours, torchs, exact, dtype, what=""):
    """Against ``exact``, ``ours`` errs at most twice as much as ``torchs`` (same dtype) plus the dtype's floor."""
    assert ours.shape == exact.shape, (what, ours.shape, exact.shape)
    assert torch.isfinite(ours).all(), f"{what}: {int((~torch.isfinite(ours)).sum())} values are not finite"
    if exact.numel() == 0:
        return
    scale = max(1.0, float(exact.abs().max()))
    error = float((ours.double() - exact).abs().max())
    allowed = 2 * float((torchs.double() - exact).abs().max()) + FLOOR[dtype] * scale
    assert error <= allowed, f"{what}: error {error:.3e} exceeds {allowed:.3e}"


@pytest.fixture
def check_accuracy():
    return assert_as_accurate_as_torch
