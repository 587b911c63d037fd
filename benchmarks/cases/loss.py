"""The LA-TB loss from hidden states with a trained head: gradients of hidden, weight and log Z'.

What a training step does after its last layer, n packed tokens of b complete sequences, on-policy.
"""

from __future__ import annotations

import dataclasses

import torch
from cases.head import HeadCase, HeadInputs, HeadReference, gradient_errors, head_inputs, head_reference, relative_error
from cases.la_tb import LossTerms, exact_loss, format_penalties, packed_boundaries
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class LossCase:
    n: int
    v: int
    h: int
    b: int
    dtype: str = "bf16"
    l2: str = "cold"

    op = "linear_la_tb_loss"
    mode = "full"

    def useful_flop(self) -> int:
        """Logits and two gradients: the products that no implementation can avoid."""
        return 3 * 2 * self.n * self.v * self.h

    def executed_flop(self, passes: tuple[int, ...] | None) -> int | None:
        """A provider of the head with its number for a trained head (the last), or one that has this number only."""
        return None if passes is None else 2 * self.n * self.v * self.h * passes[-1]

    def title(self) -> str:
        shape = f"N={self.n}, V={self.v}, H={self.h}, B={self.b}, {self.dtype}"
        return f"LA-TB loss from hidden states, trained head, {shape}"

    def tiny(self) -> LossCase:
        return dataclasses.replace(self, n=max(24, self.n // 64), v=max(500, self.v // 64) + self.v % 13, h=128, b=4)


@dataclasses.dataclass(frozen=True)
class LossInputs:
    head: HeadInputs
    terms: LossTerms

    def first(self, rows: int) -> LossInputs:
        """The first rows as one sequence: a cheap call that loads code and starts threads."""
        terms = self.terms
        one = {name: getattr(terms, name)[:1] for name in ("base_logps", "log_z", "psi")}
        cu_seqlens = torch.tensor([0, rows], dtype=torch.int32, device=terms.cu_seqlens.device)
        return LossInputs(self.head.first(rows), dataclasses.replace(terms, cu_seqlens=cu_seqlens, **one))


@torch.no_grad()
def loss_inputs(case: LossCase, device: torch.device, *, seed: int = 0) -> LossInputs:
    """The head's inputs, whose labels have -2 nats on average; base log-probs around that, log Z' between 0 and 1."""
    head = head_inputs(HeadCase(case.n, case.v, case.h, case.dtype, "full"), device, seed=seed)
    g = torch.Generator().manual_seed(seed)
    cu = packed_boundaries(case.n, case.b, g)
    base = -2.0 * cu.diff() * (0.9 + 0.2 * torch.rand(case.b, generator=g))
    terms = LossTerms(cu, base, torch.rand(case.b, generator=g), format_penalties(case.b, g))
    return LossInputs(head, terms.to(device))


@dataclasses.dataclass(frozen=True)
class LossReference:
    loss: Tensor
    d_log_z: Tensor
    head: HeadReference


def loss_reference(inputs: LossInputs) -> LossReference:
    found: list[Tensor] = []

    def upstream_of(logp: Tensor) -> Tensor:
        loss, d_logps, d_log_z = exact_loss(logp, inputs.terms)
        found.extend((loss, d_log_z))
        return d_logps

    head = head_reference(inputs.head, upstream_of)
    return LossReference(*found, head)


def loss_errors(outputs: tuple[Tensor, ...], inputs: LossInputs, exact: LossReference) -> dict[str, float]:
    """Relative errors of the loss and of the three gradients, sampled where they are large."""
    loss, d_hidden, d_weight, d_log_z = outputs
    return {
        "loss_rel_err": relative_error(loss, exact.loss),
        **gradient_errors((d_hidden, d_weight), exact.head),
        "d_log_z_rel_err": relative_error(d_log_z, exact.d_log_z),
    }
