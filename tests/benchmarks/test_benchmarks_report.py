"""A run of the tests that is on file stands for running them again before a measurement."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if not (BENCHMARKS / "run.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

import run  # noqa: E402

CUDA = torch.device("cuda")
KERNELS, LOSS = "tests.gpu.test_triton_kernels_gpu", "tests.gpu.test_la_tb_cuda"


def report(path: Path, *cases: tuple[str, str]) -> Path:
    inner = "".join(
        f'<testcase classname="{module}" name="t{i}">{f"<{outcome}/>" if outcome else ""}</testcase>'
        for i, (module, outcome) in enumerate(cases)
    )
    path.write_text(f"<testsuites><testsuite>{inner}</testsuite></testsuites>")
    return path


@pytest.mark.parametrize(
    "cases, passed",
    [
        ([(KERNELS, ""), (KERNELS, "skipped"), (LOSS, "")], {"linear_logprobs", "linear_la_tb_loss", "la_tb_loss"}),
        ([(KERNELS, ""), (KERNELS, "failure"), (LOSS, "")], {"la_tb_loss"}),
        ([(KERNELS, "failure"), (KERNELS, ""), (LOSS, "error")], set()),
        ([(KERNELS, "skipped"), (LOSS, "")], {"la_tb_loss"}),  # nothing ran
        ([], set()),
    ],
)
def test_operations_that_a_report_has_passed(tmp_path, cases, passed):
    ops = {"linear_logprobs", "linear_la_tb_loss", "la_tb_loss"}
    assert run.reported_ops(ops, CUDA, report(tmp_path / "tests.xml", *cases)) == passed
