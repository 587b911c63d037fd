"""The plugin inside verl: registration, the example configuration, the trainer, the fused forward."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
import transformers as tf
import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from tensordict import TensorDict
from transfer_queue import KVBatchMeta
from verl.models.transformers import monkey_patch
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1 import PPOTrainerSync, get_trainer_cls
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass, validate_config
from verl.utils.import_utils import load_extern_object

from powerflow_fast.errors import ConfigError, ModelError
from powerflow_fast.integrations import verl as plugin
from powerflow_fast.integrations.verl_loss import powerflow_loss
from powerflow_fast.integrations.verl_settings import PowerFlowSettings, check_actor
from powerflow_fast.integrations.verl_trainer import PowerFlowTrainer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "verl"


def example_config(*overrides: str):
    with initialize_config_dir(config_dir=str(EXAMPLE), version_base=None):
        config = compose(config_name="powerflow", overrides=list(overrides))
    return config


def test_verl_finds_the_plugin_by_itself(loaded_by_verl):
    assert loaded_by_verl
    (point,) = (p for p in entry_points(group="verl.plugins") if p.name == "powerflow")
    assert point.load() is plugin
    assert get_trainer_cls("powerflow") is PowerFlowTrainer and issubclass(PowerFlowTrainer, PPOTrainerSync)
    assert get_policy_loss_fn("powerflow") is powerflow_loss
    assert get_adv_estimator_fn("powerflow") is plugin.wants_powerflow_trainer


def test_registration_twice_changes_nothing():
    patched = monkey_patch.patch_forward_with_backends
    plugin.register()
    assert get_trainer_cls("powerflow") is PowerFlowTrainer
    assert monkey_patch.patch_forward_with_backends is patched


def test_another_version_of_verl_is_refused_and_told():
    plugin.check_version(verl.__version__)
    with pytest.raises(ImportError, match=r"verl must be 0\.9\.1, got 0\.10\.0"):
        plugin.check_version("0.10.0")
    # verl swallows what a plugin raises: the warning is what a user sees, and the run ends at the unknown trainer
    code = (
        "import powerflow_fast.integrations.verl_settings, sys, types, logging; logging.basicConfig(); "
        "fake = types.ModuleType('verl'); fake.__version__ = '0.8.0'; sys.modules['verl'] = fake; "
        "import powerflow_fast.integrations.verl"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "WARNING:powerflow_fast.integrations.verl:PowerFlow isn't registered with verl" in done.stderr
    assert "verl must be 0.9.1, got 0.8.0" in done.stderr


def test_the_example_configuration_is_accepted_by_verl_and_by_us():
    config = example_config("powerflow.alpha=0.5", "data.train_batch_size=64", "trainer.n_gpus_per_node=1")
    assert PowerFlowSettings.from_config(config) == PowerFlowSettings(alpha=0.5)
    assert (need_reference_policy(config), need_critic(config)) == (True, False)
    config.actor_rollout_ref.actor.ppo_mini_batch_size = 32
    validate_config(config=config, use_reference_policy=True, use_critic=False)
    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    assert check_actor(actor) == (0.8, 1.2)
    reward = config.reward.custom_reward_function
    score = load_extern_object(reward.path, reward.name)
    assert score(data_source="none", solution_str="x", ground_truth="", extra_info={}) == 0.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.v1.trainer_mode=sync", r"trainer\.v1\.trainer_mode must be 'powerflow', got 'sync'"),
        ("actor_rollout_ref.rollout.top_p=0.9", r"rollout\.top_p must be 1, got 0\.9"),
        ("actor_rollout_ref.actor.kl_loss_coef=0.001", r"kl_loss_coef must be 0, got 0\.001"),
        ("algorithm.rollout_correction.rollout_is=token", r"rollout_is must be null, got 'token'"),
        ("+powerflow.alhpa=2", r"powerflow\.alhpa is unknown; .*did you mean 'alpha'"),
    ],
)
def test_the_trainer_refuses_a_wrong_configuration(override, message):
    with pytest.raises(ConfigError, match=message):
        PowerFlowTrainer(example_config(override))


def test_the_estimator_names_the_trainer_that_is_missing():
    with pytest.raises(ConfigError, match=r"trainer\.v1\.trainer_mode must be 'powerflow'"):
        get_adv_estimator_fn("powerflow")(token_level_rewards=None, response_mask=None, config=None, index=None)
    data = verl.DataProto(batch=TensorDict({"response_mask": torch.ones(2, 3)}, batch_size=2))
    data.batch["token_level_rewards"] = torch.zeros(2, 3)
    with pytest.raises(ConfigError, match=r"trainer\.v1\.trainer_mode must be 'powerflow'"):
        compute_advantage(data, adv_estimator="powerflow")


def test_the_trainer_is_verls_synchronous_one():
    trainer = PowerFlowTrainer(example_config())
    assert trainer.trainer_mode == "sync" and type(trainer.replay_buffer) is ReplayBuffer
    assert trainer.use_reference_policy and not trainer.use_critic


@pytest.fixture(scope="module")
def transfer_queue():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    backend = {"storage_backend": "SimpleStorage", "SimpleStorage": {"num_data_storage_units": 1}}
    tq.init(OmegaConf.create({"backend": backend}))
    yield
    tq.close()
    ray.shutdown()


class Letters:
    """A tokenizer of one letter per token; 0 is the end."""

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(96 + int(i)) for i in ids if i > 0)


def ends_well(prompt, completion):
    assert prompt[-1]["role"] == "user"
    return completion.endswith("z")


def test_the_trainer_writes_the_targets_of_uneven_groups(transfer_queue):
    trainer = PowerFlowTrainer(example_config("powerflow.alpha=4", f"powerflow.format_fn={__name__}.ends_well"))
    trainer.tokenizer = Letters()
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 1, 2, 7, 3, 1]
    uids = ["q1", "q2", "q1", "q2", "q1", "pad"]
    masks = [torch.ones(n, dtype=torch.int64) for n in lengths]
    masks[3][2:4] = 0  # a tool's tokens
    masks[5][:] = 0  # verl's padding
    old, ref = ([-3 * torch.rand(n, generator=generator) for n in lengths] for _ in range(2))
    responses = [torch.randint(1, 26, (n,), generator=generator) for n in lengths]
    for row in (0, 3):
        responses[row][-1] = 26  # z
    keys = [f"{uid}_{row}_0" for row, uid in enumerate(uids)]

    def nested(rows):
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    raw_prompt = np.empty(6, dtype=object)
    raw_prompt[:] = [[{"role": "user", "content": uid}] for uid in uids]
    fields = tu.get_tensordict(
        {
            "uid": np.array(uids, dtype=object),
            "raw_prompt": raw_prompt,
            "responses": nested(responses),
            "response_mask": nested(masks),
            "old_log_probs": nested(old),
            "ref_log_prob": nested(ref),
        }
    )
    tq.kv_batch_put(keys=keys, partition_id="train", fields=fields, tags=[{} for _ in keys])
    batch = KVBatchMeta(partition_id="train", keys=keys, tags=[{} for _ in keys])

    metrics = {}
    trainer._compute_advantage(batch, metrics)
    names = ["advantages", "returns"]
    written = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=names)
    tq.kv_clear(keys=keys, partition_id="train")

    s, r = ([x[m > 0].double().mean() for x, m in zip(rows, masks, strict=True)] for rows in (old, ref))
    psi = [0.0, -0.5, -0.5, 0.0, -0.5]
    value = [4 * (r[i] + psi[i]) for i in range(5)]
    log_z = {q: torch.stack([value[i] - s[i] for i in range(5) if uids[i] == q]).mean() for q in ("q1", "q2")}
    for name in names:
        for i, row in enumerate(written[name].unbind()):
            target = value[i] - log_z[uids[i]] if i < 5 else torch.zeros(()).double()
            torch.testing.assert_close(row.double(), target * masks[i].double(), rtol=0, atol=1e-5, msg=f"{name} {i}")
    assert metrics["powerflow/psi"] == pytest.approx(-0.3)
    assert metrics["powerflow/log_z"] == pytest.approx(float(3 * log_z["q1"] + 2 * log_z["q2"]) / 5, rel=1e-5)
    residual = torch.stack([s[i] - value[i] + log_z[uids[i]] for i in range(5)])
    assert metrics["powerflow/residual_squared"] == pytest.approx(float(residual.square().mean()), rel=1e-4)


SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def tiny(arch: str):
    torch.manual_seed(0)
    if arch == "llama":
        config = tf.LlamaConfig(**SIZES)
    elif arch == "qwen2_tied":
        config = tf.Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, tie_word_embeddings=True)
    elif arch == "gemma2":
        config = tf.Gemma2Config(**SIZES, final_logit_softcapping=3.0, query_pre_attn_scalar=8)
    elif arch == "cohere":
        config = tf.CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.25)
    elif arch == "granite":
        config = tf.GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0)
    elif arch == "phi":
        config = tf.PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    else:
        config = tf.GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)
    return model.eval()


@pytest.fixture
def own_forward():
    """verl patches the class: put its forward back."""
    kept = []

    def keep(model):
        kept.append((type(model), type(model).forward))
        return model

    yield keep
    for cls, forward in reversed(kept):
        cls.forward = forward


def fuse(model):
    apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="powerflow_fast")


@pytest.mark.parametrize("arch", ["llama", "qwen2_tied", "gemma2", "cohere", "granite", "phi"])
def test_the_fused_forward_equals_the_models_logits(arch, own_forward):
    model = own_forward(tiny(arch))
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(2, 9, generator=torch.Generator().manual_seed(2))
    exact = tiny(arch).double()
    logp = (exact(input_ids=ids, use_cache=False).logits.double() / 0.7).log_softmax(-1)
    expected = logp.gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
    (expected * upstream).sum().backward()
    entropy = -(logp.exp() * logp).sum(-1).detach()

    fuse(model)
    out = model(input_ids=ids, temperature=0.7, return_dict=True, use_cache=False)
    assert out.logits is None and out.entropy is None and out.log_probs.dtype == torch.float32
    torch.testing.assert_close(out.log_probs.double(), expected, rtol=0, atol=3e-5)
    (out.log_probs * upstream).sum().backward()
    gradients = dict(exact.named_parameters())
    for name, parameter in model.named_parameters():
        want = gradients[name].grad
        torch.testing.assert_close(
            parameter.grad.double(), want, rtol=0, atol=1e-4 * float(want.abs().max()) + 1e-6, msg=name
        )
    shifted = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        out = model(input_ids=ids, shift_labels=shifted, temperature=0.7, return_dict=True, use_cache=False)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=0, atol=3e-5)
    torch.testing.assert_close(
        out.log_probs.double(), logp.gather(-1, shifted[..., None])[..., 0].detach(), rtol=0, atol=3e-5
    )


def test_an_adapter_and_the_model_without_it(own_forward):
    """LoRA: the actor is the model with its adapter, the reference the same model without."""
    ids = torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    base = own_forward(tiny("llama"))
    fuse(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    merged = copy.deepcopy(model).merge_and_unload()
    for exact, context in ((merged, contextlib.nullcontext), (tiny("llama"), model.disable_adapter)):
        logits = tf.LlamaForCausalLM._powerflow_fast_own_forward(exact, input_ids=ids, use_cache=False).logits
        expected = logits.double().log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])[..., 0]
        with context():
            out = model(input_ids=ids, return_dict=True, use_cache=False)
        torch.testing.assert_close(out.log_probs.double(), expected, rtol=0, atol=3e-5)
    model(input_ids=ids, return_dict=True, use_cache=False).log_probs.sum().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    with pytest.raises(TypeError, match=r"fused_forward: further inputs must be among .*, got logits_to_keep"):
        model(input_ids=ids, return_dict=True, logits_to_keep=1)


def test_a_model_on_the_meta_device_can_be_patched(own_forward):
    with torch.device("meta"):
        model = own_forward(tf.AutoModelForCausalLM.from_config(tf.CohereConfig(**SIZES, logit_scale=0.25)))
    fuse(model)
    assert model._powerflow_fast_logits == {"logit_scale": pytest.approx(0.25), "logit_softcap": None}


def test_models_that_cannot_be_fused_are_refused(own_forward):
    with pytest.raises(ModelError, match=r"needs a decoder in GPT2LMHeadModel\.model .*, got NoneType and Linear"):
        monkey_patch.patch_forward_with_backends(own_forward(tiny("gpt2")), True, "powerflow_fast")
    model = own_forward(tiny("llama"))
    model.config.model_type = "qwen3_vl"
    with pytest.raises(ModelError, match=r"must be used with a text model, got LlamaForCausalLM \(qwen3_vl\)"):
        monkey_patch.patch_forward_with_backends(model, True, "powerflow_fast")
    model = own_forward(tiny("llama"))
    fuse(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ModelError, match=r"the head of LlamaForCausalLM must be a plain nn\.Linear, got Sequential"):
        model(input_ids=torch.ones(1, 3, dtype=torch.long), return_dict=True)


def test_verls_own_backends_still_work(own_forward):
    model = own_forward(tiny("llama"))
    ids = torch.randint(1, 61, (1, 9), generator=torch.Generator().manual_seed(1))
    expected = model(input_ids=ids, use_cache=False).logits.log_softmax(-1).gather(-1, ids.roll(-1, 1)[..., None])
    apply_monkey_patch(model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend="torch")
    out = model(input_ids=ids, return_dict=True, use_cache=False)
    torch.testing.assert_close(out.log_probs, expected[..., 0], rtol=0, atol=1e-5)
