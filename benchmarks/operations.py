"""The operations that are measured: what each of them needs, under one roof for run.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from cases.head import HeadCase, head_errors, head_inputs, head_reference
from cases.la_tb import LaTbCase, la_tb_errors, la_tb_inputs, la_tb_reference
from cases.loss import LossCase, loss_errors, loss_inputs, loss_reference
from cases.rollout import RolloutCase, rollout_errors, rollout_inputs, rollout_reference
from cases.update import UpdateCase, update_errors, update_inputs, update_reference
from measure import Outputs
from peers.head import default_head_providers, head_step
from peers.la_tb import LA_TB_PROVIDERS, la_tb_step
from peers.loss import loss_providers, loss_step
from peers.rollout import ROLLOUT_PROVIDERS, rollout_step
from peers.update import UPDATE_PROVIDERS, update_step
from providers import Provider

Case = HeadCase | LossCase | LaTbCase | UpdateCase | RolloutCase


@dataclasses.dataclass(frozen=True)
class Operation:
    case: type
    inputs: Callable[[Any, torch.device], Any]
    reference: Callable[[Any], Any]
    errors: Callable[[Outputs, Any, Any], dict[str, float]]
    providers: Callable[[torch.device, str], list[Provider]]
    step: Callable[[Provider, Any, Any], Callable[[], Outputs]]
    limits: dict[str, float]
    """Beyond these errors a result of ours is wrong, not just inexact."""
    tests: dict[str, list[list[str]]]
    """Runs of pytest by device, each a list of arguments: a quick subset; Triton's kernels are tested on a GPU."""
    whole_model: bool = False
    """A model around it rounds as well, and its attention may sum in any order on a GPU: twice naive's errors are
    allowed, other bits too."""
    short: bool = False
    """Steps of microseconds: whole rounds of warming up cost nothing."""


_KERNELS, _OP = ["tests/gpu/test_triton_kernels_gpu.py"], ["tests/gpu/test_la_tb_cuda.py"]
_AROUND = ["tests/gpu/test_attention_gpu.py", "tests/gpu/test_objectives_gpu.py"]
_ENGINES = ["tests/rollout/test_generate.py", "tests/rollout/test_continuous.py"]
_LOSS_TESTS = "oracle or from_hidden or (torch and value_and_gradients)"
_UPDATE_TESTS = "oracle or logits or base"

# A half-precision gradient is rounded once on its way out.
_GRADIENTS = {"d_hidden_rel_err": 1e-2, "d_weight_rel_err": 1e-2}

OPERATIONS = {
    HeadCase.op: Operation(
        HeadCase,
        head_inputs,
        head_reference,
        head_errors,
        default_head_providers,
        head_step,
        {"logp_max_err": 1e-3, **_GRADIENTS},
        {
            "cpu": [["tests/ops/test_logprobs.py", "-k", "torch and (value_and_gradients or bits or extreme)"]],
            "cuda": [_KERNELS],
        },
    ),
    LossCase.op: Operation(
        LossCase,
        loss_inputs,
        loss_reference,
        loss_errors,
        loss_providers,
        loss_step,
        {"loss_rel_err": 1e-3, "d_log_z_rel_err": 1e-3, **_GRADIENTS},
        {
            "cpu": [["tests/ops/test_la_tb.py", "tests/ops/test_logprobs.py", "-k", _LOSS_TESTS]],
            "cuda": [_KERNELS, _OP],
        },
    ),
    LaTbCase.op: Operation(
        LaTbCase,
        la_tb_inputs,
        la_tb_reference,
        la_tb_errors,
        lambda device, dtype: LA_TB_PROVIDERS,
        la_tb_step,
        dict.fromkeys(("loss_rel_err", "d_logps_rel_err", "d_log_z_rel_err"), 1e-5),
        {"cpu": [["tests/ops/test_la_tb.py", "-k", "oracle or clipped or long_sums"]], "cuda": [_OP]},
        short=True,
    ),
    UpdateCase.op: Operation(
        UpdateCase,
        update_inputs,
        update_reference,
        update_errors,
        lambda device, dtype: UPDATE_PROVIDERS,
        update_step,
        {"loss_rel_err": 1e-4, "grad_rel_err": 1e-4},
        {
            "cpu": [
                [
                    "tests/ops/test_la_tb.py",
                    "tests/objectives/test_log_z.py",
                    "tests/models/test_models.py",
                    "-k",
                    _UPDATE_TESTS,
                ]
            ],
            "cuda": [_KERNELS, _OP, _AROUND],
        },
        whole_model=True,
    ),
    RolloutCase.op: Operation(
        RolloutCase,
        rollout_inputs,
        rollout_reference,
        rollout_errors,
        lambda device, dtype: ROLLOUT_PROVIDERS,
        rollout_step,
        {},
        {"cpu": [_ENGINES], "cuda": [_ENGINES]},
        whole_model=True,
    ),
}
