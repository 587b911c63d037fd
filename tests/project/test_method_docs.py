"""docs/method.md names options, columns and alarms that exist, with the defaults that they have."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tiny import tiny_model, tiny_tokenizer

from powerflow_fast import train
from powerflow_fast.config import PowerFlowConfig
from powerflow_fast.objectives import OBJECTIVES
from powerflow_fast.report.metrics import METRICS
from powerflow_fast.training.alarms import Alarms

PAGE = (Path(__file__).parents[2] / "docs" / "method.md").read_text(encoding="utf-8")
CONFIG = {field.name: field.default for field in dataclasses.fields(PowerFlowConfig)}
COLUMNS = {
    "policy_alpha",
    "repetition",
    "finished",
    "format_ok",
    "clip_fraction",
    "grad_norm",
    "skipped_steps",
    "rollout_logp_gap_max",
}
PLAIN = {"evaluate", "p_base", "q", "y", "r", "s", "w", "format_fn"}


def alarms():
    metrics = {"length": 1.0, "repetition": 1.0, "clip_fraction": 1.0}
    watching = Alarms(PowerFlowConfig(alarm_repetition=0.9, alarm_clip_fraction=0.9), warn=False)
    watching.check(1, {**metrics, "length": 100.0})
    for step in range(2, 12):
        rows = watching.check(step, metrics)
    return {name.removeprefix("alarm/") for name in rows}


def test_names_exist():
    named = set(re.findall(r"`([a-z_]+)`", PAGE))
    assert named <= CONFIG.keys() | COLUMNS | alarms() | PLAIN, named - (CONFIG.keys() | COLUMNS | alarms() | PLAIN)
    assert alarms() <= named and len(named & CONFIG.keys()) >= 15


def test_columns_are_recorded(tmp_path):
    sizes = {"num_generations": 2, "per_device_train_batch_size": 2, "max_completion_length": 6, "max_steps": 1}
    config = PowerFlowConfig(
        output_dir=str(tmp_path), num_sample_prompts=0, rollout_engine="hf", self_check=False, **sizes
    )
    result = train(tiny_model(), ["ab"], alpha="auto:entropy=2.0", tokenizer=tiny_tokenizer(), config=config)
    assert result.history[0].keys() | METRICS.keys() >= COLUMNS  # the gap is of engines that give log-probs


def test_values_are_accepted():
    assigned = re.findall(r'`(\w+)="(\w+)"`', PAGE)
    assert len(assigned) >= 6
    for name, value in assigned:
        getattr(PowerFlowConfig(**{name: value}), name)
        assert name != "objective" or value in OBJECTIVES
    for value in re.findall(r'^\| `"(\w+)"` \|', PAGE, re.M):
        assert PowerFlowConfig(log_z=value).log_z == value


def test_defaults_are_those_of_the_code():
    for text, name in (
        ("below 0.25 of the first steps'", "alarm_length_share"),
        ("ψ = −0.5 is added", "format_penalty"),
        ("clipped to (0.8, 1.2)", "importance_clip"),
    ):
        assert text in PAGE and str(CONFIG[name]).replace("-", "−") in text
    assert CONFIG["alarm_repetition"] == CONFIG["alarm_clip_fraction"] == 0.5 and CONFIG["log_z"] == "learned"
    assert PAGE.count("more than half of the") == 2
