"""Candidate tile kernels, as far as a machine without a GPU can tell: numbers in the interpreter, and compilation."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CANDIDATES = Path(__file__).resolve().parents[1] / "benchmarks" / "candidates"
sys.path.append(str(CANDIDATES))
MODULES = ("persistent", "gluon_sm90")
MARK = 7.0


def compile_all() -> list[dict]:
    """One record per kernel and variant for sm_90; runs in a process of its own, where Triton is not interpreting."""
    import test_compile_gate

    return test_compile_gate.compile_launches(
        90,
        {
            f"{kernel} {variant}": (launch_candidate, module, kernel, variant)
            for module in map(importlib.import_module, MODULES)
            for variant in module.PLANS
            for kernel in ("rest", "exp")
        },
    )


def launch_candidate(module, kernel: str, variant: str) -> None:
    n, v, h = 8192, 151936, 3584
    hidden, weight = (torch.empty(rows, h, dtype=torch.bfloat16, device="meta") for rows in (n, v))
    labels = torch.empty(n, dtype=torch.int64, device="meta")
    active, anchor = labels.int(), labels.float()
    partial = torch.empty(2, -(-v // module.PLANS[variant].block_v), n, device="meta")
    options = {"num_sms": 132, "group": 16, "variant": variant}
    if kernel == "rest":
        module.rest_tiles(hidden, weight, labels, active, partial, 1.0, **options)
    else:
        exps = torch.empty(n, v, dtype=torch.bfloat16, device="meta")
        module.exp_tiles(hidden, weight, labels, active, anchor, exps, partial, 1.0, **options)


def test_they_compile_for_hopper_without_a_spill(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    records = [r for r in json.loads(done.stdout.splitlines()[-1]) if r["kernel"] != "_active_tiles_kernel"]
    assert len(records) == 2 * sum(1 for module in MODULES for _ in importlib.import_module(module).PLANS)
    for record in records:
        print(record)
        assert record["stack"] + record["STL"] + record["LDL"] == 0, record
        assert record["HGMMA"] >= 4 and record["UTMALDG"] >= 2 and record["shared"] <= 227 * 1024, record


@pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/candidates/check.py compares them on a GPU")
@pytest.mark.parametrize("variant", ["flat 128x256", "loop 2 x 128x128"])
@pytest.mark.parametrize("inactive", [False, True])
def test_persistent_kernels_in_the_interpreter(variant, inactive):
    import persistent

    n, v, h = 300, 700, 72
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, h, generator=generator).bfloat16() for rows in (n, v))
    labels = torch.randint(v, (n,), generator=generator)
    active = torch.ones(n, dtype=torch.int32)
    if inactive:
        active[128:256] = 0  # one row tile is left out
        active[5] = 0
    z = 0.9 * (hidden.double() @ weight.double().t())
    anchor = z.gather(1, labels[:, None])[:, 0].float()
    rest = z.scatter(1, labels[:, None], float("-inf"))
    width = persistent.PLANS[variant].block_v
    options = {"num_sms": 3, "group": 2, "variant": variant}
    on = active.bool()

    def outputs():
        return torch.full((2, -(-v // width), n), MARK), torch.full((n, 704), MARK, dtype=torch.bfloat16)

    partial, _ = outputs()
    persistent.rest_tiles(hidden, weight, labels, active, partial, 0.9, **options)
    m, s = partial[:, :, on].double()
    lse = m.amax(0) + (s * (m - m.amax(0)).exp()).sum(0).log()
    torch.testing.assert_close(lse, rest.logsumexp(1)[on], rtol=1e-5, atol=1e-5)

    partial, exps = outputs()
    persistent.exp_tiles(hidden, weight, labels, active, anchor, exps, partial, 0.9, **options)
    exact = (rest - anchor[:, None].double()).exp()
    torch.testing.assert_close(exps[on, :v].double(), exact[on], rtol=1e-2, atol=1e-30)
    torch.testing.assert_close(partial[1].double().sum(0)[on], exact.sum(1)[on], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(partial[0].amax(0).double()[on], rest.amax(1)[on], rtol=1e-5, atol=1e-5)
    assert bool((exps[~on] == MARK).all()) and bool((exps[:, v:] == MARK).all())


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).resolve().parent))
    print(json.dumps(compile_all()))
