"""Which engine samples, what train() tells it and checks about it, and the gap between its log-probs and ours."""

from __future__ import annotations

import logging

import pytest
import torch
from accelerate import Accelerator
from runs import run
from test_vllm import FakeLLM, stand_ins  # noqa: F401
from tiny import one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast import PowerFlowConfig
from powerflow_fast.errors import ConfigError, RolloutError
from powerflow_fast.rollout import choice as rollout_choice
from powerflow_fast.rollout import generate
from powerflow_fast.rollout.choice import check_rollout_config, logp_gap, make_engine

PROMPTS = ragged_ids([9, 4, 12], seed=2)
GAPS = ("rollout_logp_gap_mean", "rollout_logp_gap_max")


@pytest.fixture
def pays(monkeypatch):
    """As on a GPU, where continuous batching is worth a probe."""
    monkeypatch.setattr(rollout_choice, "continuous_pays", lambda device, sequences, places: True)


def test_auto_takes_generate_on_a_cpu(caplog):
    name, messages = choose(tiny_model(), caplog)
    assert name == "hf" and messages == [
        "rollout_engine='auto' chose 'hf': continuous batching is no faster on a CPU with 8 sequences, 64 at once"
    ]
    sizes = {"per_device_train_batch_size": 128, "rollout_batch_size": 32}
    assert choose(tiny_model("qwen2"), caplog, **sizes)[0] == "continuous", "enough wait for a place"


def choose(model, caplog, **options):
    config = PowerFlowConfig(max_prompt_length=16, max_completion_length=8, **options)
    with caplog.at_level(logging.INFO, logger="powerflow_fast"):
        engine = make_engine(model, tiny_tokenizer(), config, Accelerator(cpu=True), probe_prompts=PROMPTS)
    return engine.name, [r.message for r in caplog.records if "rollout_engine" in r.message]


def test_auto_takes_continuous_batching_where_it_is_right(pays, caplog):
    name, lines = choose(tiny_model("qwen2"), caplog)
    assert name == "continuous"
    assert lines == [
        "rollout_engine='auto' chose 'continuous': continuous batching draws from the model's own distribution"
    ]


def test_auto_finds_a_wrong_distribution_by_measuring(pays, caplog):
    """Gemma 2's attention softcap is missing from transformers' paged attention."""
    name, lines = choose(tiny_model("gemma2"), caplog)
    assert name == "hf"
    assert len(lines) == 1 and "does not draw from this model's distribution" in lines[0]


def test_auto_without_support(pays, caplog, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "init_continuous_batching", None)
    name, lines = choose(model, caplog)
    assert name == "hf" and len(lines) == 1 and "cannot run this model (TypeError" in lines[0]


@pytest.mark.parametrize("engine", ["hf", "continuous"])
def test_an_engine_asked_for_is_taken_without_a_probe(engine, caplog, monkeypatch):
    monkeypatch.setattr(rollout_choice, "probe_continuous", None)
    assert choose(tiny_model("gemma2"), caplog, rollout_engine=engine) == (engine, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "rollout_engine": "hf"}, "use_vllm=True contradicts rollout_engine='hf'"),
        ({"use_vllm": True, "vllm_mode": "server"}, "needs vllm_server_base_url"),
        ({"use_vllm": True, "vllm_server_base_url": "http://a:1"}, "is for vllm_mode='server'"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size must be 1 .* vllm serve"),
        ({"use_vllm": True, "vllm_max_model_length": 99}, "vllm_max_model_length must hold .* 768, got 99"),
        ({"rollout_cache_tokens": 700}, "rollout_cache_tokens must hold .* 768, got 700"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check_rollout_config(PowerFlowConfig(**options))


def test_logp_gap():
    gap = logp_gap([[-1.0, -2.0], [], [-3.0]], torch.tensor([-1.5, -2.0, -2.0]), Accelerator(cpu=True))
    assert gap == {"rollout_logp_gap_mean": 0.5, "rollout_logp_gap_max": 1.0}
    assert logp_gap([[]], torch.tensor([]), Accelerator(cpu=True))["rollout_logp_gap_max"] == 0


def test_training_with_continuous_batching_logs_the_gap(tmp_path):
    options = {"max_steps": 4, "num_iterations": 2, "bf16": False, "num_sample_prompts": 0}
    history = run(tmp_path, rollout_engine="continuous", **options).history
    for row in history:
        first_on_its_rollout = row["step"] % 2 == 1
        assert all((name in row) == first_on_its_rollout for name in GAPS)
        if first_on_its_rollout:
            assert 0 <= row[GAPS[0]] <= row[GAPS[1]] < 1e-4, "the engine sampled from the weights that were scored"


def test_generate_gives_log_probs_only_where_they_serve(tmp_path):
    plain = run(tmp_path, name="plain", max_steps=1)
    assert not set(GAPS) & set(plain.history[0])
    used = run(tmp_path, name="used", max_steps=1, use_rollout_logps=True, bf16=False)
    assert used.history[0][GAPS[1]] < 1e-4


def test_engine_log_probs_serve_as_old_ones_only_when_asked(tmp_path, monkeypatch):
    """An engine whose log-probs are half a nat too high a sequence: the ratio of policies is then exp(-1/2)."""
    original = generate.HFGenerateEngine.generate

    def boastful(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        for row in result.logps or []:
            row[0] += 0.5
        return result

    monkeypatch.setattr(generate.HFGenerateEngine, "generate", boastful)
    options = {"max_steps": 1, "self_check": False, "importance_clip": (0.1, 3.0), "bf16": False}
    without = run(tmp_path, name="without", **options).history[0]
    assert without["importance_weight"] == 1
    used = run(tmp_path, name="used", use_rollout_logps=True, **options).history[0]
    assert used["importance_weight"] == pytest.approx(0.60653, abs=1e-4)
    assert used[GAPS[1]] == pytest.approx(0.5, abs=1e-4)


def test_every_rollout_is_from_the_present_weights(tmp_path, stand_ins, monkeypatch):  # noqa: F811
    """Colocated vLLM's stand-in has only what it was sent; the gap and the names tell what that was."""
    versions = []
    original = FakeLLM.generate

    def generate(self, *args, **kwargs):
        versions.append(len(self.names) / len(list(self.model.named_parameters())))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(FakeLLM, "generate", generate)
    model = tiny_model()
    model.name_or_path = "some/model"
    options = {"max_steps": 6, "num_iterations": 2, "learning_rate": 1e-2, "bf16": False, "num_sample_prompts": 0}
    history = run(tmp_path, model=model, rollout_engine="auto", use_vllm=True, **options).history
    assert versions == [1, 1, 2, 3], "self-check and first rollout, then after steps 2 and 4, whole models only"
    assert max(row[GAPS[1]] for row in history if GAPS[1] in row) < 1e-4
    assert not any("log_z" in name for name in FakeLLM.last.names)


def test_an_engine_with_older_weights_is_refused(tmp_path, monkeypatch):
    def late(self, version):
        self.weight_version = max(version - 1, 0)

    monkeypatch.setattr(generate.HFGenerateEngine, "sync", late)
    with pytest.raises(RolloutError, match="sampled from the weights of step 0, not of step 1"):
        run(tmp_path)
