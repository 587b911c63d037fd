"""Two processes as users start them: torchrun, accelerate launch; a rank that fails, and a signal, end all of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import tiny_model, tiny_tokenizer

from powerflow_fast.checkpoints.folder import checkpoint_step, latest_checkpoint

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
SCRIPT = """
import os, sys
sys.path.insert(0, sys.argv[1])
import accelerate, torch
torch.set_num_threads(1)
import powerflow_fast
from powerflow_fast import models
from tiny import tiny_model, tiny_tokenizer

def callback(report):
    rank = accelerate.PartialState().process_index
    if sys.argv[3] == "fail" and rank == 1:
        raise RuntimeError("the disk of this rank caught fire")
    if sys.argv[3] == "memory" and rank == 1 and report.step == 3:
        models.CausalLMScorer.forward = out_of_memory
    with open(f"{sys.argv[2]}/pid-{rank}", "w") as file:
        file.write(str(os.getpid()))

score = models.CausalLMScorer.forward

def out_of_memory(self, *arguments, **options):
    if not torch.is_grad_enabled():
        return score(self, *arguments, **options)
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

powerflow_fast.train(
    tiny_model(), ["one ", "two and "], alpha=2.0, tokenizer=tiny_tokenizer(), output_dir=sys.argv[2], log_z="group",
    num_generations=2, per_device_train_batch_size=2, max_completion_length=6, max_prompt_length=16, max_steps=100000,
    num_sample_prompts=0, rollout_engine="hf", callbacks=[callback], save_steps=2, fsdp=sys.argv[4] == "sharded",
)
"""


def environment():
    """Of a machine where nobody set anything; one thread per process, as torchrun has it."""
    return {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")} | {"OMP_NUM_THREADS": "1"}


def start(folder, what, kind="replicated"):
    (folder / "script.py").write_text(SCRIPT)
    command = [*TORCHRUN, folder / "script.py", Path(__file__).parents[1] / "helpers", folder / "run", what, kind]
    return subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment())


def stderr(process):
    try:
        return process.communicate(timeout=200)[1]
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher ends its processes
        raise


@pytest.mark.parametrize(
    ("launcher", "flags"),
    [
        (TORCHRUN, []),
        (ACCELERATE, []),
        (TORCHRUN, ["--fsdp", "--dtype=bfloat16"]),
        (TORCHRUN, ["--fsdp", "--use_peft", "--activation_checkpointing"]),
        (TORCHRUN, ["--fsdp", "--use_peft", "--dtype=float32", "--bf16=true"]),  # rollouts cast frozen weights once
    ],
    ids=["torchrun", "accelerate", "sharded-bfloat16", "sharded-lora", "sharded-lora-autocast"],
)
def test_the_command_line_runs_under_a_launcher(tmp_path, launcher, flags):
    # An adapter is fp32 beside weights as they are stored.
    model = tiny_model("llama_tied").bfloat16() if "--use_peft" in flags else tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("one\ntwo and\nthree\nfour\n")
    options = {
        "model": tmp_path / "model",
        "prompts": tmp_path / "prompts.txt",
        "alpha": 2,
        "output_dir": tmp_path / "run",
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 2,
        "rollout_engine": "hf",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [*launcher, "-m", "powerflow_fast.cli", "train", *words, *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("done: ") == 1, "one process speaks"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["num_processes"] == 2
    rows = [json.loads(line)["step"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    texts = (tmp_path / "run" / "samples.md").read_text()
    assert texts.count("**Prompt:**") == 4, "drawn by one process, while the others wait"
    assert rows == [1, 2] and (tmp_path / "run" / "model" / "model.safetensors").is_file()


def test_a_rank_that_fails_ends_all_with_its_cause(tmp_path):
    process = start(tmp_path, "fail")
    errors = stderr(process)
    assert process.returncode != 0
    assert "the disk of this rank caught fire" in errors


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_rank_out_of_memory_ends_all_with_the_sizes_to_set(tmp_path, kind):
    process = start(tmp_path, "memory", kind)
    errors = stderr(process)
    assert process.returncode != 0
    assert "a micro-batch of 2 sequences" in errors and "CUDA out of memory. Tried to allocate 2 GiB" in errors
    assert "Set per_device_train_batch_size=1, gradient_accumulation_steps=2" in errors
    assert checkpoint_step(latest_checkpoint(tmp_path / "run")) == 2, "the last one is whole"


@pytest.mark.parametrize(
    ("to", "kind"),
    [("launcher", "replicated"), ("rank", "replicated"), ("rank", "sharded")],
    ids=["launcher", "rank", "sharded-rank"],
)
def test_a_signal_saves_on_all_ranks(tmp_path, to, kind):
    """Of two ranks, or of one: the other learns of it between two steps."""
    process = start(tmp_path, "signal", kind)
    history = tmp_path / "run" / "history.jsonl"
    while process.poll() is None and not (history.is_file() and history.read_text().count("\n") >= 3):
        time.sleep(0.05)
    if to == "launcher":
        process.terminate()
    else:
        os.kill(int((tmp_path / "run" / "pid-1").read_text()), signal.SIGTERM)
    errors = stderr(process)
    assert to == "launcher" or process.returncode == 0, errors[-3000:]
    kept = latest_checkpoint(tmp_path / "run")
    assert kept is not None and checkpoint_step(kept) >= 3, errors[-3000:]
    assert f"step {checkpoint_step(kept)} of 100000 is saved in" in errors
    assert "run the same with resume_from_checkpoint=True" in errors
