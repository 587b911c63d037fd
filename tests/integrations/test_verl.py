"""The parts of the verl plugin that need no verl: its settings, its targets and its loss.

tests/integrations_verl has the rest, against verl itself.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from powerflow_fast.errors import ConfigError
from powerflow_fast.integrations.verl_loss import powerflow_loss, powerflow_targets
from powerflow_fast.integrations.verl_settings import PowerFlowSettings
from powerflow_fast.rewards import boxed_answer

CONFIG = {
    "trainer": {"use_v1": True, "v1": {"trainer_mode": "powerflow"}},
    "algorithm": {
        "adv_estimator": "powerflow",
        "use_kl_in_reward": False,
        "use_pf_ppo": False,
        "filter_groups": {"enable": False},
        "rollout_correction": {"bypass_mode": False, "rollout_is": None, "rollout_rs": None},
    },
    "critic": {"enable": None},
    "distillation": {"enabled": False},
    "actor_rollout_ref": {
        "actor": {
            "strategy": "fsdp",
            "policy_loss": {"loss_mode": "powerflow"},
            "use_kl_loss": True,
            "kl_loss_coef": 0.0,
            "entropy_coeff": 0,
            "clip_ratio": 0.3,
            "clip_ratio_low": 0.2,
            "clip_ratio_high": 0.25,
        },
        "rollout": {"n": 4, "temperature": 0.8, "top_p": 1.0, "top_k": -1, "do_sample": True},
        "model": {"use_fused_kernels": True, "fused_kernel_options": {"impl_backend": "powerflow_fast"}},
    },
    "powerflow": {"alpha": 4},
}


def changed(key: str, value) -> dict:
    config = copy.deepcopy(CONFIG)
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node.setdefault(part, {})
    if value is KeyError:
        node.pop(last)
    else:
        node[last] = value
    return config


def actor_config(**global_batch_info):
    return {**copy.deepcopy(CONFIG["actor_rollout_ref"]["actor"]), "global_batch_info": global_batch_info}


def test_the_library_does_not_import_verl():
    code = "import sys, powerflow_fast, powerflow_fast.integrations; print('verl' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_settings_of_a_good_configuration():
    assert PowerFlowSettings.from_config(CONFIG) == PowerFlowSettings(alpha=4.0, format_fn=None, format_penalty=-0.5)
    section = {"alpha": 0.5, "format_fn": "powerflow_fast.rewards.boxed_answer", "format_penalty": -2}
    settings = PowerFlowSettings.from_config(changed("powerflow", section))
    assert settings == PowerFlowSettings(alpha=0.5, format_fn=boxed_answer, format_penalty=-2.0)
    assert (
        PowerFlowSettings.from_config(changed("powerflow", {"alpha": 1, "format_fn": "boxed"})).format_fn
        is boxed_answer
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("powerflow", KeyError, r"powerflow must be a section with alpha .*, got None"),
        ("powerflow.alpha", KeyError, r"powerflow\.alpha must be a finite number > 0, got None"),
        ("powerflow.alpha", 0, r"powerflow\.alpha must be a finite number > 0, got 0"),
        ("powerflow.alpha", float("nan"), r"powerflow\.alpha must be .* got nan"),
        ("powerflow.alpha", True, r"powerflow\.alpha must be .* got True"),
        ("powerflow.alpha", "4", r"powerflow\.alpha must be .* got '4'"),
        ("powerflow.alhpa", 4, r"powerflow\.alhpa is unknown; expected alpha, .*did you mean 'alpha'"),
        ("powerflow.format_penalty", 0.5, r"powerflow\.format_penalty must be a finite number <= 0, got 0\.5"),
        ("powerflow.format_fn", "bxed", r"powerflow\.format_fn must be one of boxed, or module\.function, got 'bxed'"),
        ("powerflow.format_fn", "powerflow_fast.rewards.formats.none", r"powerflow\.format_fn must be an importable"),
        ("powerflow.format_fn", "no_such_module.f", r"powerflow\.format_fn must be an importable"),
        ("powerflow.format_fn", "powerflow_fast.rewards.formats.FORMATS", r"powerflow\.format_fn must be a function"),
        ("trainer.use_v1", False, r"trainer\.use_v1 must be True, got False"),
        ("trainer.v1.trainer_mode", "sync", r"trainer\.v1\.trainer_mode must be 'powerflow', got 'sync'"),
        ("algorithm.adv_estimator", "grpo", r"algorithm\.adv_estimator must be 'powerflow', got 'grpo'"),
        ("algorithm.use_kl_in_reward", True, r"algorithm\.use_kl_in_reward must be False, got True"),
        ("algorithm.use_pf_ppo", True, r"algorithm\.use_pf_ppo must be false, got True"),
        ("algorithm.filter_groups.enable", True, r"algorithm\.filter_groups\.enable must be false, got True"),
        ("algorithm.rollout_correction.bypass_mode", True, r"bypass_mode must be false, got True"),
        ("algorithm.rollout_correction.rollout_is", "token", r"rollout_is must be null, got 'token'"),
        ("algorithm.rollout_correction.rollout_rs", "sequence", r"rollout_rs must be null, got 'sequence'"),
        ("critic.enable", True, r"critic\.enable must be false, got True"),
        ("distillation.enabled", True, r"distillation\.enabled must be false, got True"),
        ("actor_rollout_ref.actor.policy_loss.loss_mode", "vanilla", r"loss_mode must be 'powerflow', got 'vanilla'"),
        ("actor_rollout_ref.actor.use_kl_loss", False, r"actor\.use_kl_loss must be True, got False"),
        ("actor_rollout_ref.actor.kl_loss_coef", 0.001, r"actor\.kl_loss_coef must be 0, got 0\.001"),
        ("actor_rollout_ref.actor.entropy_coeff", 0.01, r"actor\.entropy_coeff must be 0, got 0\.01"),
        (
            "actor_rollout_ref.actor.clip_ratio_low",
            1.5,
            r"clip_ratio_low must be a number in \[0, 1\], got 1\.5",
        ),
        ("actor_rollout_ref.actor.clip_ratio_high", -0.1, r"actor\.clip_ratio_high must be .* >= 0, got -0\.1"),
        ("actor_rollout_ref.actor.strategy", "megatron", r"actor\.strategy must be 'fsdp' or 'fsdp2', got 'megatron'"),
        ("actor_rollout_ref.rollout.n", 1, r"rollout\.n must be an int >= 2, got 1"),
        ("actor_rollout_ref.rollout.top_p", 0.95, r"rollout\.top_p must be 1, got 0\.95"),
        ("actor_rollout_ref.rollout.top_k", 20, r"rollout\.top_k must be -1, got 20"),
        ("actor_rollout_ref.rollout.do_sample", False, r"rollout\.do_sample must be True, got False"),
        ("actor_rollout_ref.rollout.temperature", 0, r"rollout\.temperature must be a finite number > 0, got 0"),
        ("actor_rollout_ref.rollout.repetition_penalty", 1.1, r"rollout\.repetition_penalty must be 1, got 1\.1"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(key, value, message):
    with pytest.raises(ConfigError, match=message):
        PowerFlowSettings.from_config(changed(key, value))


@pytest.fixture
def step():
    """Seven completions of three prompts, one of them verl's padding: lengths 3, 1, 6, 0 (padding), 2, 5, 4."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    mask = (torch.arange(7)[None] < lengths[:, None]).long()
    mask[2, 2] = 0  # a tool's token, say: inside the response and not the policy's

    def logps():
        return -torch.rand(7, 7, generator=generator) * 3 * mask + 9.0 * (1 - mask)  # junk where the mask is 0

    old, ref = logps(), logps()
    new = old + 0.1 * torch.randn(7, 7, generator=generator)
    new[0] += 0.2  # past the upper clip
    new[5] -= 0.2  # past the lower clip
    groups = torch.tensor([11, 5, 11, 99, 5, 11, 5])
    psi = torch.tensor([0.0, -0.5, 0.0, 0.0, 0.0, -0.5, 0.0])
    return {"mask": mask, "old": old, "ref": ref, "new": new, "groups": groups, "psi": psi}


def oracle_target(step, alpha):
    """(B,) fp64 targets, with loops."""
    mask, old, ref, psi = (step[k].double() for k in ("mask", "old", "ref", "psi"))
    target, log_z = torch.zeros(len(mask)).double(), torch.zeros(len(mask)).double()
    rows = [i for i in range(len(mask)) if mask[i].sum() > 0]
    s, r = ({i: (x[i] * mask[i]).sum() / mask[i].sum() for i in rows} for x in (old, ref))
    for i in rows:
        group = [j for j in rows if step["groups"][j] == step["groups"][i]]
        log_z[i] = sum(alpha * (r[j] + psi[j]) - s[j] for j in group) / len(group)
        target[i] = alpha * (r[i] + psi[i]) - log_z[i]
    return target, log_z


def oracle_loss(step, target, new, *, low=0.8, high=1.25, divisor):
    mask, old = step["mask"].double(), step["old"].double()
    total = new.sum() * 0
    for i in range(len(mask)):
        length = mask[i].sum()
        if length > 0:
            logp = (new[i] * mask[i]).sum()
            weight = (logp.detach() - (old[i] * mask[i]).sum()).exp().clamp(low, high)
            total = total + weight * (logp / length - target[i]) ** 2
    return total / divisor


@pytest.mark.parametrize("alpha", [0.5, 4.0])
def test_targets_equal_the_oracle(step, alpha):
    out = powerflow_targets(*(step[k] for k in ("old", "ref", "mask", "groups")), alpha=alpha, psi=step["psi"])
    target, log_z = oracle_target(step, alpha)
    torch.testing.assert_close(out.target.double(), target, rtol=0, atol=3e-6)
    torch.testing.assert_close(out.log_z.double(), log_z, rtol=0, atol=3e-6)
    residual = out.logp_mean - out.target
    for group in (11, 5):  # log Z' is the value that centres the residuals of a prompt
        assert abs(float(residual[step["groups"] == group].mean())) < 1e-6
    assert (out.target[3], out.log_z[3], out.logp_mean[3], out.base_mean[3]) == (0, 0, 0, 0)


def loss_of(step, target, new, rows=slice(None), **info):
    advantages = target[:, None].to(new.dtype) * step["mask"]
    tensors = (step["old"].to(new.dtype), new, advantages, step["mask"])
    return powerflow_loss(*(t[rows] for t in tensors), config=actor_config(**info))


def test_loss_and_gradient_equal_the_oracle(step):
    target, _ = oracle_target(step, 4.0)
    exact = step["new"].double().requires_grad_()
    expected = oracle_loss(step, target, exact, divisor=6)
    expected.backward()
    new = step["new"].clone().requires_grad_()
    loss, metrics = loss_of(step, target, new, global_batch_size=6)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(new.grad.double(), exact.grad, rtol=0, atol=2e-6 * float(exact.grad.abs().max()))
    assert (new.grad[step["mask"] == 0] == 0).all()
    counted = step["mask"].sum(-1) > 0
    ratio = ((step["new"] - step["old"]).double() * step["mask"]).sum(-1).exp()[counted]
    clipped = (ratio < 0.8) | (ratio > 1.25)
    assert 0 < clipped.sum() < 6
    assert metrics["actor/powerflow/weight_clipped"] == pytest.approx(float(clipped.double().mean()))
    assert metrics["actor/powerflow/weight"] == pytest.approx(float(ratio.clamp(0.8, 1.25).mean()), rel=1e-5)
    length = step["mask"].sum(-1).clamp(min=1)
    delta = ((step["new"] * step["mask"]).sum(-1) / length).double() - target
    assert metrics["actor/powerflow/delta_abs"] == pytest.approx(float(delta[counted].abs().mean()), rel=1e-5)
    assert metrics["actor/powerflow/delta_squared"] == pytest.approx(float(delta[counted].square().mean()), rel=1e-5)


def test_the_split_of_a_step_leaves_its_loss_and_gradient(step):
    """Micro-batches on each of two data-parallel ranks: gradients add up in a rank, ranks are averaged (FSDP)."""
    target, _ = oracle_target(step, 4.0)
    whole = step["new"].double().requires_grad_()
    expected, _ = loss_of(step, target, whole, global_batch_size=7, dp_size=1)
    expected.backward()
    split = step["new"].double().requires_grad_()
    ranks = ([[0, 1], [2, 3]], [[4, 5, 6]])
    total = 0.0
    for micro_batches in ranks:
        for rows in micro_batches:
            loss, _ = loss_of(step, target, split, rows, global_batch_size=7, dp_size=2)
            (loss / len(ranks)).backward()
            total += float(loss.detach()) / len(ranks)
    assert total == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-12, atol=0)


def test_without_a_batch_size_the_mean_is_over_the_completions_of_the_call(step):
    target, _ = oracle_target(step, 4.0)
    loss, _ = loss_of(step, target, step["new"].double())
    assert float(loss) == pytest.approx(float(oracle_loss(step, target, step["new"].double(), divisor=6)), rel=1e-12)
    with pytest.raises(ConfigError, match=r"global_batch_size is needed with dp_size=2, got None"):
        loss_of(step, target, step["new"], dp_size=2)


def test_a_micro_batch_of_padding_alone_gives_zero(step):
    new = step["new"].clone().requires_grad_()
    loss, metrics = loss_of(step, torch.zeros(7), new, [3], global_batch_size=4, dp_size=2)
    loss.backward()
    assert float(loss.detach()) == 0 and (new.grad == 0).all()
    assert set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("use_kl_loss", False, r"actor_rollout_ref\.actor\.use_kl_loss must be True, got False"),
        ("kl_loss_coef", 0.1, r"actor_rollout_ref\.actor\.kl_loss_coef must be 0, got 0\.1"),
        ("entropy_coeff", 0.1, r"actor_rollout_ref\.actor\.entropy_coeff must be 0, got 0\.1"),
    ],
)
def test_the_loss_refuses_another_trainers_configuration(step, key, value, message):
    config = {**actor_config(global_batch_size=7), key: value}
    tensors = (step["old"], step["new"], step["old"], step["mask"])
    with pytest.raises(ConfigError, match=message):
        powerflow_loss(*tensors, config=config)


def test_wrong_tensors_are_named(step):
    config, old, new, mask = actor_config(), step["old"], step["new"], step["mask"]
    with pytest.raises(ConfigError, match="config must be verl's ActorConfig, got None"):
        powerflow_loss(old, new, old, mask)
    with pytest.raises(ConfigError, match="rollout_is_weights must be None"):
        powerflow_loss(old, new, old, mask, config=config, rollout_is_weights=old)
    with pytest.raises(TypeError, match=r"log_prob must be torch.float32 or torch.float64, got torch.bfloat16"):
        powerflow_loss(old, new.bfloat16(), old, mask, config=config)
    with pytest.raises(ValueError, match=r"advantages must have shape \(B, T\)=\(7, 7\), got \(7,\)"):
        powerflow_loss(old, new, old[:, 0], mask, config=config)
    with pytest.raises(TypeError, match=r"response_mask must be .*, got torch.float32"):
        powerflow_loss(old, new, old, mask.float(), config=config)
    with pytest.raises(TypeError, match=r"powerflow_targets: ref_log_prob must be torch.float32, got torch.float64"):
        powerflow_targets(old, step["ref"].double(), mask, step["groups"], alpha=4.0)
    with pytest.raises(ValueError, match=r"alpha must be finite and > 0, got -1"):
        powerflow_targets(old, step["ref"], mask, step["groups"], alpha=-1.0)
