"""Training on other objectives, rewards, samplers and earlier samples than the default's."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from runs import Killed, kill_after, run, same, weights
from test_update import CUTS, everything, padded_in_one, samples_for, updater
from tiny import EOS, one_thread, tiny_model  # noqa: F401

from powerflow_fast.errors import CheckpointError, ConfigError, RolloutError
from powerflow_fast.objectives import OBJECTIVES, Trajectories, resolve_objective
from powerflow_fast.rewards import REWARDS
from powerflow_fast.rollout import Rollout
from powerflow_fast.training import run as training_run

OPTIONS = {"alpha": 2.0, "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 2, "log_z": "group"}


def vowels(prompt, completion, **columns):
    return sum(c in "aeiou" for c in completion) / 6


# Every objective through the trainer


@pytest.mark.parametrize("log_z", ["learned", "group"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains(tmp_path, name, log_z):
    options = {"reward_fn": vowels} if OBJECTIVES[name].needs_rewards else {}
    result = run(tmp_path, objective=name, **{**OPTIONS, "log_z": log_z}, **options)
    last = result.history[-1]
    assert last["loss"] == last["loss"] and not same(weights(result.model), weights(tiny_model()))
    learned = OBJECTIVES[name].partition is not None and log_z == "learned"
    assert (tmp_path / "run" / "log_z_head.safetensors").exists() is learned
    assert ("log_z" in last) is (OBJECTIVES[name].partition is not None or name == "log_variance_tb")
    assert ("reward" in last) is OBJECTIVES[name].needs_rewards


@pytest.mark.parametrize("cut", ["packed, 45 tokens", "packed, 29 tokens", "packed, 2 sequences"])
@pytest.mark.parametrize(
    ("name", "options", "log_z"),
    [
        ("grpo", {"aggregation": "dapo", "kl_coefficient": 0.1}, "group"),
        ("grpo", {"aggregation": "sequence"}, "group"),
        ("flowrl", {}, "learned"),  # a learned log Z and a group's statistics
        ("subtb", {"lam": 0.8}, "group"),
        ("rl_token", {}, "group"),
    ],
)
@pytest.mark.parametrize("on_policy", [True, False])
def test_no_cut_shows_in_other_objectives(monkeypatch, cut, name, options, log_z, on_policy):
    """Groups that no micro-batch holds get their gradient through the step's log-probs."""
    objective = resolve_objective(name, options)

    def made(**cuts):
        ready = updater("llama", log_z=log_z, objective=objective, **cuts)
        original = samples_for(ready)
        original.rewards = torch.linspace(-1, 1, 12).sin()
        monkeypatch.setattr("test_update.samples_for", lambda _: original)
        return everything(ready, on_policy)

    want, got = made(), made(**CUTS[cut])
    assert got.keys() == want.keys()
    for key, value in want.items():
        scale = max(1.0, float(value.abs().max()))
        assert float((got[key] - value).abs().max()) <= 1e-5 * scale, key


def test_the_default_is_la_tb():
    want = padded_in_one("llama", "group", False)
    got = everything(updater("llama", log_z="group", objective=resolve_objective("la_tb")), False)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_a_function_of_trajectories_is_an_objective(tmp_path):
    seen = []

    def sharpen(trajectories):
        """E[-2 s ∇s]: REINFORCE with s as the reward, which lowers the entropy."""
        seen.append(trajectories)
        return -trajectories.sequence_mean(trajectories.means(trajectories.logps).square())

    options = {**OPTIONS, "max_steps": 30, "learning_rate": 1e-2, "per_device_train_batch_size": 32}
    result = run(tmp_path, objective=sharpen, **options)
    assert result.history[-1]["entropy"] < result.history[0]["entropy"] - 0.3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["objective"].endswith("sharpen")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "sharpen" in card and "LA-TB" not in card and "la-tb" not in card
    assert (tmp_path / "run" / "history.png").is_file(), "a loss is all that is needed"
    assert seen[0].alpha == 2.0 and seen[0].group_ids is not None and seen[0].log_z is None


def test_old_log_probs_are_there_for_those_who_need_them(tmp_path):
    ratios = []

    def surrogate(trajectories):
        ratios.append((trajectories.logps - trajectories.old_logps).exp().detach())
        return -trajectories.token_mean(
            (trajectories.logps - trajectories.old_logps).exp() * trajectories.logps.detach()
        )

    surrogate.needs_old_logps = True
    run(tmp_path, objective=surrogate, **OPTIONS)
    assert len(ratios) == 2 and all(torch.allclose(r, torch.ones_like(r), atol=1e-5) for r in ratios)
    objective = resolve_objective(surrogate)
    with pytest.raises(ValueError, match="objective 'surrogate' needs old_logps"):
        offsets = torch.tensor([0, 2], dtype=torch.int32)
        objective(Trajectories(logps=torch.zeros(2), base_logps=torch.zeros(2), cu_seqlens=offsets))


# Rewards


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_by_name(tmp_path, name):
    result = run(tmp_path, objective="grpo", reward=name, **OPTIONS)
    assert all(row["reward"] == row["reward"] for row in result.history)


def test_confidence_rewards_see_the_policy(tmp_path, monkeypatch):
    """RENT's is minus the entropy that the first step logs."""
    result = run(tmp_path, objective="grpo", reward="rent", **{**OPTIONS, "max_steps": 1, "max_completion_length": 1})
    assert result.history[0]["reward"] == pytest.approx(-result.history[0]["entropy"], rel=1e-5)


def test_several_rewards_are_weighted(tmp_path):
    def one(prompts, completions, **columns):
        return [1.0] * len(completions)

    result = run(tmp_path, objective="grpo", reward_fn=[one, one], reward_weights=[0.5, 2.0], **OPTIONS)
    assert result.history[0]["reward"] == 2.5 and result.history[0]["advantage_abs"] == 0


def test_supervised_grpo_raises_the_reward(tmp_path):
    options = {
        **OPTIONS,
        "max_steps": 25,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 16,
        "num_generations": 16,
    }
    result = run(tmp_path, objective="grpo", reward_fn=vowels, **options)
    rewards = [row["reward"] for row in result.history]
    assert sum(rewards[-5:]) > 1.3 * sum(rewards[:5])


# Off-policy


class Recorded:
    """Another sampler: always the same completion, and what it says of its log-prob."""

    name, logps_are_free = "recorded", True

    def __init__(self, logp=-3.0):
        self.logp, self.version = logp, None

    def sync(self, version):
        self.version = version

    def generate(self, prompts, *, seed, max_completion_length=None, return_logps=False):
        ids = [[5, 6, EOS] for _ in prompts]
        logps = None if self.logp is None else [[self.logp] * 3 for _ in prompts]
        return Rollout([list(p) for p in prompts], ids, [True] * len(ids), logps, self.version)


def test_an_external_samplers_log_probs_make_the_ratio(tmp_path):
    wide = {**OPTIONS, "importance_clip": (0.0, 1e9), "per_device_train_batch_size": 4}
    row = run(tmp_path, prompts=["one "], engine=Recorded(), num_sample_prompts=0, **wide).history[0]
    assert row["importance_weight"] == pytest.approx(math.exp(row["policy_logp"] * 3 + 9.0), rel=1e-4)
    assert row["importance_weight"] != 1.0 and "rollout_logp_gap_max" not in row
    with pytest.raises(RolloutError, match="recorded engine gave no log-probs"):
        run(tmp_path, name="none", engine=Recorded(None), num_sample_prompts=0, **OPTIONS)


def test_a_rollout_temperature_is_made_up_for_exactly(tmp_path, monkeypatch):
    seen = []
    original = training_run.Updater.gradient

    def gradient(self, samples, *, on_policy, need_entropy):
        policy = [self.score_policy(samples, temperature=t).logps for t in (0.9, 1.7)]
        seen.append((on_policy, samples.old_logps, *policy))
        return original(self, samples, on_policy=on_policy, need_entropy=need_entropy)

    monkeypatch.setattr(training_run.Updater, "gradient", gradient)
    run(tmp_path, temperature=0.9, rollout_temperature=1.7, **OPTIONS)
    for on_policy, old, at_scores, at_sampling in seen:
        assert not on_policy and torch.equal(old, at_sampling) and not torch.allclose(old, at_scores, atol=1e-2)


# Earlier samples, running log Z


@pytest.mark.parametrize("options", [{"log_z": "table"}, {"log_z": "group", "replay_steps": 2, "replay_capacity": 5}])
def test_buffer_and_table_resume_with_the_same_bits(tmp_path, options):
    options = {**OPTIONS, "max_steps": 7, "save_steps": 1, "num_sample_prompts": 1, **options}
    whole = run(tmp_path, name="whole", **options)
    for step in (2, 5):
        with pytest.raises(Killed):
            run(tmp_path, name="cut", callbacks=[kill_after(step)], resume_from_checkpoint=step > 2, **options)
    resumed = run(tmp_path, name="cut", resume_from_checkpoint=True, **options)
    assert same(weights(resumed.model), weights(whole.model))


def test_replayed_steps_follow_fresh_ones(tmp_path, monkeypatch):
    seen = []
    original = training_run.Updater.gradient

    def gradient(self, samples, *, on_policy, need_entropy):
        seen.append((on_policy, samples.old_logps is not None, len(samples)))
        return original(self, samples, on_policy=on_policy, need_entropy=need_entropy)

    monkeypatch.setattr(training_run.Updater, "gradient", gradient)
    rows = run(tmp_path, replay_steps=2, **{**OPTIONS, "max_steps": 6}).history
    assert seen == [(True, True, 8), (False, True, 8), (False, True, 8)] * 2
    assert rows[0]["importance_weight"] == 1 and rows[1]["importance_weight"] != 1


def test_the_table_is_read_before_it_is_updated(tmp_path, monkeypatch):
    """Two prompts, one per step: the first visit takes the group's own value, the next the running mean."""
    prompts = ["one "]
    options = {**OPTIONS, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 1e-12}
    group = run(tmp_path, prompts=prompts, name="group", **options).history
    table = run(tmp_path, prompts=prompts, name="table", **{**options, "log_z": "table", "log_z_momentum": 0.5}).history
    own = [row["log_z"] for row in group]
    want = [own[0], own[0], 0.5 * (own[0] + own[1])]
    assert [row["log_z"] for row in table] == pytest.approx(want, rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "tbb"}, r"objective must be one of .*'tb'.*got 'tbb'; did you mean 'tb'"),
        ({"objective": "subtb", "objective_options": {"lambda": 1}}, r"subtb has the options 'lam'"),
        ({"objective": "subtb", "objective_options": {"lam": -1.0}}, r"lam must be >= 0"),
        ({"objective": "grpo"}, r"objective='grpo' needs rewards: pass reward_fn, or reward as one of .*ttrl"),
        ({"objective": "grpo", "reward": "tttrl"}, r"reward must be .*did you mean 'ttrl'"),
        ({"objective": "grpo", "reward": "ttrl", "reward_fn": vowels}, r"both given"),
        (
            {"objective": "grpo", "reward": "rent", "num_generations": 1, "log_z": "learned"},
            r"num_generations must be >= 2",
        ),
        ({"objective": "grpo", "reward": "rent", "log_z": "table"}, r"log_z='table' needs a log-partition"),
        ({"log_z": "table", "num_generations": 1}, r"num_generations must be >= 2 with log_z='table'"),
        ({"replay_steps": 1, "replay_prioritized": True}, r"replay_prioritized=True needs rewards"),
        (
            {"reward": "rent", "reward_weights": [1.0, 2.0], "objective": "grpo"},
            r"reward_weights must be a list with one",
        ),
    ],
)
def test_contradictions_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, **{**OPTIONS, **options})
    assert not (tmp_path / "run").exists()


def test_functions_that_are_no_objectives_are_refused(tmp_path):
    class Objective:
        def __call__(self, trajectories):
            return trajectories.logps.sum()

    for objective, message in (
        (Objective, "must be a function or an instance, got the class Objective"),
        (lambda: 0.0, "'<lambda>' must take Trajectories as its first argument"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, objective=objective, **OPTIONS)
    with pytest.raises(ValueError, match="must return a loss that depends on logps"):
        run(tmp_path, objective=lambda t: t.logps.detach().sum(), **OPTIONS)


def test_a_run_without_a_finite_step_says_so(tmp_path, caplog):
    result = run(tmp_path, objective=lambda t: t.logps.sum() * float("nan"), **OPTIONS)
    assert "no step of this run was finite" in caplog.text
    assert same(weights(result.model), weights(tiny_model()))


def test_a_reward_that_nothing_takes_is_said_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert "reward" in run(tmp_path, reward_fn=vowels, **OPTIONS).history[0]
    assert "objective 'la_tb' takes no reward" in caplog.text


def test_checkpoints_of_other_rewards_are_refused(tmp_path):
    options = {**OPTIONS, "objective": "grpo", "save_steps": 1}
    run(tmp_path, reward_fn=vowels, **options)
    with pytest.raises(CheckpointError, match="rewards"):
        run(tmp_path, reward="rent", resume_from_checkpoint=True, **{**options, "max_steps": 3})
