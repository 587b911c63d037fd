"""A long run over many uneven prompts does not grow."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import run
from scripts import environment

STEPS = 100


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sizes_of_a_run(folder: Path) -> list[int]:
    """Resident bytes after each step."""
    rng = random.Random(0)
    path = folder / "prompts.jsonl"
    with open(path, "w") as file:
        for number in range(20_000):
            file.write(json.dumps({"prompt": f"{number} " + "ab " * rng.randrange(1, 16), "number": number}) + "\n")
    sizes = []
    run(
        folder,
        prompts=str(path),
        callbacks=[lambda report: sizes.append(resident()) and None],
        max_steps=-1,
        bf16=False,  # oneDNN keeps the code of a bf16 product for each of its last 1024 shapes, which takes 100s of MB
        num_generations=1,
        per_device_train_batch_size=20_000 // STEPS,
        rollout_batch_size=20_000 // STEPS,
        max_prompt_length=56,
        max_completion_length=2,
        num_sample_prompts=0,
        self_check=False,
    )
    return sizes


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_twenty_thousand_uneven_prompts(tmp_path):
    """In a process of its own: what other tests leave in the heap moves by more than a step's memory."""
    subprocess.run([sys.executable, __file__, tmp_path], env=environment(), check=True, capture_output=True, text=True)
    sizes = json.loads((tmp_path / "sizes.json").read_text())
    assert len(sizes) == STEPS, "each prompt once"
    first, last = (sum(part) / len(part) for part in (sizes[20:40], sizes[-20:]))
    assert last - first < 16 * 2**20, f"{first / 2**20:.0f} MiB, then {last / 2**20:.0f} MiB"


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    (target / "sizes.json").write_text(json.dumps(sizes_of_a_run(target)))
