"""Objectives on a CUDA device: the numbers of the CPU, equal bits, and no wait of the host."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from runs import run

from powerflow_fast import linear_logprobs
from powerflow_fast.objectives import OBJECTIVES, Trajectories

pytestmark = pytest.mark.gpu
LENGTHS = [700, 0, 33, 512, 1, 256, 90, 17]


def trajectories(device: str) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    n, b = sum(LENGTHS), len(LENGTHS)
    logps, base, old = (-3 * torch.rand(n, generator=generator) for _ in range(3))
    tensors = {
        "logps": logps,
        "base_logps": base,
        "old_logps": logps + 1e-3 * old,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "group_ids": torch.arange(b) // 4,
        "psi": -0.5 * (torch.arange(b) % 3 == 0).float(),
        "rewards": torch.rand(b, generator=generator),
    }
    return Trajectories(alpha=2.0, **{name: value.to(device) for name, value in tensors.items()})


def outcome(name: str, made: Trajectories) -> list[torch.Tensor]:
    leaf = made.logps.detach().requires_grad_()
    out = OBJECTIVES[name](dataclasses.replace(made, logps=leaf))
    return [out.loss.detach(), *torch.autograd.grad(out.loss, leaf), out.weight, out.logp_mean]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_on_the_device(name):
    made = trajectories("cuda")
    first = outcome(name, made)  # loads kernels
    if name != "subtb":  # it asks for the longest length
        torch.cuda.set_sync_debug_mode("error")
    try:
        second = outcome(name, made)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, again, want in zip(first, second, outcome(name, trajectories("cpu")), strict=True):
        assert torch.equal(ours, again), "the same bits on every run"
        torch.testing.assert_close(ours.cpu(), want, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("reward", ["rent", "intuitor", "ttrl"])
def test_rewards_in_a_run_on_the_device(reward, tmp_path):
    first = run(tmp_path, objective="grpo", reward=reward).history[0]
    assert math.isfinite(first["reward"]) and math.isfinite(first["loss"])


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight")], ids="+".join)
def test_compiled_code_has_the_bits_of_eager_code(trained):
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (
        torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        for shape in ((333, 256), (5003, 256))
    )
    labels = torch.randint(0, 5003, (333,), generator=generator, device="cuda")
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(name in trained)

    def step(function):
        leaves = [t for t in (hidden, weight) if t.requires_grad]
        logps = function(hidden, weight, labels)
        return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves)]

    compiled = torch.compile(linear_logprobs, fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(step(compiled), step(linear_logprobs), strict=True))
