"""Optimisers by name; those of bitsandbytes with the library itself, which has them for CPUs too (without paging)."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers as tf
from runs import run, same, weights
from tiny import one_thread, tiny_model  # noqa: F401
from torch import nn

from powerflow_fast import LogZHead, PowerFlowConfig
from powerflow_fast.errors import ConfigError
from powerflow_fast.training.optimizer import make_optimizer

CPU = torch.device("cpu")


def build(name, **options):
    config = PowerFlowConfig(optim=name, learning_rate=1e-5, weight_decay=0.1, adam_beta2=0.9, **options)
    return make_optimizer([nn.Parameter(torch.ones(3))], LogZHead(4), config, CPU)


def test_torch_names():
    assert [build(name).defaults["fused"] for name in ("auto", "adamw_torch", "adamw_torch_fused")] == [
        False,
        False,
        True,
    ]
    config = PowerFlowConfig()
    on_cuda = make_optimizer([nn.Parameter(torch.ones(3))], None, config, torch.device("cuda"))
    assert on_cuda.defaults["fused"] and len(on_cuda.param_groups) == 1
    with pytest.raises(ConfigError, match="optim must be 'auto' or 'adamw_torch'"):
        PowerFlowConfig(optim="lion")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adamw_torch", "AdamW"),
        ("adamw_bnb_8bit", "AdamW8bit"),
        ("paged_adamw_32bit", "PagedAdamW"),
        ("paged_adamw_8bit", "PagedAdamW8bit"),
    ],
)
def test_the_log_z_head_keeps_its_own_group(name, kind):
    pytest.importorskip("bitsandbytes" if "8bit" in name or "paged" in name else "torch")
    optimizer = build(name)
    assert type(optimizer).__name__ == kind
    policy, head = optimizer.param_groups
    assert (policy["lr"], policy["weight_decay"], policy["betas"]) == (1e-5, 0.1, (0.9, 0.9))
    assert (head["lr"], head["weight_decay"]) == (1e-3, 0.0) and len(head["params"]) == 2


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match=r"optim='paged_adamw_8bit' needs bitsandbytes .*pip install bitsandbytes"):
        build("paged_adamw_8bit")


def wide_model():
    """Matrices of 8192 and more elements: bitsandbytes keeps smaller states in 32 bits."""
    config = tiny_model("llama").config.to_dict() | {"hidden_size": 128, "intermediate_size": 64, "head_dim": 64}
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config))


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_run_with_a_library_optimiser_resumes(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    whole = run(tmp_path, model=wide_model(), name="whole", optim=name)
    run(tmp_path, model=wide_model(), name="cut", optim=name, max_steps=2)
    resumed = run(tmp_path, model=wide_model(), name="cut", optim=name, resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(wide_model()))


@pytest.mark.parametrize("name", ["adamw_bnb_8bit", "paged_adamw_8bit"])
def test_states_have_eight_bits(name):
    pytest.importorskip("bitsandbytes")
    model = wide_model()
    optimizer = make_optimizer(list(model.parameters()), None, PowerFlowConfig(optim=name), CPU)
    model(torch.ones(1, 4, dtype=torch.int64)).logits.sum().backward()
    optimizer.step()
    state = optimizer.state[model.model.layers[0].self_attn.q_proj.weight]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8
