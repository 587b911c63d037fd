"""Who computes the LA-TB loss from hidden states: functions ``(hidden, weight, labels, terms, log_z) -> loss``.

Peers give log-probs (peers/head.py) and get the loss in vectorised PyTorch on top, as their users would write it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from cases.head import DTYPES
from cases.la_tb import LossTerms
from cases.loss import LossCase, LossInputs
from measure import Outputs
from peers.head import default_head_providers, gemm_step, our_passes
from peers.la_tb import la_tb_eager
from providers import Provider, require_compiled_op
from torch import Tensor

from powerflow_fast import la_tb_loss, linear_la_tb_loss, linear_logprobs
from powerflow_fast.ops.backends import resolve_backend

Loss = Callable[[Tensor, Tensor, Tensor, LossTerms, Tensor], Tensor]


def on_top_of(load: Callable[[torch.device], Callable[..., Tensor]]) -> Callable[[torch.device], Loss]:
    """The eager packed loss on a provider's log-probs."""

    def load_loss(device: torch.device) -> Loss:
        logprobs = load(device)
        return lambda hidden, weight, labels, terms, log_z: la_tb_eager(terms, logprobs(hidden, weight, labels), log_z)

    return load_loss


def one_pass(backend: str, cache_bytes: int | None = None) -> Callable[[torch.device], Loss]:
    def load(device: torch.device) -> Loss:
        resolve_backend(backend, device, torch.float32)

        def loss(hidden: Tensor, weight: Tensor, labels: Tensor, terms: LossTerms, log_z: Tensor) -> Tensor:
            sequences = (labels, terms.cu_seqlens, terms.base_logps, log_z)
            options = {**terms.options(), "backend": backend, "cache_bytes": cache_bytes}
            return linear_la_tb_loss(hidden, weight, *sequences, **options).loss

        return loss

    return load


def load_composed(device: torch.device) -> Loss:
    require_compiled_op(device)

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, terms: LossTerms, log_z: Tensor) -> Tensor:
        logps = linear_logprobs(hidden, weight, labels)
        return la_tb_loss(logps, terms.base_logps, log_z, terms.cu_seqlens, **terms.options()).loss

    return loss


OURS = [
    Provider("powerflow_fast one pass", "powerflow_fast", one_pass("auto"), (3,), "auto"),
    Provider("powerflow_fast one pass 512 MiB", "powerflow_fast", one_pass("auto", 2**29), (3,), "auto"),
    Provider("powerflow_fast one pass torch", "powerflow_fast", one_pass("torch"), (3,), "torch"),
    Provider("powerflow_fast composed", "powerflow_fast", load_composed, our_passes, "auto"),
]


def loss_providers(device: torch.device, dtype: str) -> list[Provider]:
    """Ours (on a CPU ``auto`` is the torch backend, with a smaller cache), and every other provider of the head with
    the loss on top."""
    ours = [p for p in OURS if device.type != "cpu" or not p.name.endswith(("torch", "MiB"))]
    others = [p for p in default_head_providers(device, dtype) if p.kind != "ours"]
    return ours + [p if p.kind == "floor" else dataclasses.replace(p, load=on_top_of(p.load)) for p in others]


def loss_step(provider: Provider, case: LossCase, inputs: LossInputs) -> Callable[[], Outputs]:
    """(loss, d_hidden, d_weight, d_log_z)."""
    head, terms = inputs.head, inputs.terms
    if provider.kind == "floor":
        return gemm_step(provider, head, "full", DTYPES[case.dtype])
    loss_of = provider.load(head.hidden.device)
    leaves = [t.detach().requires_grad_() for t in (head.hidden, head.weight, terms.log_z)]
    hidden, weight, log_z = leaves

    def step() -> Outputs:
        loss = loss_of(hidden, weight, head.labels, terms, log_z)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return step
