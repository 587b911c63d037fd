"""A step of PowerFlow through verl's own worker code: engine, micro-batches, ppo_loss. On a CPU, with a plain model.

What is missing of a real worker: the sharded module (a plain Hugging Face model stands in) and the GPU.
"""

from __future__ import annotations

import types
from functools import partial

import pytest
import torch
import transformers as tf
from tensordict import TensorDict
from verl.models.transformers.monkey_patch import apply_monkey_patch
from verl.utils import tensordict_utils as tu
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested, response_to_nested

from powerflow_fast.integrations.verl_loss import powerflow_targets

VOCAB, ALPHA, TEMPERATURE = 61, 4.0, 0.7
PROMPTS, RESPONSES = [3, 3, 5, 5], [6, 1, 4, 7]
GROUPS = torch.tensor([0, 0, 1, 1])


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    store = tmp_path_factory.mktemp("gloo") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def cpu_device(monkeypatch):
    """verl takes a machine without an accelerator for one with CUDA."""
    monkeypatch.setattr(transformer_impl, "get_device_id", lambda: "cpu")
    monkeypatch.setattr(transformer_impl, "get_device_name", lambda: "cpu")


@pytest.fixture(autouse=True)
def unpatched_class():
    forward = tf.LlamaForCausalLM.forward
    yield
    tf.LlamaForCausalLM.forward = forward


def tiny_llama(seed: int):
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attn_implementation="sdpa",
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.5)
    return model.eval()


def engine_for(model, backend: str | None) -> FSDPEngineWithLMHead:
    """verl's engine without its set-up, which needs an accelerator; ``backend``: of the fused kernels, None: logits."""
    engine = object.__new__(FSDPEngineWithLMHead)
    engine.module = model
    engine.pad_to_length = False
    engine.use_ulysses_sp, engine.ulysses_sequence_parallel_size, engine.ulysses_device_mesh = False, 1, None
    engine._autocast_dtype = torch.float32
    engine.engine_config = types.SimpleNamespace(
        entropy_checkpointing=False,
        entropy_from_logits_with_chunking=False,
        use_no_sync_for_gradient_accumulation=False,
    )
    engine.compute_entropy_from_logits = transformer_impl.verl_F.entropy_from_logits
    engine.model_config = types.SimpleNamespace(fused_kernel_options={"impl_backend": backend})
    apply_monkey_patch(
        model, use_remove_padding=False, use_fused_kernels=backend is not None, fused_kernels_backend=backend
    )
    return engine


def rollouts() -> TensorDict:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, VOCAB, (n,), generator=generator) for n in PROMPTS]
    responses = [torch.randint(4, VOCAB, (n,), generator=generator) for n in RESPONSES]

    def nested(tensors):
        return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)

    lengths = [p + r for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    return TensorDict(
        {
            "prompts": nested(prompts),
            "responses": nested(responses),
            "input_ids": nested([torch.cat(pair) for pair in zip(prompts, responses, strict=True)]),
            "position_ids": nested([torch.arange(n) for n in lengths]),
            "response_mask": nested([torch.ones(n, dtype=torch.int64) for n in RESPONSES]),
            "loss_mask": nested([torch.ones(n, dtype=torch.int64) for n in RESPONSES]),
        },
        batch_size=4,
    )


def prepared(data: TensorDict, *, fused: bool, rmpad: bool, micro: int, **more) -> TensorDict:
    data = data.copy()
    tu.assign_non_tensor(
        data,
        temperature=TEMPERATURE,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=micro,
        use_remove_padding=rmpad,
        use_fused_kernels=fused,
        global_batch_size=4,
        **more,
    )
    return data


def infer(engine, data, *, entropy: bool, **how) -> TensorDict:
    with torch.no_grad():
        output = engine.forward_backward_batch(
            prepared(data, calculate_entropy=entropy, **how), loss_function=None, forward_only=True
        )
    return output["model_output"]


def exact_logprobs(model, data) -> list[torch.Tensor]:
    """Per completion: the log-probs of its tokens from fp64 logits, one sequence at a time."""
    rows = []
    for ids, prompt in zip(data["input_ids"].unbind(), PROMPTS, strict=True):
        logits = model(input_ids=ids[None], use_cache=False).logits[0].double() / TEMPERATURE
        rows.append(logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None])[prompt - 1 :, 0])
    return rows


def actor_config() -> FSDPActorConfig:
    return FSDPActorConfig(
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=PolicyLossConfig(loss_mode="powerflow"),
        use_kl_loss=True,
        kl_loss_coef=0.0,
        clip_ratio_low=0.1,
        clip_ratio_high=0.3,
    )


@pytest.mark.parametrize("rmpad", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("backend", ["powerflow_fast", None], ids=["fused", "logits"])
def test_a_step_through_the_engine_equals_the_oracle(backend, rmpad):
    data = rollouts()
    actor, ref = tiny_llama(0).double(), tiny_llama(1).double()
    exact_old = [row.detach() for row in exact_logprobs(actor, data)]
    exact_ref = [row.detach() for row in exact_logprobs(ref, data)]
    torch.manual_seed(2)
    with torch.no_grad():  # an update later: the importance weights are no longer 1
        for parameter in actor.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    new = exact_logprobs(actor, data)
    s, r = (torch.stack([row.mean() for row in rows]) for rows in (exact_old, exact_ref))
    log_z = (ALPHA * r - s).view(2, 2).mean(1)[GROUPS]
    weight = torch.stack([(n.detach().sum() - o.sum()).exp() for n, o in zip(new, exact_old, strict=True)])
    assert (weight > 1.3).any() or (weight < 0.9).any()  # some are clipped
    delta = log_z + torch.stack([row.mean() for row in new]) - ALPHA * r
    expected = (weight.clamp(0.9, 1.3) * delta.square()).mean()
    expected.backward()
    exact_gradient = {name: p.grad.clone() for name, p in actor.named_parameters()}

    how = {"fused": backend is not None, "rmpad": rmpad}
    engine = engine_for(tiny_llama(0), backend)
    reference = engine_for(tiny_llama(1), backend)
    old = infer(engine, data, entropy=True, micro=2, **how)
    base = infer(reference, data, entropy=False, micro=2, **how)
    assert ("entropy" in old, "entropy" in base) == (True, False)
    mask = data["response_mask"]
    data["old_log_probs"] = response_from_nested(old["log_probs"], mask)
    data["ref_log_prob"] = response_from_nested(base["log_probs"], mask)
    for got, want in (("old_log_probs", exact_old), ("ref_log_prob", exact_ref)):
        for row, exact in zip(data[got].unbind(), want, strict=True):
            torch.testing.assert_close(row.double(), exact, rtol=0, atol=2e-5)
    padded = [data[name].to_padded_tensor(0.0) for name in ("old_log_probs", "ref_log_prob")]
    padded_mask = mask.to_padded_tensor(0)
    targets = powerflow_targets(*padded, padded_mask, GROUPS, alpha=ALPHA)
    data["advantages"] = response_to_nested(targets.target[:, None] * padded_mask, mask)

    gradients = []
    for micro in (4, 1):
        engine = engine_for(tiny_llama(0), backend)
        engine.module.load_state_dict({k: v.float() for k, v in actor.state_dict().items()})
        loss = partial(ppo_loss, config=actor_config())
        output = engine.forward_backward_batch(
            prepared(data, calculate_entropy=False, micro=micro, **how), loss_function=loss
        )
        assert sum(output["loss"]) == pytest.approx(float(expected), rel=2e-5)
        gradients.append({name: p.grad for name, p in engine.module.named_parameters()})
        for name, exact in exact_gradient.items():
            torch.testing.assert_close(
                gradients[-1][name].double(), exact, rtol=0, atol=2e-5 * float(exact.abs().max()) + 1e-7, msg=name
            )
    for name in exact_gradient:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("rmpad", [True, False], ids=["packed", "padded"])
def test_entropy_is_given_where_the_engine_asks_for_it_and_refuses_a_weight(rmpad):
    data = rollouts()
    model = tiny_llama(0)
    ids = data["input_ids"].unbind()[0]
    logp = (model(input_ids=ids[None], use_cache=False).logits[0].detach().double() / TEMPERATURE).log_softmax(-1)
    exact = -(logp.exp() * logp).sum(-1)
    engine = engine_for(model, "powerflow_fast")
    old = infer(engine, data, entropy=True, micro=2, fused=True, rmpad=rmpad)
    torch.testing.assert_close(old["entropy"].unbind()[0].double(), exact, rtol=0, atol=2e-5)

    seen = {}

    def weigh(model_output, data, dp_group, coefficient):
        entropy = model_output["entropy"].values()
        seen["entropy"] = entropy.detach()
        return model_output["log_probs"].values().sum() - coefficient * entropy.sum(), {}

    batch = prepared(data, calculate_entropy=True, micro=4, fused=True, rmpad=rmpad)
    engine.forward_backward_batch(batch, loss_function=partial(weigh, coefficient=0.0))
    torch.testing.assert_close(seen["entropy"][: len(exact)].double(), exact, rtol=0, atol=2e-5)
    assert engine.module.lm_head.weight.grad.abs().sum() > 0
    batch = prepared(data, calculate_entropy=True, micro=4, fused=True, rmpad=rmpad)
    with pytest.raises(RuntimeError, match=r"entropy_coeff must be 0, or the backend 'torch'"):
        engine.forward_backward_batch(batch, loss_function=partial(weigh, coefficient=0.01))
