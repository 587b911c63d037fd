"""What is measured: cases, their inputs, their fp64 references, and the suites that list them.

A case of the head is one step over N tokens in one of three modes: ``no_grad`` (score only), ``frozen`` (gradient of
the hidden states) and ``full`` (gradients of hidden states and head). Every provider gets the same tensors, returns
fp32 log-probs per token, and takes an fp32 upstream gradient per token, as a trainer that weighs sequences needs it.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from powerflow_fast.kernels.la_tb_reference import la_tb_loss_ref

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

    def tiny(self) -> HeadCase:
        """The same case in miniature, for rehearsals and tests; ragged in N and V where the original is."""
        return dataclasses.replace(self, n=max(5, self.n // 64), v=500 + self.v % 13, h=128)


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


@torch.no_grad()
def head_reference(inputs: HeadInputs) -> HeadReference:
    hidden, labels, weight = inputs.hidden.double(), inputs.labels, inputs.weight
    keep = labels != IGNORE
    upstream = inputs.upstream.double().where(keep, 0.0)
    n, v = hidden.shape[0], weight.shape[0]
    label = labels.where(keep, 0)

    def pieces():
        for start in range(0, v, 8192):
            yield weight[start : start + 8192].double()

    lse = hidden.new_full((n,), float("-inf"))
    for w in pieces():
        lse = torch.logaddexp(lse, torch.logsumexp(hidden @ w.t(), 1))
    logp = ((hidden * weight[label].double()).sum(1) - lse).where(keep, 0.0)

    kept = keep.nonzero()[:, 0]
    rows = kept[torch.linspace(0, kept.numel() - 1, min(SAMPLES, kept.numel()), device=kept.device).long()]
    d_hidden = weight[label[rows]].double()
    for w in pieces():
        d_hidden -= torch.exp(hidden[rows] @ w.t() - lse[rows, None]) @ w
    d_hidden *= upstream[rows, None]

    spread = torch.linspace(0, v - 1, SAMPLES // 2, device=kept.device).long()
    columns = torch.cat([label[rows][: SAMPLES // 2], spread]).unique()
    p = torch.exp(hidden @ weight[columns].double().t() - lse[:, None])
    residual = (label[:, None] == columns[None, :]).double() - p
    d_weight = (residual * upstream[:, None]).t() @ hidden
    return HeadReference(logp, rows, d_hidden, columns, d_weight)


def _relative(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact).norm() / exact.norm())


@torch.no_grad()
def head_errors(outputs: tuple[Tensor, ...], exact: HeadReference) -> dict[str, float | int]:
    """Largest error of a log-prob, error of their sum (both nats), relative errors of the gradients (Frobenius)."""
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
    if len(outputs) > 1:
        errors["d_hidden_rel_err"] = _relative(outputs[1][exact.rows], exact.d_hidden)
    if len(outputs) > 2:
        errors["d_weight_rel_err"] = _relative(outputs[2][exact.columns], exact.d_weight)
    return errors


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

    def tiny(self) -> LaTbCase:
        return dataclasses.replace(self, n=max(24, self.n // 256), b=6)


@dataclasses.dataclass(frozen=True)
class LaTbInputs:
    logps: Tensor
    base_logps: Tensor
    log_z: Tensor
    cu_seqlens: Tensor
    psi: Tensor
    old_logps: Tensor | None
    alpha: float = 4.0
    clip: tuple[float, float] = (0.8, 1.2)

    def first(self, rows: int) -> LaTbInputs:
        return self


@torch.no_grad()
def la_tb_inputs(case: LaTbCase, device: torch.device, *, seed: int = 0) -> LaTbInputs:
    """Lengths between a half and three halves of the mean, log-probs around -1, ratios on both sides of the clip."""
    g = torch.Generator().manual_seed(seed)
    share = 0.5 + torch.rand(case.b, generator=g)
    ends = (share.cumsum(0) / share.sum() * case.n).round().to(torch.int32)
    cu = torch.cat([ends.new_zeros(1), ends])
    logps = torch.randn(case.n, generator=g).exp().neg()
    sums = torch.stack([part.sum() for part in logps.split(cu.diff().tolist())])
    base = sums - cu.diff() * 0.1 * torch.rand(case.b, generator=g)
    old = sums + 0.3 * torch.randn(case.b, generator=g) if case.off_policy else None
    psi = torch.where(torch.rand(case.b, generator=g) < 0.2, -0.5, 0.0)
    tensors = (logps, base, torch.rand(case.b, generator=g), cu, psi, old)
    return LaTbInputs(*(t if t is None else t.to(device) for t in tensors))


def la_tb_reference(inputs: LaTbInputs) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, d_logps, d_log_z) of the oracle in fp64."""

    def exact(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double()

    logps, log_z = exact(inputs.logps).requires_grad_(), exact(inputs.log_z).requires_grad_()
    loss = la_tb_loss_ref(
        logps,
        exact(inputs.base_logps),
        log_z,
        inputs.cu_seqlens,
        alpha=inputs.alpha,
        psi=exact(inputs.psi),
        old_logps=exact(inputs.old_logps),
        clip=inputs.clip,
    )[0]
    return loss.detach(), *torch.autograd.grad(loss, [logps, log_z])


def la_tb_errors(outputs: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> dict[str, float]:
    names = ("loss_rel_err", "d_logps_rel_err", "d_log_z_rel_err")
    return {name: _relative(a.detach(), b) for name, a, b in zip(names, outputs, exact, strict=True)}


CPU_SHAPES = ((1024, 151936, 896), (2048, 49152, 576))
GPU_HEADS = ((151936, 1536), (151936, 3584), (128256, 4096), (262144, 2304), (151936, 896), (49152, 576))


def _gpu_main() -> list[HeadCase]:
    """The most telling cases first: a run that reaches its time limit has them."""
    return [HeadCase(8192, v, h, mode=mode) for v, h in GPU_HEADS for mode in ("frozen", "full", "no_grad")]


def _gpu_n() -> list[HeadCase]:
    v, h = GPU_HEADS[0]
    lengths = [HeadCase(n, v, h) for n in (512, 2048, 7777, 32768)]
    masked = [HeadCase(8192, v, h, mask_ratio=ratio) for ratio in (0.5, 0.9)]
    wide = [HeadCase(8192, width, 2304) for width in (32768, 65536, 131072)]
    other = [HeadCase(8192, v, h, l2="hot"), HeadCase(8192, v, h, dtype="fp32"), HeadCase(512, v, h, mode="full")]
    return lengths + masked + wide + other


SUITES: dict[str, list[HeadCase] | list[LaTbCase]] = {
    "cpu": [HeadCase(*shape, dtype=dtype) for shape in CPU_SHAPES for dtype in ("fp32", "bf16")],
    "cpu-modes": [
        HeadCase(*shape, dtype=dtype, mode=mode)
        for mode in ("no_grad", "full")
        for shape in CPU_SHAPES
        for dtype in ("fp32", "bf16")
    ],
    "cpu-n": [HeadCase(n, *CPU_SHAPES[1][1:], dtype="fp32") for n in (256, 512, 1024, 2048, 4096)],
    "gpu": _gpu_main(),
    "gpu-n": _gpu_n(),
    "la-tb": [
        LaTbCase(n, b, off_policy) for n, b in ((16384, 64), (65536, 64), (65536, 1024)) for off_policy in (False, True)
    ],
}
