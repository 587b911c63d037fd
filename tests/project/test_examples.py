"""Each example runs offline on a CPU, and the line that it prints shows that it learned."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LEARNED = {
    "tb_with_reward": lambda first, last: last > first + 0.3,
    "flowrl_maths": lambda first, last: last > first + 0.5,
    "dpo_with_our_kernel": lambda first, last: last < first / 3,
}


def test_every_example_is_tested_and_in_the_readme():
    # trl_powerflow needs a model with a name; what it calls is tested in test_integrations_trl.py
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"shared", "trl_powerflow"}
    assert names == set(LEARNED)
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert f"({name}.py)" in readme
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_example_learns(name, tmp_path):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], cwd=tmp_path, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = done.stdout.strip().splitlines()[-1]
    first, last = map(float, re.findall(r"-?\d+\.\d+", line))
    assert LEARNED[name](first, last), line
    assert not list(tmp_path.iterdir()), "an example leaves nothing behind"
