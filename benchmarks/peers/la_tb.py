"""Who computes the LA-TB loss: functions ``(terms, logps, log_z) -> loss``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases.la_tb import LaTbCase, LaTbInputs, LossTerms
from measure import Outputs
from providers import Provider, require_compiled_op
from torch import Tensor

from powerflow_fast import la_tb_loss


def la_tb_eager(x: LossTerms, logps: Tensor, log_z: Tensor) -> Tensor:
    """The loss in vectorised PyTorch on packed tokens, fp32 throughout."""
    length = x.cu_seqlens.diff()
    logp = torch.segment_reduce(logps, "sum", offsets=x.cu_seqlens.long(), unsafe=True)
    delta = log_z + logp / length - x.alpha * (x.base_logps / length + x.psi)
    weight = 1.0 if x.old_logps is None else (logp.detach() - x.old_logps).exp().clamp(*x.clip)
    return (weight * delta.square()).mean()


def la_tb_padded(x: LossTerms, logps: Tensor, log_z: Tensor, mask: Tensor) -> Tensor:
    """The same on log-probs that are already padded to (B, T), the layout of most trainers."""
    length = mask.sum(1)
    logp = (logps * mask).sum(1)
    delta = log_z + logp / length - x.alpha * (x.base_logps / length + x.psi)
    weight = 1.0 if x.old_logps is None else (logp.detach() - x.old_logps).exp().clamp(*x.clip)
    return (weight * delta.square()).mean()


def load_ours(device: torch.device) -> Callable[..., Tensor]:
    require_compiled_op(device)

    def loss(x: LossTerms, logps: Tensor, log_z: Tensor) -> Tensor:
        return la_tb_loss(logps, x.base_logps, log_z, x.cu_seqlens, **x.options()).loss

    return loss


def load_compiled(device: torch.device) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return torch.compile(la_tb_eager, dynamic=False)


LA_TB_PROVIDERS = [
    Provider("powerflow_fast", "powerflow_fast", load_ours, backend="compiled"),
    Provider("eager packed", "torch", lambda device: la_tb_eager),
    Provider("eager padded", "torch", lambda device: la_tb_padded),
    Provider("eager packed compiled", "torch", load_compiled, warm_whole=True),
]


def la_tb_step(provider: Provider, case: LaTbCase, inputs: LaTbInputs) -> Callable[[], Outputs]:
    """(loss, d_logps, d_log_z (B,)); d_logps is (N,), and (B, T) of the padded form."""
    loss_of = provider.load(inputs.logps.device)
    terms = inputs.terms
    logps, log_z = inputs.logps.detach(), terms.log_z.detach().requires_grad_()
    arguments: tuple[Tensor, ...] = ()
    if provider.name == "eager padded":
        lengths = terms.cu_seqlens.diff()
        logps = torch.nn.utils.rnn.pad_sequence(list(logps.split(lengths.tolist())), batch_first=True)
        width = torch.arange(logps.shape[1], device=logps.device)
        arguments = (width[None] < lengths[:, None],)
    logps.requires_grad_()

    def step() -> Outputs:
        loss = loss_of(terms, logps, log_z, *arguments)
        return loss.detach(), *torch.autograd.grad(loss, [logps, log_z])

    return step
