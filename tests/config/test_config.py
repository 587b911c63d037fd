from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from powerflow_fast.config import PowerFlowConfig, load_config
from powerflow_fast.config.files import parse_value, read_yaml
from powerflow_fast.config.options import _CLOSED_SCHEDULES, _OPEN_SCHEDULES
from powerflow_fast.errors import ConfigError


def test_every_field_has_help_and_a_default():
    for f in dataclasses.fields(PowerFlowConfig):
        assert f.metadata["help"], f.name
    PowerFlowConfig()


def test_schedules_are_those_of_transformers():
    from transformers import get_scheduler

    for name in _OPEN_SCHEDULES + _CLOSED_SCHEDULES:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedules = {}
        for total in (8, 80):
            scheduler = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=total)
            schedules[total] = [scheduler.lr_lambdas[0](k) for k in range(8)]
        # "Open" means that the run may be made longer on resume: the rates must not depend on its length.
        assert (schedules[8] == schedules[80]) == (name in _OPEN_SCHEDULES), name


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": -1.0}, ["alpha", "> 0", "-1.0"]),
        ({"alpha": 0}, ["alpha", "> 0"]),
        ({"alpha": math.nan}, ["alpha", "finite", "nan"]),
        ({"alpha": True}, ["alpha", "a number or a string or None", "bool"]),
        ({"learning_rate": "1e-6"}, ["learning_rate", "a number", "str"]),
        ({"learning_rate": 0.0}, ["learning_rate", "> 0"]),
        ({"learning_rate": math.inf}, ["learning_rate", "finite"]),
        ({"max_steps": 2.5}, ["max_steps", "an integer", "2.5"]),
        ({"max_steps": 0}, ["max_steps", "-1", ">= 1"]),
        ({"max_steps": -2}, ["max_steps", ">= -1"]),
        ({"seed": 2**32}, ["seed", "< 4294967296"]),
        ({"num_generations": 0}, ["num_generations", ">= 1"]),
        ({"num_generations": 1, "log_z": "group"}, ["num_generations", "log_z='group'"]),
        ({"log_z": "none"}, ["log_z", "'learned' or 'group'"]),
        ({"objective": 3}, ["objective", "a string"]),
        ({"top_p": 0.9}, ["top_p", "1.0", "full softmax"]),
        ({"top_k": 50}, ["top_k", "0", "full softmax"]),
        ({"temperature": 0.0}, ["temperature", "> 0"]),
        ({"format_penalty": 0.5}, ["format_penalty", "<= 0"]),
        ({"importance_clip": (1.2, 0.8)}, ["importance_clip", "low <= 1 <= high"]),
        ({"importance_clip": (0.8,)}, ["importance_clip", "2 numbers"]),
        ({"importance_clip": (0.8, math.inf)}, ["importance_clip", "finite"]),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, ["steps_per_generation", "=2", "got 3"]),
        ({"lr_scheduler_type": "cosin"}, ["lr_scheduler_type", "did you mean 'cosine'"]),
        ({"report_to": "wand"}, ["report_to", "did you mean 'wandb'"]),
        ({"report_to": ["wandb", "mlflo"]}, ["report_to", "mlflo"]),
        ({"bf16": "yes"}, ["bf16", "true or false or 'auto'"]),
        ({"lora_target_modules": ["q_proj", "model.lm_head"]}, ["lora_target_modules", "head"]),
        ({"adam_beta1": 1.0}, ["adam_beta1", "< 1"]),
        ({"output_dir": " "}, ["output_dir", "empty"]),
        ({"learning_rat": 1e-6}, ["'learning_rat'", "did you mean 'learning_rate'"]),
        ({"beta": 0.1}, ["'beta'", "alpha"]),
        ({"epsilon": 0.2}, ["'epsilon'", "importance_clip"]),
        ({"zzz": 1}, ["unknown field 'zzz'"]),
    ],
)
def test_bad_values_name_the_field_and_what_was_found(values, words):
    with pytest.raises(ConfigError) as error:
        PowerFlowConfig.from_dict(values)
    for word in words:
        assert word in str(error.value)


def test_numbers_are_normalised():
    config = PowerFlowConfig(alpha=4, importance_clip=[1, 2])
    assert isinstance(config.alpha, float) and config.importance_clip == (1.0, 2.0)
    assert isinstance(config.importance_clip, tuple)
    assert PowerFlowConfig(use_chat_template=False).use_chat_template is False


def test_alpha_is_required_in_the_end():
    assert PowerFlowConfig(alpha=0.5).require_alpha() == 0.5
    with pytest.raises(ConfigError, match="alpha is required"):
        PowerFlowConfig().require_alpha()


def test_derived_sizes():
    config = PowerFlowConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=6,
        num_iterations=3,
        num_generations=8,
    )
    assert config.sequences_per_step(world_size=2) == 16
    assert config.generation_batch_size(world_size=2) == 48
    assert config.prompts_per_generation(world_size=2) == 6
    assert config.updates_per_generation == 9
    # 20 prompts at 6 a rollout: 4 rollouts
    assert config.total_steps(20, world_size=2) == 4 * 9
    assert config.merge(num_train_epochs=0.3).total_steps(20, world_size=2) == 1 * 9
    assert config.merge(max_steps=5).total_steps(20) == 5
    assert PowerFlowConfig(gradient_accumulation_steps=3).micro_batches_per_generation == 3


@pytest.mark.parametrize("world", [1, 3])
def test_the_numbers_suggested_for_a_rollout_work(world):
    config = PowerFlowConfig(num_generations=9, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    with pytest.raises(ConfigError, match="num_generations=9 must divide the") as error:
        config.generation_batch_size(world)
    numbers = [int(n) for n in str(error.value).split("one of [")[1].split("]")[0].split(",")]
    unit = int(str(error.value).rsplit(" ", 1)[1])
    for n in numbers:
        config.merge(num_generations=n).generation_batch_size(world)
    config.merge(per_device_train_batch_size=unit).generation_batch_size(world)


def test_trackers():
    assert PowerFlowConfig().trackers == []
    assert PowerFlowConfig(report_to="tensorboard, wandb").trackers == ["tensorboard", "wandb"]
    assert PowerFlowConfig(report_to=["trackio"]).trackers == ["trackio"]


def test_dict_round_trip_and_merge():
    config = PowerFlowConfig(alpha=2, importance_clip=(0.5, 1.5), report_to=["wandb"], steps_per_generation=4)
    again = PowerFlowConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert config.merge(alpha=3).alpha == 3 and config.alpha == 2
    with pytest.raises(ConfigError, match="did you mean 'max_steps'"):
        config.merge(max_step=3)


def test_diff_for_resume():
    config = PowerFlowConfig(alpha=4)
    saved = json.loads(json.dumps(config.fingerprint_fields()))
    same = config.merge(max_steps=99, output_dir="b", logging_steps=7, resume_from_checkpoint=True, lora_r=4)
    assert same.diff_for_resume(saved) == [] and config.diff_for_resume(config.to_dict()) == []
    lines = config.merge(learning_rate=2e-6, importance_clip=(0.9, 1.1)).diff_for_resume(saved)
    assert len(lines) == 2
    assert "learning_rate: checkpoint has 1e-06, this run has 2e-06" in lines
    del saved["seed"]
    saved["old_field"] = 3
    lines = config.diff_for_resume(saved)
    assert any(s.startswith("seed: not recorded") for s in lines)
    assert any(s.startswith("old_field: checkpoint has 3") for s in lines) and len(lines) == 2


def test_the_length_of_the_run_matters_only_to_schedules_that_read_it():
    open_ended = PowerFlowConfig(max_steps=10).fingerprint_fields()
    assert "max_steps" not in open_ended and "num_train_epochs" not in open_ended
    closed = PowerFlowConfig(max_steps=10, lr_scheduler_type="cosine")
    assert "num_train_epochs" not in closed.fingerprint_fields()
    assert closed.merge(max_steps=20).diff_for_resume(closed.to_dict()) == [
        "max_steps: checkpoint has 10, this run has 20"
    ]
    assert "num_train_epochs" in closed.merge(max_steps=-1).fingerprint_fields()
    assert "lora_r" in PowerFlowConfig(use_peft=True).fingerprint_fields()
    assert "log_z_learning_rate" not in PowerFlowConfig(log_z="group").fingerprint_fields()


def test_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "alpha: 4\nlearning_rate: 1e-5\nimportance_clip: [0.9, 1.1]\nrun_name: '12'\nbf16: auto\nmax_steps: 3\n"
    )
    config = load_config(path)
    assert config == PowerFlowConfig(
        alpha=4, learning_rate=1e-5, importance_clip=(0.9, 1.1), run_name="12", bf16="auto", max_steps=3
    )
    path.write_text("")
    assert load_config(path) == PowerFlowConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha: 4\nlearning_rate: [1\n", r"run.yaml:\d: not valid YAML"),
        ("alpha: 4\n\nlearning_rat: 1\n", r"run.yaml:3: unknown field 'learning_rat'; did you mean 'learning_rate'"),
        ("alpha: 4\nalpha: 5\n", "run.yaml:2: alpha is given twice"),
        ("- alpha\n", "must be a mapping"),
        ("alpha: fast\n", "run.yaml: .*alpha must be a number"),
        ("beta: 1\n", "run.yaml:1: unknown field 'beta': "),
    ],
)
def test_bad_yaml_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_yaml_and_extra_keys(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read the config file: No such file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("model: m\nalpha: 2\n")
    assert read_yaml(tmp_path / "a.yaml", also=["model"]) == {"model": "m", "alpha": 2}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "1e-6", 1e-6),
        ("max_steps", "1e3", "1e3"),
        ("run_name", "12", "12"),
        ("run_name", "none", None),
        ("report_to", "none", "none"),
        ("bf16", "auto", "auto"),
        ("bf16", "True", True),
        ("use_peft", "false", False),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "run/checkpoint-3", "run/checkpoint-3"),
        ("importance_clip", "[0.8, 1.3]", [0.8, 1.3]),
        ("output_dir", "null", "null"),
    ],
)
def test_parse_value(name, text, value):
    parsed = parse_value(name, text)
    assert parsed == value and type(parsed) is type(value)
