"""A run that is asked to stop saves what it has, says how to go on, and goes on with the same bits."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from runs import run, same, weights
from tiny import tiny_model, tiny_tokenizer

from powerflow_fast import PowerFlowConfig
from powerflow_fast.checkpoints.folder import latest_checkpoint, load_checkpoint
from powerflow_fast.errors import NonFiniteLossError, OutputDirError, RunStopped
from powerflow_fast.tools.json_lines import HistoryWriter, read_history
from powerflow_fast.tools.ngrams import repeated_ngrams
from powerflow_fast.training import result as results
from powerflow_fast.training import run as training_run
from powerflow_fast.training.alarms import Alarms
from powerflow_fast.training.signals import Abandoned, StopRequest

TESTS = Path(__file__).parents[1] / "helpers"


def during(monkeypatch, name, act, *, call):
    """Do ``act()`` within the ``call``-th call of the Updater's or the trainer's method ``name``."""
    owner = training_run.Updater if hasattr(training_run.Updater, name) else training_run.Run
    original, calls = getattr(owner, name), []

    def spy(self, *args, **keywords):
        calls.append(name)
        if len(calls) == call:
            act()
        return original(self, *args, **keywords)

    monkeypatch.setattr(owner, name, spy)


@pytest.fixture(autouse=True)
def interruptible():
    """A shell's background job, and what it starts, ignores SIGINT unless told otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def kill_me(number):
    return lambda: os.kill(os.getpid(), number)


OPTIONS = {"max_steps": 5, "num_iterations": 2, "num_sample_prompts": 1, "log_completions": True}


@pytest.mark.parametrize(
    ("where", "call", "step"),
    [
        ("score_base", 2, 2),  # in a rollout
        ("gradient", 2, 1),  # on a rollout that the first step has used
        ("_save", 1, 5),  # in the last save
        ("_finish", 1, 5),
    ],
)
def test_sigterm_saves_and_resumes_with_the_same_bits(tmp_path, monkeypatch, caplog, where, call, step):
    whole = run(tmp_path, name="whole", **OPTIONS)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        during(patch, where, kill_me(signal.SIGTERM), call=call)
        with pytest.raises(RunStopped) as stopped:
            run(tmp_path, name="cut", **OPTIONS)
    assert stopped.value.code == 0
    assert stopped.value.checkpoint == str(tmp_path / "cut" / f"checkpoint-{step}")
    assert latest_checkpoint(tmp_path / "cut").name == f"checkpoint-{step}"
    said = [r.getMessage() for r in caplog.records if "SIGTERM" in r.getMessage()]
    assert len(said) == 1 and f"step {step} of 5" in said[0] and "resume_from_checkpoint=True" in said[0]
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    resumed = run(tmp_path, name="cut", resume_from_checkpoint=True, **OPTIONS)
    assert same(weights(resumed.model), weights(whole.model))
    assert [row["loss"] for row in resumed.history] == [row["loss"] for row in whole.history]
    texts = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert texts[0] == texts[1]


def test_an_optimiser_step_is_never_torn(tmp_path, monkeypatch):
    """A signal in the middle of the weights' update waits for its end."""
    whole, seen = run(tmp_path, name="whole", max_steps=3), []
    original = training_run.torch.optim.AdamW.step

    def step(self, *args, **keywords):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(training_run.torch.optim.AdamW, "step", step)
        with pytest.raises(RunStopped):
            run(tmp_path, name="cut", max_steps=3)
    assert latest_checkpoint(tmp_path / "cut").name == "checkpoint-2"
    resumed = run(tmp_path, name="cut", max_steps=3, resume_from_checkpoint=True)
    assert same(weights(resumed.model), weights(whole.model))


def test_ctrl_c_saves_and_stays_an_interrupt(tmp_path, monkeypatch, caplog):
    during(monkeypatch, "gradient", kill_me(signal.SIGINT), call=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, max_steps=5, save_steps=1)
    assert latest_checkpoint(tmp_path / "run").name == "checkpoint-2"
    assert "SIGINT: step 2 of 5 is saved" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_before_the_first_step_there_is_nothing_to_save(tmp_path, monkeypatch, caplog):
    scores = {"eval_fn": lambda model, tokenizer, step: {"seen": step}}
    with monkeypatch.context() as patch:
        during(patch, "score_base", kill_me(signal.SIGTERM), call=1)
        with pytest.raises(RunStopped) as stopped:
            run(tmp_path, **scores)
    assert stopped.value.checkpoint is None and latest_checkpoint(tmp_path / "run") is None
    assert "no step was made yet" in caplog.text
    result = run(tmp_path, resume_from_checkpoint=True, **scores)
    rows = read_history(tmp_path / "run" / "history.jsonl")
    assert rows == result.history and [row["step"] for row in rows] == [0, 1, 2, 3, 3], "the first row is not doubled"


def test_a_checkpoint_of_this_very_step_is_not_written_twice(tmp_path, monkeypatch):
    during(monkeypatch, "score_base", kill_me(signal.SIGTERM), call=3)
    saved = []
    original = training_run.Run._save
    monkeypatch.setattr(training_run.Run, "_save", lambda self: saved.append(self.step) or original(self))
    with pytest.raises(RunStopped):
        run(tmp_path, max_steps=5, save_steps=2)
    assert saved == [2]


def test_train_in_another_thread_installs_nothing(tmp_path):
    before, seen, failed = signal.getsignal(signal.SIGTERM), [], []

    def work():
        try:
            run(
                tmp_path,
                max_steps=1,
                callbacks=[lambda report: seen.append(signal.getsignal(signal.SIGTERM)) and False],
            )
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and seen == [before] and (tmp_path / "run" / "model").is_dir()


def test_ignored_signals_stay_ignored_and_handlers_come_back():
    def mine(number, frame):
        raise AssertionError("not while a run is on")

    former = signal.signal(signal.SIGTERM, mine), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as request:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat themselves
            assert request.signal is signal.SIGTERM
            with pytest.raises(Abandoned), request.abandonable():
                raise AssertionError("a signal that came before counts")
            with request.abandonable(False):
                pass
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former[0])
        signal.signal(signal.SIGINT, former[1])


def test_a_second_ctrl_c_interrupts():
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_the_command_line_exits_as_schedulers_expect(tmp_path, number, code):
    """A real process, a real signal, and the same command line with one more option goes on."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("one \ntwo and \nthree \n")
    words = ["--model", tmp_path / "model", "--prompts", tmp_path / "prompts.txt", "--alpha", 2]
    words += ["--num-generations", 4, "--per-device-train-batch-size", 4, "--max-completion-length", 6]
    words += ["--output-dir", tmp_path / "out", "--num-sample-prompts", 0, "--self-check", "false"]
    command = [sys.executable, "-m", "powerflow_fast.cli", "train", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--max-steps", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    history = tmp_path / "out" / "history.jsonl"
    while process.poll() is None and (not history.exists() or len(read_history(history)) < 3):
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    newest = latest_checkpoint(tmp_path / "out")
    step = load_checkpoint(newest).state["step"]
    assert step >= 3 and f"{number.name}: step {step} of 100000 is saved in {newest}" in err
    assert "Traceback" not in err and "done" not in out
    longer = ["--max-steps", str(step + 2), "--resume-from-checkpoint"]
    subprocess.run([*command, *longer], check=True, capture_output=True, timeout=100, env=environment)
    assert [row["step"] for row in read_history(history)] == list(range(1, step + 3))


@pytest.mark.parametrize("name", ["history.jsonl", "model"])
def test_a_disk_that_fills_up_outside_a_checkpoint_is_named(tmp_path, monkeypatch, name):
    def full(*args, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    if name == "model":
        monkeypatch.setattr(results, "save_model", full)
    else:
        monkeypatch.setattr(HistoryWriter, "write", full)
    with pytest.raises(OutputDirError, match=r"no space left on the disk .*bytes.* free.*resume_from_checkpoint=True"):
        run(tmp_path, max_steps=1, num_sample_prompts=0, self_check=False)
    monkeypatch.undo()
    result = run(tmp_path, max_steps=1, num_sample_prompts=0, self_check=False, resume_from_checkpoint=True)
    assert result.model_dir.is_dir() and len(result.history) == 1


def spoil(monkeypatch, bad_calls, where="gradient"):
    """Make the gradient (or, with it, the loss) of the given calls of ``Updater.gradient`` NaN."""
    original, calls = training_run.Updater.gradient, []

    def spoiled(self, samples, **keywords):
        sums = original(self, samples, **keywords)
        calls.append(1)
        if len(calls) in bad_calls:
            next(self.policy.parameters()).grad[0] = float("nan")
            if where == "loss":
                sums = sums._replace(loss=sums.loss * float("inf"))
        return sums

    monkeypatch.setattr(training_run.Updater, "gradient", spoiled)


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_skipped_step_has_not_happened(tmp_path, monkeypatch, caplog, where):
    """Weights, optimiser, schedule and log Z' head, bit for bit; and it is counted, across a resume too."""
    spoil(monkeypatch, {2, 4}, where)
    options = {"max_steps": 5, "save_steps": 1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 9}
    result = run(tmp_path, logging_steps=5, **options)
    saved = [load_checkpoint(tmp_path / "run" / f"checkpoint-{k}") for k in range(1, 6)]
    for before, after, skipped in zip(saved, saved[1:], (True, False, True, False), strict=False):
        assert same(before.tensors["weights"], after.tensors["weights"]) == skipped
        assert same(before.tensors["optimizer"], after.tensors["optimizer"]) == skipped
        assert (before.state["scheduler"] == after.state["scheduler"]) == skipped
    rows = {row["step"]: row for row in read_history(tmp_path / "run" / "history.jsonl")}
    assert {k: row["skipped_steps"] for k, row in rows.items()} == {2: 1, 4: 2, 5: 2}, "skipped ones are always shown"
    assert rows[2]["grad_norm"] is None and (rows[2]["loss"] is None) == (where == "loss")
    assert caplog.text.count("is skipped") == 2 and "step 2 is skipped: " in caplog.text
    assert result.model_dir.is_dir() and (tmp_path / "run" / "model" / "README.md").is_file()
    resumed = run(tmp_path, resume_from_checkpoint=True, **{**options, "max_steps": 6})
    assert resumed.history[-1]["skipped_steps"] == 2


def test_too_many_skipped_in_a_row_end_the_run(tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 6})
    with pytest.raises(NonFiniteLossError, match=r"step 6: .* after 2 skipped in a row .*step 5 is in") as stopped:
        run(tmp_path, max_steps=9, max_nonfinite_steps=3)
    assert (stopped.value.step, stopped.value.metric) == (6, "grad_norm")


def test_stop_saves_nothing_over_the_last_checkpoint(tmp_path, monkeypatch):
    spoil(monkeypatch, {4}, "loss")
    with pytest.raises(NonFiniteLossError, match=r"step 4: loss inf.*after step 2 is in") as stopped:
        run(tmp_path, max_steps=9, save_steps=2, save_total_limit=1, on_nonfinite="stop")
    assert (stopped.value.step, stopped.value.metric) == (4, "loss")
    assert [p.name for p in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.undo()
    result = run(tmp_path, max_steps=4, on_nonfinite="skip", save_steps=2, resume_from_checkpoint=True)
    assert result.history[-1]["step"] == 4, "and the run may go on with the other setting"


def test_a_first_step_that_is_skipped_leaves_log_z_to_the_second(tmp_path, monkeypatch):
    original, calls = training_run.Updater.score_base, []

    def infinite(self, samples):
        calls.append(1)
        return original(self, samples) * (float("inf") if len(calls) == 1 else 1.0)

    monkeypatch.setattr(training_run.Updater, "score_base", infinite)
    first, second = run(tmp_path, max_steps=2, alpha=2.0).history
    assert first["skipped_steps"] == second["skipped_steps"] == 1
    assert second["log_z"] == pytest.approx(2.0 * second["base_logp"] - second["policy_logp"], abs=0.5)


def test_repeated_ngrams():
    assert repeated_ngrams([[1, 2, 3, 4, 5]]) == (0, 2)
    assert repeated_ngrams([[7] * 10, [1, 2, 3], []]) == (6, 7)
    assert repeated_ngrams([[1, 2, 1, 2, 1], [1, 2]], n=2) == (2, 5)


def test_alarms_warn_once_per_episode(caplog):
    alarms = Alarms(PowerFlowConfig(alarm_length_share=0.5, alarm_repetition=0.4, alarm_clip_fraction=1.0))
    quiet = Alarms(PowerFlowConfig(), warn=False)
    lengths = [100.0] * 8 + [10.0] * 8 + [100.0] * 8 + [10.0] * 8
    seen = []
    for step, length in enumerate(lengths, start=1):
        metrics = {"length": length, "repetition": 0.9 if step > 30 else 0.1, "clip_fraction": 1.0}
        copy = Alarms(PowerFlowConfig(alarm_length_share=0.5, alarm_repetition=0.4, alarm_clip_fraction=1.0))
        copy.load_state_dict(json.loads(json.dumps(alarms.state_dict())))
        alarms = copy  # as if the run was resumed before each step
        seen.append(alarms.check(step, metrics))
        assert "alarm/clip_fraction" in quiet.check(step, metrics)
    collapse = [step for step, row in enumerate(seen, start=1) if "alarm/length_collapse" in row]
    assert collapse == [*range(11, 19), *range(27, 33)], "the mean of five steps is under half of the first five"
    said = [r.getMessage() for r in caplog.records]
    assert [m.split(":")[0] for m in said] == ["step 11", "step 27", "step 32"]
    assert "mean length is 46.0 tokens, under 0.5 of the first steps' 100.0" in said[0] and "format_fn" in said[0]
    assert "repetition is 0.42, over 0.4 (alarm_repetition)" in said[2]


def test_alarms_show_in_the_history(tmp_path, caplog):
    result = run(
        tmp_path, max_steps=3, alarm_repetition=1e-9, max_completion_length=40, self_check=False, temperature=0.05
    )
    assert result.history[0]["repetition"] > 0
    assert all(row["alarm/repetition"] == 1.0 for row in result.history)
    assert caplog.text.count("alarm_repetition") == 1
