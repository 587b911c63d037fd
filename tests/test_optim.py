"""Optimisers by name, with a stand-in for the library that is not installed here."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from test_trainer import run, same, weights
from torch import nn

from powerflow_fast import LogZHead, PowerFlowConfig
from powerflow_fast.errors import ConfigError
from powerflow_fast.optim import make_optimizer

CPU = torch.device("cpu")


def build(name, **options):
    config = PowerFlowConfig(optim=name, learning_rate=1e-5, weight_decay=0.1, adam_beta2=0.9, **options)
    return make_optimizer([nn.Parameter(torch.ones(3))], LogZHead(4), config, CPU)


@pytest.fixture
def bitsandbytes(monkeypatch):
    made = ModuleType("bitsandbytes.optim")
    for name in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit"):
        setattr(made, name, type(name, (torch.optim.AdamW,), {}))
    monkeypatch.setitem(sys.modules, "bitsandbytes", ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", made)


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
def test_the_log_z_head_keeps_its_own_group(bitsandbytes, name, kind):
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


def test_a_run_with_a_library_optimiser_resumes(tmp_path, bitsandbytes):
    whole = run(tmp_path, name="whole", optim="paged_adamw_8bit")
    run(tmp_path, name="cut", optim="paged_adamw_8bit", max_steps=2)
    resumed = run(tmp_path, name="cut", optim="paged_adamw_8bit", resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
