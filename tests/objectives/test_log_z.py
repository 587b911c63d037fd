"""log Z': the group estimate against its oracle, and the learned head."""

from __future__ import annotations

import math

import pytest
import torch

from powerflow_fast.kernels.la_tb_reference import group_log_z_ref
from powerflow_fast.objectives import LogZHead
from powerflow_fast.ops import group_log_z, la_tb_loss


def make_groups(lengths, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    cu = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    logps = (-3 * torch.rand(int(cu[-1]), generator=g, dtype=torch.float64)).to(dtype).requires_grad_()
    base, psi, noise = (torch.rand(len(lengths), generator=g, dtype=torch.float64).to(dtype) for _ in range(3))
    sums = torch.stack([part.detach().sum() for part in logps.split(list(lengths))])
    return {"logps": logps, "base_logps": sums - base, "cu_seqlens": cu}, {"psi": -psi, "old_logps": sums + noise - 0.5}


LENGTHS = (4, 0, 7, 3, 0, 5, 2, 6)
GROUPS = torch.tensor([9, 9, -3, 9, 5, -3, 70, -3])  # interleaved, negative, one without tokens, one alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [(), ("psi",), ("psi", "old_logps")])
@pytest.mark.parametrize("level", ["sequence", "length_normalized"])
def test_group_log_z_matches_the_oracle(dtype, options, level, poisoned_memory):
    inputs, optional = make_groups(LENGTHS, dtype)
    keywords = {k: optional[k] for k in options} | {"alpha": 2.5, "importance_level": level}
    ours = group_log_z(**inputs, group_ids=GROUPS, **keywords)
    exact_inputs, exact_keywords = (
        {k: v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in d.items()}
        for d in (inputs, keywords)
    )
    exact = group_log_z_ref(**exact_inputs, group_ids=GROUPS, **exact_keywords)
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    assert ours.dtype == dtype and not ours.requires_grad
    assert torch.allclose(ours.double(), exact, rtol=tolerance, atol=tolerance), (ours, exact)
    assert ours[4] == 0, "a group without tokens"
    assert ours[0] == ours[1] == ours[3] and ours[2] == ours[5] == ours[7]


def test_group_log_z_minimises_the_groups_loss():
    inputs, optional = make_groups((4, 2, 7))
    log_z = group_log_z(**inputs, group_ids=torch.zeros(3, dtype=torch.int64), alpha=4.0, **optional)
    log_z.requires_grad_()
    (gradient,) = torch.autograd.grad(la_tb_loss(**inputs, log_z=log_z, alpha=4.0, **optional).loss, log_z)
    assert gradient.abs().max() > 1e-3 and gradient.sum().abs() < 1e-15


def test_group_log_z_of_an_empty_call():
    zero = torch.zeros(0)
    ids = torch.zeros(0, dtype=torch.int64)
    assert group_log_z(zero, zero, ids, torch.zeros(1, dtype=torch.int32), alpha=4.0).shape == (0,)


def test_group_log_z_of_groups_whose_weights_are_all_zero():
    inputs, _ = make_groups((3, 2))
    sums = torch.stack([part.detach().sum() for part in inputs["logps"].split([3, 2])])
    ids = torch.tensor([0, 1])
    out = group_log_z(**inputs, group_ids=ids, alpha=4.0, old_logps=sums + 1e4, clip=(0.0, 1.2))
    assert torch.equal(out, torch.zeros(2, dtype=torch.float64))


def test_group_log_z_does_not_hide_a_nan():
    inputs, _ = make_groups((3, 2, 4))
    inputs["base_logps"][0] = math.nan
    out = group_log_z(**inputs, group_ids=torch.tensor([0, 0, 1]), alpha=4.0)
    assert torch.equal(out.isnan(), torch.tensor([True, True, False]))


@pytest.mark.parametrize(
    ("name", "value", "error", "match"),
    [
        ("group_ids", [0, 1], TypeError, "group_ids must be a torch.Tensor"),
        ("group_ids", torch.tensor([0]), ValueError, r"group_ids must have shape \(B,\)=\(2,\), got \(1,\)"),
        ("group_ids", torch.tensor([0.0, 1.0]), TypeError, "group_ids must be torch.int64 .*float32"),
        (
            "group_ids",
            torch.zeros(2, dtype=torch.int64, device="meta"),
            ValueError,
            "group_ids must be on logps' device",
        ),
        ("base_logps", None, TypeError, "base_logps must be a torch.Tensor"),
        ("base_logps", torch.zeros(3, dtype=torch.float64), ValueError, r"base_logps .* \(B,\)=\(2,\), got \(3,\)"),
        ("alpha", 0, ValueError, "alpha must be"),
        ("clip", (1.5, 2.0), ValueError, "clip must satisfy"),
        ("psi", torch.zeros(2), TypeError, "psi must be torch.float64"),
    ],
)
def test_group_log_z_bad_arguments(name, value, error, match):
    inputs, _ = make_groups((3, 2))
    good = inputs | {"group_ids": torch.tensor([0, 1]), "alpha": 4.0}
    with pytest.raises(error, match=f"^group_log_z: .*{match}"):
        group_log_z(**(good | {name: value}))


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_head_layers_and_first_value(num_layers):
    torch.manual_seed(0)
    head = LogZHead(16, num_layers=num_layers, hidden_dim=8)
    names = [type(layer).__name__ for layer in head.layers]
    assert names == ["Linear", "GELU", "LayerNorm"] * (num_layers - 1) + ["Linear"]
    assert head.layers[-1].in_features == (16 if num_layers == 1 else 8)
    pooled = torch.randn(5, 16)
    assert torch.equal(head(pooled), torch.zeros(5))
    head.warm_start(-1.25)
    assert torch.equal(head(pooled), torch.full((5,), -1.25))
    assert LogZHead(16, num_layers=2).layers[0].out_features == 16


def test_head_learns_and_leaves_its_input_alone():
    torch.manual_seed(0)
    head, pooled, target = LogZHead(4, num_layers=2), torch.randn(8, 4, requires_grad=True), torch.randn(8)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-2)
    first = None
    for _ in range(60):
        loss = (head(pooled) - target).square().mean()
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * first and pooled.grad is None
    assert all(p.grad is not None and p.dtype == torch.float32 for p in head.parameters())


def test_head_computes_in_fp32_under_autocast():
    torch.manual_seed(0)
    head, pooled = LogZHead(16, num_layers=2), torch.randn(3, 16, dtype=torch.bfloat16)
    torch.nn.init.normal_(head.layers[-1].weight)
    exact = head(pooled.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head(pooled)
    assert out.dtype == torch.float32 and torch.equal(out, exact)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"hidden_size": 0}, ValueError, "hidden_size must be >= 1, got 0"),
        ({"hidden_size": 4.0}, TypeError, "hidden_size must be an int, got float"),
        ({"hidden_size": 4, "num_layers": 0}, ValueError, "num_layers must be >= 1"),
        ({"hidden_size": 4, "hidden_dim": -1}, ValueError, "hidden_dim must be >= 1"),
    ],
)
def test_head_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=f"LogZHead: {match}"):
        LogZHead(**arguments)


def test_head_bad_calls():
    head = LogZHead(4)
    with pytest.raises(ValueError, match=r"pooled must have shape \(P, H\)=\(P, 4\), got \(2, 3\)"):
        head(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="must be finite, got nan"):
        head.warm_start(math.nan)
