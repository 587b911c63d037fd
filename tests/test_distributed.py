"""Two gloo processes on a CPU train like one: same losses, same weights, on every rank and after a resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_SCRIPT = """
import random, sys
sys.path.insert(0, sys.argv[1])
import accelerate, torch
torch.set_num_threads(1)
import powerflow_fast
from powerflow_fast import rollout, rollout_choice
from tiny import tiny_model, tiny_tokenizer

# Ranks draw with seeds of their own, so a fair comparison needs completions that depend on nothing but the prompt.
class Fixed(rollout.HFGenerateEngine):
    def generate(self, prompts, *, seed, **_):
        completions, count = [], {}
        for prompt in map(tuple, prompts):
            count[prompt] = count.get(prompt, 0) + 1
            rng = random.Random(f"{prompt}/{count[prompt]}")
            completions.append([rng.randrange(4, 40) for _ in range(rng.randrange(1, 7))])
        ids = [list(p) for p in prompts]
        return rollout.Rollout(ids, completions, [False] * len(ids), None, self.weight_version)

rollout_choice.HFGenerateEngine = Fixed

def run(log_z, name, max_steps, resume=None):
    result = powerflow_fast.train(
        tiny_model(), ["one ", "two and ", "three ", "four "], alpha=2.0, tokenizer=tiny_tokenizer(),
        output_dir=f"{folder}/{log_z}-{name}", log_z=log_z, num_generations=4, gradient_accumulation_steps=2,
        per_device_train_batch_size=8 // processes, max_completion_length=6, max_prompt_length=16, learning_rate=1e-3,
        max_steps=max_steps, num_iterations=2, num_sample_prompts=0, self_check=False, resume_from_checkpoint=resume,
        rollout_engine="hf",
        lr_scheduler_type="constant", bf16=False,  # "auto" rounds gradients to bf16 on CPUs that multiply it fast
        adam_epsilon=1e-2,  # else Adam turns rounding of tiny gradients into whole steps
    )
    rank = accelerate.PartialState().process_index
    torch.save({n: p.detach() for n, p in result.model.named_parameters()}, f"{folder}/{log_z}-{name}-rank{rank}")

folder, processes = sys.argv[2], int(sys.argv[3])
for log_z in ("learned", "group"):
    run(log_z, "whole", 3)
    if processes > 1:
        run(log_z, "cut", 1)  # ends within a rollout
        run(log_z, "cut", 3, resume=True)
"""


def launch(folder, processes):
    folder.mkdir()
    (folder / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [folder / "script.py", Path(__file__).parent, folder, processes]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def weights(folder, name, rank=0):
    return torch.load(folder / f"{name}-rank{rank}", weights_only=True)


def test_two_processes_train_like_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    launch(one, 1)
    launch(two, 2)
    for log_z in ("learned", "group"):
        whole = f"{log_z}-whole"
        for a, b in zip(history(one / whole), history(two / whole), strict=True):
            for name in ("loss", "delta_abs", "log_z", "policy_logp", "base_logp", "length", "entropy", "grad_norm"):
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-5), (log_z, a["step"], name)
        expected = weights(two, whole)
        for name, weight in weights(one, whole).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
        for other in (weights(two, whole, rank=1), weights(two, f"{log_z}-cut"), weights(two, f"{log_z}-cut", rank=1)):
            assert all(torch.equal(other[name], expected[name]) for name in expected), "ranks and resumes agree"
        assert len(history(two / f"{log_z}-cut")) == 3
