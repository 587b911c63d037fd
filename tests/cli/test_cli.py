from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

import powerflow_fast
from powerflow_fast.cli import main
from powerflow_fast.config import PowerFlowConfig
from powerflow_fast.errors import CheckpointError
from powerflow_fast.rewards import boxed_answer


@pytest.fixture
def train(monkeypatch):
    """Stands in for the trainer and records its calls."""
    calls = []

    def fake(model, prompts, **options):
        calls.append((model, prompts, options))
        return SimpleNamespace(output_dir=options["config"].output_dir)

    monkeypatch.setattr(importlib.import_module("powerflow_fast.training.train"), "train", fake)
    return calls


def run(*words):
    return main(["train", "--model", "m", "--prompts", "p.jsonl", "--alpha", "4", *words])


def test_train_passes_everything_on(train, capsys):
    assert run("--format", "boxed", "--output-dir", "out") == 0
    assert capsys.readouterr().out == "done: out\n"
    ((model, prompts, options),) = train
    assert (model, prompts) == ("m", "p.jsonl")
    assert options == {
        "alpha": 4.0,
        "config": PowerFlowConfig(alpha=4, output_dir="out"),
        "format_fn": boxed_answer,
    }


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning_rate=1e-5"], "learning_rate", 1e-5),
        (["--format-penalty", "-0.25"], "format_penalty", -0.25),
        (["--use-peft"], "use_peft", True),
        (["--self-check", "false"], "self_check", False),
        (["--bf16", "auto"], "bf16", "auto"),
        (["--bf16"], "bf16", True),
        (["--importance-clip", "0.7", "1.3"], "importance_clip", (0.7, 1.3)),
        (["--report-to", "tensorboard", "wandb"], "report_to", ["tensorboard", "wandb"]),
        (["--report-to", "none"], "report_to", "none"),
        (["--lora-target-modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--resume-from-checkpoint"], "resume_from_checkpoint", True),
        (["--resume-from-checkpoint", "out/checkpoint-3"], "resume_from_checkpoint", "out/checkpoint-3"),
        (["--steps-per-generation", "none"], "steps_per_generation", None),
        (["--run-name", "7"], "run_name", "7"),
        (["--system-prompt", "be_brief --now"], "system_prompt", "be_brief --now"),
    ],
)
def test_options(train, words, field, value):
    assert run(*words) == 0
    assert train[0][2]["config"] == PowerFlowConfig(alpha=4).merge(**{field: value})


def test_every_field_is_an_option_and_reads_its_own_default(train, capsys):
    words = []
    for f in dataclasses.fields(PowerFlowConfig):
        default = "none" if f.default is None else f.default
        words += [f"--{f.name}", *map(str, default if isinstance(default, tuple) else [default])]
    assert run(*words, "--alpha", "4") == 0
    assert train[0][2]["config"] == PowerFlowConfig(alpha=4)
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for f in dataclasses.fields(PowerFlowConfig):
        assert f"--{f.name.replace('_', '-')} " in text and " ".join(f.metadata["help"].split()) in text, f.name


def test_command_line_over_file_over_defaults(train, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: from-file\nprompts: f.txt\nalpha: 2\nlearning_rate: 3e-5\nseed: 5\nformat: boxed\n")
    assert main(["train", "--config", str(file), "--seed", "9", "--model", "m"]) == 0
    model, prompts, options = train[0]
    assert (model, prompts, options["format_fn"]) == ("m", "f.txt", boxed_answer)
    assert options["config"] == PowerFlowConfig(alpha=2, learning_rate=3e-5, seed=9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--prompts", "p", "--alpha", "4"], "--model is required"),
        (["train", "--model", "m", "--alpha", "4"], "--prompts is required"),
        (["train", "--model", "m", "--prompts", "p"], "alpha is required"),
        (["train", "--model"], "argument --model: expected one argument (see powerflow-fast train --help)"),
        (["train", "--learning-rat", "3"], "unknown option --learning-rat; did you mean '--learning-rate'?"),
        (["train", "--beta=0.1"], "unknown option --beta: there is no KL weight"),
        (["train", "stray"], "unknown option stray"),
        (["train", "--max", "3"], "unknown option --max"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml: cannot read the config file"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "required: command"),
    ],
)
def test_usage_errors_are_one_line(train, capsys, words, message):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("powerflow-fast: error: ") and err.count("\n") == 1
    assert message in err and not train


def test_bad_values_and_files(train, capsys, tmp_path):
    assert run("--max-steps", "many") == 2
    assert "max_steps must be an integer, got 'many'" in capsys.readouterr().err
    assert run("--format", "boxd") == 2
    assert "did you mean 'boxed'" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text("alpha: 4\nlearning_rat: 1\n")
    assert run("--config", str(file)) == 2
    assert f"{file}:2: unknown field 'learning_rat'; did you mean 'learning_rate'?" in capsys.readouterr().err
    file.write_text("temperature: 0\n")
    assert run("--config", str(file)) == 2
    assert f"{file}, command line: PowerFlowConfig: temperature must be > 0" in capsys.readouterr().err
    assert not train


def test_typed_errors_of_the_run(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(importlib.import_module("powerflow_fast.training.train"), "train", fail)
    error = CheckpointError("checkpoint-3: damaged")
    assert run() == 2
    assert capsys.readouterr().err == "powerflow-fast: error: checkpoint-3: damaged\n"
    with pytest.raises(CheckpointError):
        run("--traceback")
    error = KeyboardInterrupt()
    assert run() == 130
    error = ZeroDivisionError()  # a bug keeps its traceback
    with pytest.raises(ZeroDivisionError):
        run()


def test_demo_gets_its_words(monkeypatch):
    seen = []
    monkeypatch.setattr("powerflow_fast.demo.run.main", lambda argv: seen.append(argv) or 7)
    assert main(["demo", "--alpha", "0.5", "--traceback"]) == 7
    assert seen == [["--alpha", "0.5"]]


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    words = ("torch ", "extension  ", "CPU products", "triton kernels", "fast bfloat16")
    for word in (powerflow_fast.__version__, *words):
        assert word in out


def test_as_a_program_and_without_heavy_imports_on_a_usage_error():
    command = [sys.executable, "-X", "importtime", "-m", "powerflow_fast.cli", "train", "--learning-rat", "3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "did you mean '--learning-rate'" in result.stderr.splitlines()[-1]
    assert " transformers" not in result.stderr
    result = subprocess.run([sys.executable, "-m", "powerflow_fast.cli", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, f"powerflow-fast {powerflow_fast.__version__}\n")
