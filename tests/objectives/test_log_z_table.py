"""The running log Z': values by hand, what it is worth, what it rejects, and its saved state."""

from __future__ import annotations

import json
import math

import pytest
import torch

from powerflow_fast.checkpoints.folder import load_checkpoint, save_checkpoint
from powerflow_fast.errors import CheckpointError
from powerflow_fast.objectives import LogZTable
from powerflow_fast.ops import la_tb_loss


def test_values_by_hand():
    table = LogZTable(momentum=0.75)
    table.update([7, "a"], torch.tensor([2.0, -1.0]))
    assert len(table) == 2 and 7 in table and "7" not in table
    assert table.get([7, "a", 8], torch.tensor([9.0, 9.0, 5.0])).tolist() == [2, -1, 5]
    table.update([7], torch.tensor([4.0]))
    table.update([7], torch.tensor([0.0]))
    # 2, then 0.75 * 2 + 0.25 * 4 = 2.5, then 0.75 * 2.5
    out = table.get(["a", 7, 7], torch.full((3,), math.nan, dtype=torch.float64))
    assert out.dtype == torch.float64 and out.tolist() == [-1, 1.875, 1.875] and not out.requires_grad


def test_a_prompt_counts_once_in_an_update():
    table, once = LogZTable(0.5), LogZTable(0.5)
    for values in ([1.0, 3.0, 5.0], [7.0, 9.0, 0.0]):
        table.update([0, 0, 1], torch.tensor(values))
        once.update([1, 0], torch.tensor([values[2], (values[0] + values[1]) / 2]))
    assert table.get([0, 1], torch.zeros(2)).tolist() == once.get([0, 1], torch.zeros(2)).tolist() == [5, 2.5]


def test_momentum_zero_keeps_the_last_and_a_constant_stays():
    last, constant = LogZTable(0.0), LogZTable(0.9)
    for value in (0.3, -1.7):
        last.update([0], torch.tensor([value], dtype=torch.float64))
        constant.update([0], torch.tensor([0.1], dtype=torch.float64))
    zero = torch.zeros(1, dtype=torch.float64)
    assert last.get([0], zero).item() == pytest.approx(-1.7, abs=1e-15) and constant.get([0], zero).item() == 0.1


def test_error_is_smaller_than_the_group_means_by_the_factor_of_the_docstring():
    momentum, g = 0.8, torch.Generator().manual_seed(0)
    prompts = list(range(4000))
    table = LogZTable(momentum)
    for _ in range(40):  # 0.8 ** 40: the first value has faded
        estimates = torch.randn(len(prompts), generator=g, dtype=torch.float64)
        table.update(prompts, estimates)
    values = table.get(prompts, torch.full((len(prompts),), math.nan, dtype=torch.float64))
    assert values.var().item() == pytest.approx((1 - momentum) / (1 + momentum), rel=0.1)


def test_lag_is_that_of_the_docstring():
    table = LogZTable(0.9)
    for visit in range(300):  # log Z' rises by 0.01 between two visits
        value = torch.tensor([0.01 * visit], dtype=torch.float64)
        before = value - table.get([0], value)
        table.update([0], value)
    assert before.item() == pytest.approx(1 / 0.1 * 0.01)
    assert (value - table.get([0], value)).item() == pytest.approx(0.9 / 0.1 * 0.01)


def test_a_value_too_high_by_c_adds_the_gradient_of_the_docstring():
    """Four completions of 1 to 4 tokens, all of them: expectations are exact."""
    lengths = torch.tensor([1, 2, 3, 4])
    theta = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    p = theta.softmax(0).detach()

    def gradient(log_z: float) -> torch.Tensor:
        total = torch.zeros_like(theta)
        for i in range(4):
            tokens = (theta.log_softmax(0)[i] / lengths[i]).expand(int(lengths[i]))
            cu_i = torch.tensor([0, int(lengths[i])], dtype=torch.int32)
            constants = (torch.tensor([-2.0 * (i + 1)], dtype=torch.float64), torch.tensor([log_z]).double())
            total += p[i] * torch.autograd.grad(la_tb_loss(tokens, *constants, cu_i, alpha=2.0).loss, theta)[0]
        return total

    (of_length,) = torch.autograd.grad((theta.softmax(0) / lengths).sum(), theta)
    torch.testing.assert_close(gradient(-1.5) - gradient(-2.0), 2 * 0.5 * of_length, rtol=1e-12, atol=1e-14)


def test_state_is_restored_bit_for_bit(tmp_path):
    table = LogZTable(0.9)
    table.update([3, "x"], torch.tensor([0.1, 0.2]))
    table.update([3, "3"], torch.tensor([0.7, 1 / 3], dtype=torch.float64))
    tensors, meta = table.state_dict()
    save_checkpoint(tmp_path / "checkpoint-1", tensors={"log_z_table": tensors}, state={"log_z_table": meta})
    loaded = load_checkpoint(tmp_path / "checkpoint-1")
    again = LogZTable(0.9)
    again.update([1], torch.tensor([1.0]))
    again.load_state_dict(loaded.tensors["log_z_table"], loaded.state["log_z_table"])
    for copy in (table, again):
        copy.update([3, 4], torch.tensor([0.25, 2.0]))
    keys = [3, "3", "x", 4, 1]
    default = torch.full((5,), 9.0, dtype=torch.float64)
    assert again.get(keys, default).tolist() == table.get(keys, default).tolist()
    assert json.loads(json.dumps(meta))["keys"] == [3, "x", "3"]
    with pytest.raises(CheckpointError, match=r"momentum=0\.9, this run has 0\.5"):
        LogZTable(0.5).load_state_dict(tensors, meta)
    with pytest.raises(CheckpointError, match="2 keys and 3 values"):
        again.load_state_dict(tensors, meta | {"keys": [1, 2]})


def test_an_empty_table():
    table = LogZTable()
    assert table.get([], torch.zeros(0)).shape == (0,) and len(table) == 0
    table.update([], torch.zeros(0))
    again = LogZTable()
    again.load_state_dict(*table.state_dict())
    assert len(again) == 0


def test_what_it_rejects():
    for momentum in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="momentum must satisfy 0 <= momentum < 1"):
            LogZTable(momentum)
    with pytest.raises(TypeError, match="momentum must be a number, got str"):
        LogZTable("0.9")
    table = LogZTable()
    one = torch.zeros(1)
    for call, error, match in [
        (
            lambda: table.update([1, 2], one),
            ValueError,
            r"group_estimates must have shape \(len\(keys\),\)=\(2,\), got",
        ),
        (lambda: table.get([1, 2], one), ValueError, r"get: default must have shape \(len\(keys\),\)=\(2,\)"),
        (lambda: table.update([1.5], one), TypeError, r"keys must be ints or strings, got 1\.5"),
        (lambda: table.update([True], one), TypeError, "keys must be ints or strings, got True"),
        (lambda: table.update([1], [0.0]), TypeError, "group_estimates must be a torch.Tensor, got list"),
        (lambda: table.update([1], one.long()), TypeError, "must be torch.float32 or torch.float64, got torch.int64"),
        (lambda: table.update([1, 2], torch.tensor([0.0, math.inf])), ValueError, "must be finite, got .* for key 2"),
    ]:
        with pytest.raises(error, match=match):
            call()
    assert len(table) == 0, "an update is taken whole or not at all"
