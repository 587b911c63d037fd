"""LoRA on two gloo processes, replicated (DDP) and sharded (FSDP2), trains, resumes and saves as on one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_distributed import check_like_one, history, launch, weights
from tiny import one_thread  # noqa: F401

# Adam divides by the gradient's size, which magnifies the rounding of a new adapter's first, small gradients: 1.2e-5
# was seen on a CPU of another make.
REL = 5e-5


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "one"
    launch(folder, 1, "ddp-lora", "whole,even")
    return folder


def take(source, folder):
    """Runs of ``source`` that ended with a rollout, for other processes to take up in ``folder``."""
    for log_z in ("learned", "group"):
        shutil.copytree(source / f"{log_z}-even", folder / f"{log_z}-taken")


def steps(folder):
    return [row for row in history(folder) if "loss" in row]


def options(path):
    """peft writes the modules that have an adapter in no order."""
    return {k: sorted(v) if isinstance(v, list) else v for k, v in json.loads(path.read_text()).items()}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["ddp-lora", "fsdp-lora"])
def test_two_processes_train_an_adapter_like_one(one, tmp_path, kind):
    two, back = tmp_path / "two", tmp_path / "back"
    take(one, two)
    launch(two, 2, kind, "whole,cut,even,taken")
    check_like_one(one, two, rel=REL)
    base = history(one / "group-whole")
    assert abs(base[2]["base_logp"] - base[2]["policy_logp"]) > 1e-2, "the adapter is off where the base is scored"

    take(two, back)
    launch(back, 1, "ddp-lora", "taken")
    for log_z in ("learned", "group"):
        whole = steps(one / f"{log_z}-whole")
        for folder in (two, back):  # from one process to two, and from two to one
            for want, got in zip(whole, steps(folder / f"{log_z}-taken"), strict=True):
                for name in ("loss", "grad_norm", "base_logp", "policy_logp"):
                    assert got[name] == pytest.approx(want[name], abs=1e-5, rel=REL), (log_z, folder.name, name)
        ours, theirs = (folder / f"{log_z}-whole" for folder in (two, one))
        for part in ("checkpoint-3/weights.safetensors", "checkpoint-3/optimizer.safetensors"):
            got, want = load_file(ours / part), load_file(theirs / part)
            assert got.keys() == want.keys()
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        for part in ("model", "adapter"):
            assert files(ours / part) == files(theirs / part)
            for path in files(ours / part):
                if path.endswith(".safetensors"):
                    got, want = load_file(ours / part / path), load_file(theirs / part / path)
                    assert got.keys() == want.keys()
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
                elif path.endswith("config.json"):
                    assert options(ours / part / path) == options(theirs / part / path)
        saved = load_file(ours / "checkpoint-3" / "weights.safetensors")
        assert all("lora_" in name or "log_z_head" in name for name in saved), "the adapter alone"
    trained = weights(two, "learned-whole")
    model = transformers.AutoModelForCausalLM.from_pretrained(two / "learned-whole" / "model")
    name = "model.layers.0.self_attn.q_proj"
    a, b = (trained[f"base_model.model.{name}.lora_{part}.default.weight"] for part in "AB")
    want = trained[f"base_model.model.{name}.base_layer.weight"] + b @ a * (32 / 3)
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), want)
