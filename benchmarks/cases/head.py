"""The head: one step of a linear head over N tokens, its inputs and its fp64 reference.

A step has one of three modes: ``no_grad`` (score only), ``frozen`` (gradient of the hidden states) and ``full``
(gradients of hidden states and head). Every provider gets the same tensors, returns fp32 log-probs per token, and takes
an fp32 upstream gradient per token, as a trainer that weighs sequences needs it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100
MODES = ("no_grad", "frozen", "full")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SUM_TOKENS = 8192  # the error of a summed log-prob is taken over at most this many tokens
SAMPLES = 32  # rows whose gradients are compared with fp64


@dataclasses.dataclass(frozen=True)
class HeadCase:
    """One step of a linear head: N tokens, V vocabulary entries, H hidden units."""

    n: int
    v: int
    h: int
    dtype: str = "bf16"
    mode: str = "frozen"
    mask_ratio: float = 0.0
    l2: str = "cold"

    op = "linear_logprobs"

    @property
    def kept(self) -> int:
        """Rows that count, the others have label -100."""
        return self.n - round(self.n * self.mask_ratio)

    def useful_flop(self) -> int:
        """Products that no implementation can avoid: logits, and one more for each gradient."""
        return 2 * self.kept * self.v * self.h * (1 + MODES.index(self.mode))

    def executed_flop(self, passes: tuple[int, ...] | None) -> int | None:
        """None where it isn't known: who skips masked rows, and when, is not ours to say."""
        if passes is None or self.mask_ratio:
            return None
        return 2 * self.n * self.v * self.h * passes[MODES.index(self.mode)]

    def title(self) -> str:
        head = {"no_grad": "no gradient", "frozen": "frozen head", "full": "trained head"}[self.mode]
        extra = f", {self.mask_ratio:.0%} of the rows masked" if self.mask_ratio else ""
        extra += ", warm L2" if self.l2 == "hot" else ""
        return f"{head}, N={self.n}, V={self.v}, H={self.h}, {self.dtype}{extra}"

    def tiny(self) -> HeadCase:
        """The same case in miniature, for rehearsals and tests; ragged in N and V where the original is."""
        return dataclasses.replace(self, n=max(5, self.n // 64), v=max(500, self.v // 64) + self.v % 13, h=128)


@dataclasses.dataclass(frozen=True)
class HeadInputs:
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor

    def first(self, rows: int) -> HeadInputs:
        """The same head on the first rows: a cheap call that loads code and starts threads."""
        return HeadInputs(self.hidden[:rows], self.weight, self.labels[:rows], self.upstream[:rows])


@torch.no_grad()
def head_inputs(case: HeadCase, device: torch.device, *, seed: int = 0) -> HeadInputs:
    """Random tensors whose label probabilities are spread as a language model's are, from e^-8 to 1 - e^-12.

    Logits of a random head have one standard deviation of 2 nats; each hidden state is then moved along its label's row
    until the label's logit is where the wanted probability is. What costs time doesn't depend on any of that, except in
    implementations that skip small gradients, which profit from the confident tokens as they would in a language model.
    """
    g = torch.Generator(device).manual_seed(seed)
    n, v, h = case.n, case.v, case.h

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    weight = randn(v, h).mul_(2 / math.sqrt(h))
    labels = torch.randint(v, (n,), generator=g, device=device)
    hidden = randn(n, h)
    own = weight[labels]
    log_sum = math.log(v) + 2.0  # of v normal logits with standard deviation 2
    target = log_sum - 8 + 20 * torch.rand(n, generator=g, device=device)
    hidden += own * ((target - (hidden * own).sum(1)) / own.square().sum(1))[:, None]
    if case.kept < n:
        labels[torch.randperm(n, generator=g, device=device)[case.kept :]] = IGNORE
    dtype = DTYPES[case.dtype]
    return HeadInputs(hidden.to(dtype), weight.to(dtype), labels, randn(n))


@dataclasses.dataclass(frozen=True)
class HeadReference:
    """fp64 on the same rounded inputs: all log-probs, and gradients of a sample of rows of hidden and of weight."""

    logp: Tensor
    rows: Tensor
    d_hidden: Tensor
    columns: Tensor
    d_weight: Tensor


def _slabs(weight: Tensor, rows: int):
    """fp64 rows of the head, few enough that their logits of ``rows`` tokens take 256 MiB."""
    step = max(256, (1 << 25) // max(rows, 1))
    for start in range(0, weight.shape[0], step):
        yield weight[start : start + step].double()


@torch.no_grad()
def head_reference(inputs: HeadInputs, upstream_of: Callable[[Tensor], Tensor] | None = None) -> HeadReference:
    """``upstream_of`` makes the gradient per token of the fp64 log-probs; None takes the inputs' own."""
    hidden, labels, weight = inputs.hidden.double(), inputs.labels, inputs.weight
    keep = labels != IGNORE
    n, v = hidden.shape[0], weight.shape[0]
    label = labels.where(keep, 0)

    lse = hidden.new_full((n,), float("-inf"))
    for w in _slabs(weight, n):
        lse = torch.logaddexp(lse, torch.logsumexp(hidden @ w.t(), 1))
    logp = ((hidden * weight[label].double()).sum(1) - lse).where(keep, 0.0)
    upstream = (inputs.upstream.double() if upstream_of is None else upstream_of(logp)).where(keep, 0.0)

    kept = keep.nonzero()[:, 0]
    rows = kept[torch.linspace(0, kept.numel() - 1, min(SAMPLES, kept.numel()), device=kept.device).long()]
    d_hidden = weight[label[rows]].double()
    for w in _slabs(weight, n):
        d_hidden -= torch.exp(hidden[rows] @ w.t() - lse[rows, None]) @ w
    d_hidden *= upstream[rows, None]

    spread = torch.linspace(0, v - 1, SAMPLES // 2, device=kept.device).long()
    columns = torch.cat([label[rows][: SAMPLES // 2], spread]).unique()
    p = torch.exp(hidden @ weight[columns].double().t() - lse[:, None])
    residual = (label[:, None] == columns[None, :]).double() - p
    d_weight = (residual * upstream[:, None]).t() @ hidden
    return HeadReference(logp, rows, d_hidden, columns, d_weight)


def relative_error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm())


@torch.no_grad()
def gradient_errors(gradients: tuple[Tensor, ...], exact: HeadReference) -> dict[str, float]:
    """Relative errors (Frobenius) of the sampled rows of d_hidden and d_weight, as many as there are."""
    sampled = {"d_hidden_rel_err": (exact.rows, exact.d_hidden), "d_weight_rel_err": (exact.columns, exact.d_weight)}
    return {
        name: relative_error(gradient[rows], rows_exact)
        for gradient, (name, (rows, rows_exact)) in zip(gradients, sampled.items(), strict=False)
    }


@torch.no_grad()
def head_errors(outputs: tuple[Tensor, ...], inputs: HeadInputs, exact: HeadReference) -> dict[str, float | int]:
    """Largest error of a log-prob, error of their sum (both nats), relative errors of the gradients."""
    logp = outputs[0]
    if logp.dtype != torch.float32 or logp.shape != exact.logp.shape:
        raise TypeError(f"contract: log-probs must be float32 {tuple(exact.logp.shape)}, got {logp.dtype} {logp.shape}")
    difference = logp.double() - exact.logp
    tokens = min(SUM_TOKENS, logp.numel())
    errors: dict[str, float | int] = {
        "logp_max_err": float(difference.abs().max()),
        "sum_err": abs(float(difference[:tokens].sum())),
        "sum_tokens": tokens,
    }
    return errors | gradient_errors(outputs[1:], exact)
