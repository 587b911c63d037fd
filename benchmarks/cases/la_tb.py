"""The LA-TB loss and its gradients from log-probs that are already there: inputs and fp64 reference."""

from __future__ import annotations

import dataclasses

import torch
from cases.head import relative_error
from torch import Tensor

from powerflow_fast.kernels.la_tb_reference import la_tb_loss_ref


@dataclasses.dataclass(frozen=True)
class LaTbCase:
    """The LA-TB loss and its gradients for n packed tokens of b sequences; ``off_policy`` adds the clipped ratio."""

    n: int
    b: int
    off_policy: bool = True
    l2: str = "cold"

    op = "la_tb_loss"
    mode = "full"
    dtype = "fp32"

    def useful_flop(self) -> None:
        return None

    def executed_flop(self, passes: object) -> None:
        return None

    def title(self) -> str:
        return f"LA-TB loss and gradients, N={self.n}, B={self.b}, {'off' if self.off_policy else 'on'}-policy"

    def tiny(self) -> LaTbCase:
        return dataclasses.replace(self, n=max(24, self.n // 256), b=6)


@dataclasses.dataclass(frozen=True)
class LossTerms:
    """What the loss of b packed sequences takes besides their log-probs; one number per sequence."""

    cu_seqlens: Tensor
    base_logps: Tensor
    log_z: Tensor
    psi: Tensor
    old_logps: Tensor | None = None
    alpha: float = 4.0
    clip: tuple[float, float] = (0.8, 1.2)

    def options(self) -> dict[str, object]:
        """The keyword arguments of our functions."""
        return {"alpha": self.alpha, "psi": self.psi, "old_logps": self.old_logps, "clip": self.clip}

    def to(self, device: torch.device) -> LossTerms:
        tensors = {k: t.to(device) for k, t in vars(self).items() if isinstance(t, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclasses.dataclass(frozen=True)
class LaTbInputs:
    logps: Tensor
    terms: LossTerms

    def first(self, rows: int) -> LaTbInputs:
        return self


def packed_boundaries(n: int, b: int, g: torch.Generator) -> Tensor:
    """(B + 1,) int32: b lengths between a half and three halves of the mean, n tokens in all."""
    share = 0.5 + torch.rand(b, generator=g)
    ends = (share.cumsum(0) / share.sum() * n).round().to(torch.int32)
    return torch.cat([ends.new_zeros(1), ends])


def format_penalties(b: int, g: torch.Generator) -> Tensor:
    return torch.where(torch.rand(b, generator=g) < 0.2, -0.5, 0.0)


@torch.no_grad()
def la_tb_inputs(case: LaTbCase, device: torch.device, *, seed: int = 0) -> LaTbInputs:
    """Log-probs around -1, ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    cu = packed_boundaries(case.n, case.b, g)
    logps = torch.randn(case.n, generator=g).exp().neg()
    sums = torch.stack([part.sum() for part in logps.split(cu.diff().tolist())])
    base = sums - cu.diff() * 0.1 * torch.rand(case.b, generator=g)
    old = sums + 0.3 * torch.randn(case.b, generator=g) if case.off_policy else None
    terms = LossTerms(cu, base, torch.rand(case.b, generator=g), format_penalties(case.b, g), old)
    return LaTbInputs(logps.to(device), terms.to(device))


def exact_loss(logps: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d_logps, d_log_z) of the oracle in fp64."""

    def exact(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    logps, log_z = exact(logps).requires_grad_(), exact(terms.log_z).requires_grad_()
    with torch.enable_grad():
        loss = la_tb_loss_ref(
            logps,
            exact(terms.base_logps),
            log_z,
            terms.cu_seqlens,
            alpha=terms.alpha,
            psi=exact(terms.psi),
            old_logps=exact(terms.old_logps),
            clip=terms.clip,
        )[0]
        return loss.detach(), *torch.autograd.grad(loss, [logps, log_z])


def la_tb_reference(inputs: LaTbInputs) -> tuple[Tensor, Tensor, Tensor]:
    return exact_loss(inputs.logps, inputs.terms)


def la_tb_errors(
    outputs: tuple[Tensor, ...], inputs: LaTbInputs, exact: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Of the loss and of the gradients of log-probs and log Z', relative (Frobenius)."""
    loss, d_logps, d_log_z = outputs
    if d_logps.dim() == 2:  # of padded log-probs
        lengths = inputs.terms.cu_seqlens.diff().tolist()
        d_logps = torch.cat([row[:length] for row, length in zip(d_logps, lengths, strict=True)])
    names = ("loss_rel_err", "d_logps_rel_err", "d_log_z_rel_err")
    return {n: relative_error(a, b) for n, a, b in zip(names, (loss, d_logps, d_log_z), exact, strict=True)}
