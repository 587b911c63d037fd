"""A run killed at any moment and resumed ends with the same bits as the run that was never killed."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from pathlib import Path

import pytest
from runs import Killed, kill_after, run, same, weights
from safetensors.torch import load_file
from tiny import tiny_model

from powerflow_fast.checkpoints.folder import latest_checkpoint
from powerflow_fast.errors import CheckpointError, OutputDirError


@pytest.mark.parametrize("log_z", ["learned", "group"])
@pytest.mark.parametrize(
    "options",
    [
        {"save_steps": 1, "lr_scheduler_type": "linear", "warmup_steps": 2},
        {"save_steps": 2, "num_iterations": 3, "weight_decay": 0.1},  # checkpoints within a rollout
        {"save_steps": 1, "use_peft": True, "lora_r": 2, "steps_per_generation": 2},
    ],
    ids=["each-step", "stale-rollouts", "lora"],
)
def test_resumed_run_is_bit_equal(tmp_path, options, log_z):
    options = {"max_steps": 6, "log_z": log_z, "num_sample_prompts": 1, **options}
    whole = run(tmp_path, name="whole", **options)
    for step in (3, 5):
        resume = step != 3
        with pytest.raises(Killed):
            run(tmp_path, name="cut", callbacks=[kill_after(step)], resume_from_checkpoint=resume, **options)
    resumed = run(tmp_path, name="cut", resume_from_checkpoint=True, **options)
    assert same(weights(resumed.model), weights(whole.model))
    head = [tmp_path / name / "log_z_head.safetensors" for name in ("whole", "cut")]
    assert log_z == "group" or same(*map(load_file, head))
    timed = {"tokens_per_second"} | {f"{a}/{b}" for a in ("seconds", "share") for b in ("rollout", "score", "update")}

    def numbers(result):
        return [{k: v for k, v in row.items() if k not in timed} for row in result.history]

    assert numbers(resumed) == numbers(whole), "the history has no gap and no double row"
    texts = [(tmp_path / name / "samples.md").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]


KILLS, LEASH = 20, 4
STEPS = (LEASH + 2) * KILLS  # a leashed process takes LEASH + 1 at most: none gets to the end


def newest(folder):
    try:
        return latest_checkpoint(folder)
    except FileNotFoundError:  # not there yet, or an old checkpoint was dropped while we looked
        return None


def train_to_the_end(*arguments):
    from killable import train_to_the_end  # already imported where this runs

    train_to_the_end(*arguments)


def test_killed_at_random_moments(tmp_path, monkeypatch):
    """kill -9 at twenty random moments of the training; the processes are forked from one that has trained before."""
    # Python 3.11's server looks nowhere else
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "helpers"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killable"])

    def start(name, resume=None, leash=None):
        process = context.Process(target=train_to_the_end, args=(str(tmp_path), name, resume, STEPS, leash))
        process.start()
        return process

    def wait_for_another(process, known):
        began = time.perf_counter()
        while process.is_alive() and newest(folder) in (None, known):
            time.sleep(0.002)
        assert process.is_alive(), f"ended by itself with exit code {process.exitcode}"
        return newest(folder), time.perf_counter() - began

    whole = start("whole")
    whole.join()
    assert whole.exitcode == 0
    rng, folder = random.Random(0), tmp_path / "cut"
    for kill in range(KILLS):
        leash = context.Semaphore(LEASH)  # held here until the process is dead
        process = start("cut", True if kill else None, leash)
        first, _ = wait_for_another(process, newest(folder))
        _, step = wait_for_another(process, first)  # what a step takes on this machine, just now
        time.sleep(rng.random() * step)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    last = start("cut", True)
    last.join()
    assert last.exitcode == 0
    names = [tmp_path / name / "model" / "model.safetensors" for name in ("whole", "cut")]
    assert same(*map(load_file, names))
    assert len(list(folder.glob("checkpoint-*"))) == 2, "save_total_limit holds across the kills"
    rows = [json.loads(line)["step"] for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))


def test_resume_of_another_run_is_refused(tmp_path):
    run(tmp_path, max_steps=2)
    refused = [
        ({"alpha": 3.0}, "alpha: checkpoint has 2.0, this run has 3.0"),
        ({"learning_rate": 1e-4, "seed": 5}, r"learning_rate: checkpoint has 0.001.*\n.*seed: checkpoint has 0"),
        ({"prompts": ["other "]}, "prompts: checkpoint has"),
        ({"model": tiny_model(seed=1)}, "base_model: checkpoint has"),
        ({"log_z": "group"}, "log_z: checkpoint has 'learned', this run has 'group'"),
        ({"format_fn": "boxed"}, "format_fn: checkpoint has None, this run has 'boxed_answer'"),
    ]
    for options, message in refused:
        with pytest.raises(CheckpointError, match=f"(?s){message}.*start a new run"):
            run(tmp_path, resume_from_checkpoint=True, **{"max_steps": 4, **options})
    longer = run(tmp_path, resume_from_checkpoint=True, max_steps=4)
    assert [row["step"] for row in longer.history] == [1, 2, 3, 4], "a longer run with a constant rate goes on"


def test_resume_before_the_first_checkpoint_starts_anew(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=[kill_after(2)])
    resumed = run(tmp_path, resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(run(tmp_path, name="whole").model))


def test_damaged_checkpoint_is_named(tmp_path):
    run(tmp_path, max_steps=2, save_steps=1)
    newest = tmp_path / "run" / "checkpoint-2"
    file = newest / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors: damaged"):
        run(tmp_path, max_steps=4, resume_from_checkpoint=str(newest))


def test_a_damaged_newest_checkpoint_is_passed_over_aloud(tmp_path, caplog):
    run(tmp_path, max_steps=2, save_steps=1)
    with open(tmp_path / "run" / "checkpoint-2" / "weights.safetensors", "r+b") as file:
        file.truncate(100)
    result = run(tmp_path, max_steps=3, resume_from_checkpoint=True)
    assert [row["step"] for row in result.history] == [1, 2, 3]
    assert "passed over" in caplog.text and "checkpoint-2" in caplog.text


def test_branching_off_an_older_checkpoint_needs_its_own_folder(tmp_path):
    run(tmp_path, max_steps=3, save_steps=1)
    older = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(OutputDirError, match=r"holds checkpoint-3, later than .*branch off"):
        run(tmp_path, max_steps=4, resume_from_checkpoint=older)
    branch = run(tmp_path, name="branch", max_steps=3, resume_from_checkpoint=older)
    assert [row["step"] for row in branch.history] == [2, 3]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 3


def test_completions_have_no_gap_and_no_repetition(tmp_path):
    options = {"log_completions": True, "save_steps": 2, "max_steps": 4}
    run(tmp_path, name="whole", **options)
    with pytest.raises(Killed):
        run(tmp_path, name="cut", callbacks=[kill_after(3)], **options)
    run(tmp_path, name="cut", resume_from_checkpoint=True, **options)
    whole, cut = ((tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut"))
    assert whole == cut and len(whole.splitlines()) == 16


def test_number_of_samples_may_change_on_resume(tmp_path):
    run(tmp_path, max_steps=1, num_sample_prompts=1)
    run(tmp_path, max_steps=2, num_sample_prompts=3, resume_from_checkpoint=True)
    assert (tmp_path / "run" / "samples.md").read_text().count("**Prompt:**") == 1
