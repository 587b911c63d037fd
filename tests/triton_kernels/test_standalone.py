"""kernels/ stands alone: it runs under another name where powerflow_fast cannot be imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
sys.modules["powerflow_fast"] = None  # importing it raises ImportError
import torch
from borrowed import backend
from borrowed.interface import HeadCall
hidden, weight, labels = torch.randn(5, 32), torch.randn(40, 32), torch.tensor([3, 0, 39, -100, 7])
logp = backend.linear_logprob_fwd(HeadCall(hidden, weight, labels)).logp
expected = torch.log_softmax(hidden @ weight.T, -1)
for row, label in enumerate(labels.tolist()):
    torch.testing.assert_close(logp[row], expected[row, label] if label >= 0 else torch.tensor(0.0))
assert backend.linear_logprob_fwd_d_hidden(HeadCall(hidden, weight, labels)).unit.shape == (5, 32)
print(sorted({name.split(".")[0] for name in sys.modules} & {"transformers", "accelerate", "datasets", "safetensors"}))
"""


def test_torch_and_triton_are_all_that_it_needs(tmp_path):
    shutil.copytree(KERNELS, tmp_path / "borrowed", ignore=shutil.ignore_patterns("__pycache__"))
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
