"""The LA-TB loss: pure functions of log-probs.

Length-aware trajectory balance drives ``log Z'(q) + s(y)`` towards ``α (r(y) + ψ(y))``, where s and r are the mean
log-probs per token of a completion under the policy and the base model; see ``la_tb_loss``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import ImportanceLevel, check_clip, require_positive, require_tensor
from .extension import extension_status
from .logprobs_autograd import refuse_second_derivative
from .segments import check_cu_seqlens, segment_sum


class LATBOutput(NamedTuple):
    """The loss and, per sequence, what made it; only ``loss`` is differentiable."""

    loss: Tensor
    """() the mean of w δ² over the sequences of the step."""
    delta: Tensor
    """(B,) the residual δ, nats per token; 0 for a sequence without tokens."""
    weight: Tensor
    """(B,) the clipped importance ratio w; 1 on-policy, 0 for a sequence without tokens."""
    logp_mean: Tensor
    """(B,) s, the mean log-prob per token under the policy; 0 for a sequence without tokens."""


def la_tb_loss(
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: ImportanceLevel = "sequence",
    num_sequences: int | None = None,
) -> LATBOutput:
    """Length-aware trajectory-balance loss of B packed completions. In plain torch, with no empty completion:

        length = cu_seqlens.diff()
        logp = torch.segment_reduce(logps, "sum", offsets=cu_seqlens.long())
        delta = log_z + logp / length - alpha * (base_logps / length + psi)
        weight = (logp.detach() - old_logps).exp().clamp(*clip)      # the exponent / length if "length_normalized"
        loss = (weight * delta**2).sum() / num_sequences

    in one pass that also makes the gradients, with fp64 sums, the same bits on every run, and a ratio of any size
    clipped before it can overflow. A completion without tokens adds nothing to the loss, the mean or the gradients.

    Args:
        logps: (N,) fp32 or fp64, log-probs of the completion tokens under the policy at the sampling temperature, the
            completions one after the other. Gradient: ``2 w δ / (length · n)`` for each token.
        base_logps: (B,) sums of the tokens' log-probs under the base model. No gradient.
        log_z: (B,) log Z' of each completion's prompt, nats per token. Gradient: ``2 w δ / n``.
        cu_seqlens: (B+1,) int32, from 0 to N, not decreasing: completion b is ``logps[cu_seqlens[b]:cu_seqlens[b+1]]``.
        alpha: exponent of the target ``p_base(y|q)^alpha``, finite and > 0.
        psi: (B,) format penalty, 0 or negative, added to r before the multiplication by alpha. None: 0. No gradient.
        old_logps: (B,) sums of the log-probs under the policy that sampled the completions. None: that is this policy,
            and w = 1. No gradient.
        clip: bounds of w, ``0 <= low <= 1 <= high``.
        importance_level: ``"sequence"``, the ratio of the sequences' probabilities, or ``"length_normalized"``, the
            geometric mean of the tokens' ratios.
        num_sequences: n, the divisor of the mean: the sequences with tokens of the whole optimiser step, so that the
            losses of its micro-batches add up to the step's. None (or 0): those of this call, counted on the device.

    Returns:
        LATBOutput: loss () and detached delta, weight, logp_mean (B,), in logps' dtype. All (B,) inputs have that dtype
        and every tensor is on one device. The gradients are made in the forward pass (N + B elements); a second
        derivative raises RuntimeError.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range. The values of cu_seqlens
            are checked on a CPU only; on a GPU, offsets that don't partition the tokens give a NaN loss.

    Without the compiled op (or without one for this device) plain torch computes the same and a RuntimeWarning says
    why, once. Non-finite log-probs give a non-finite loss: nothing is masked.

    Source: PowerFlow (arXiv 2603.18363); trajectory balance is Malkin et al. 2022 (arXiv 2201.13259).
    """
    return la_tb(
        "la_tb_loss",
        logps,
        base_logps,
        log_z,
        cu_seqlens,
        alpha=alpha,
        psi=psi,
        old_logps=old_logps,
        clip=clip,
        importance_level=importance_level,
        num_sequences=num_sequences,
    )


def la_tb(
    op: str,
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None,
    old_logps: Tensor | None,
    clip: tuple[float, float],
    importance_level: ImportanceLevel,
    num_sequences: int | None,
) -> LATBOutput:
    """``la_tb_loss`` under the name ``op`` of the public function that was called, for the error messages."""
    inputs = (logps, base_logps, log_z, cu_seqlens, psi, old_logps)
    options = check_la_tb(
        op, *inputs, alpha=alpha, clip=clip, importance_level=importance_level, num_sequences=num_sequences
    )
    if not _has_kernel(op, logps.device.type):
        return LATBOutput(*_la_tb_torch(*inputs, *options))
    if torch.compiler.is_compiling():
        return LATBOutput(*torch.ops.powerflow_fast.la_tb(*inputs, *options)[:4])
    return LATBOutput(*_LATBFunction.apply(*inputs, *options))


def check_la_tb(
    op: str,
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    psi: Tensor | None,
    old_logps: Tensor | None,
    *,
    alpha: float,
    clip: tuple[float, float],
    importance_level: ImportanceLevel,
    num_sequences: int | None,
) -> tuple[float, float, float, bool, int]:
    """Raise on anything the op cannot take; return its options: alpha, clip, length-normalised, the divisor or 0."""
    _check_tensors(op, logps, base_logps, log_z, cu_seqlens, psi, old_logps)
    alpha = require_positive(op, "alpha", alpha)
    low, high = check_clip(op, clip)
    if importance_level not in ("sequence", "length_normalized"):
        raise ValueError(f"{op}: importance_level must be 'sequence' or 'length_normalized', got {importance_level!r}")
    if num_sequences is None:
        num_sequences = 0
    elif isinstance(num_sequences, bool) or not isinstance(num_sequences, int):
        raise TypeError(f"{op}: num_sequences must be an int or None, got {type(num_sequences).__name__}")
    elif num_sequences < 0:
        raise ValueError(f"{op}: num_sequences must be >= 0, got {num_sequences}")
    return alpha, low, high, importance_level == "length_normalized", num_sequences


def _la_tb_torch(
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    psi: Tensor | None,
    old_logps: Tensor | None,
    alpha: float,
    low: float,
    high: float,
    length_normalized: bool,
    num_sequences: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op without its gradients, which autograd makes: for devices that the compiled library has no code for."""
    length = cu_seqlens.diff()
    has_tokens = length > 0
    divisor = length.clamp(min=1).double()
    logp = segment_sum(logps.double(), cu_seqlens)
    target = base_logps.detach().double() / divisor
    if psi is not None:
        target = target + psi.detach()
    delta = (log_z + logp / divisor - alpha * target).where(has_tokens, 0.0)
    weight = has_tokens.double()
    if old_logps is not None:
        log_ratio = logp.detach() - old_logps.detach()
        if length_normalized:
            log_ratio = log_ratio / divisor
        bounds = (math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
        weight = log_ratio.clamp(*bounds).exp().where(has_tokens, 0.0)
    n = num_sequences if num_sequences > 0 else has_tokens.sum().clamp(min=1)
    loss = (weight * delta.square()).sum() / n
    return tuple(x.to(logps.dtype) for x in (loss, delta.detach(), weight, (logp / divisor).detach()))


_warned: set[str] = set()


def _has_kernel(op: str, device_type: str) -> bool:
    status = extension_status()
    if status.available and (device_type in ("cpu", "meta") or (device_type == "cuda" and status.cuda)):
        return True
    if device_type not in _warned and not torch.compiler.is_compiling():
        _warned.add(device_type)
        warnings.warn(
            f"{op} runs in plain torch on {device_type}: the compiled op is {status.reason}"
            if status.available
            else f"{op} runs in plain torch: {status.reason}",
            RuntimeWarning,
            stacklevel=4,
        )
    return False


def _check_tensors(
    op: str,
    logps: Tensor,
    base_logps: Tensor,
    log_z: Tensor,
    cu_seqlens: Tensor,
    psi: Tensor | None,
    old_logps: Tensor | None,
) -> None:
    if not isinstance(logps, Tensor):
        raise TypeError(f"{op}: logps must be a torch.Tensor, got {type(logps).__name__}")
    if logps.dim() != 1:
        raise ValueError(f"{op}: logps must have shape (N,), got {tuple(logps.shape)}")
    check_cu_seqlens(op, cu_seqlens, logps.shape[0])
    if logps.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: logps must be torch.float32 or torch.float64, got {logps.dtype}")
    batch = cu_seqlens.shape[0] - 1
    for name, tensor in (("base_logps", base_logps), ("log_z", log_z), ("psi", psi), ("old_logps", old_logps)):
        if tensor is None and name in ("psi", "old_logps"):
            continue
        require_tensor(op, name, tensor, shape=(batch,), symbols="(B,)", dtypes=(logps.dtype,))
        if tensor.device != logps.device:
            raise ValueError(f"{op}: {name} must be on logps' device {logps.device}, got {tensor.device}")
    if cu_seqlens.device != logps.device:
        raise ValueError(f"{op}: cu_seqlens must be on logps' device {logps.device}, got {cu_seqlens.device}")


class _LATBFunction(torch.autograd.Function):
    """The compiled op for eager callers: a step is a few microseconds of arithmetic, and autograd of a registered op
    spends several times as long on its arguments as this class does."""

    @staticmethod
    def forward(ctx, *arguments):
        loss, *constants, d_logps, d_log_z = torch.ops.powerflow_fast.la_tb(*arguments)
        _save(ctx, constants, d_logps, d_log_z)
        return loss, *constants

    @staticmethod
    def backward(ctx, d_loss, *_):
        return _backward(ctx, d_loss)


def _setup_context(ctx, inputs, output) -> None:
    _, *constants, d_logps, d_log_z = output
    _save(ctx, (*constants, d_logps, d_log_z), d_logps, d_log_z)


def _save(ctx, constants: Sequence[Tensor], d_logps: Tensor, d_log_z: Tensor) -> None:
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)  # no zeros for the outputs without a gradient
    ctx.save_for_backward(d_logps, d_log_z)


def _backward(ctx, d_loss, *_):
    grads: list[Tensor | None] = [None] * 11
    wanted = [position for position in (0, 2) if ctx.needs_input_grad[position]]
    if d_loss is not None and wanted:
        units = dict(zip((0, 2), ctx.saved_tensors, strict=True))
        with torch.no_grad():
            scaled = torch._foreach_mul([units[position] for position in wanted], d_loss)  # one launch for both
        for position, grad in zip(wanted, scaled, strict=True):
            grads[position] = refuse_second_derivative("la_tb_loss", grad)
    return tuple(grads)


if extension_status().available:
    torch.library.register_autograd("powerflow_fast::la_tb", _backward, setup_context=_setup_context)


@torch.no_grad()
def group_log_z(
    logps: Tensor,
    base_logps: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: ImportanceLevel = "sequence",
) -> Tensor:
    """log Z' of each completion's prompt, estimated from the completions of that prompt. In plain torch, for group g:

        members = (group_ids == g) & (length > 0)
        log_z[group_ids == g] = (w * (alpha * (r + psi) - s))[members].sum() / w[members].sum()

    with s, r and w as in ``la_tb_loss``. It is the value that minimises the group's loss, which makes
    ``la_tb_loss(..., log_z=group_log_z(...))`` the log-variance form of LA-TB: no head to train.

    Args:
        group_ids: (B,) int64, equal for the completions of one prompt; any values, in any order.
        others: as in ``la_tb_loss``. No input gets a gradient.

    Returns:
        (B,) detached, logps' dtype, nats per token; 0 for a group without a token. A group must be in one call: the
        mean over a part of it is another number. The sums have a fixed order: same input, same bits, on CUDA too.

    Raises:
        TypeError, ValueError: as ``la_tb_loss``.

    Source: the log-variance (VarGrad) form of trajectory balance, Richter et al. 2020 (arXiv 2010.10436).
    """
    op = "group_log_z"
    zero = torch.zeros_like(base_logps) if isinstance(base_logps, Tensor) else base_logps
    # with log_z = 0 the residual is the negative of what the mean is taken of
    out = la_tb(
        op,
        logps,
        base_logps,
        zero,
        cu_seqlens,
        alpha=alpha,
        psi=psi,
        old_logps=old_logps,
        clip=clip,
        importance_level=importance_level,
        num_sequences=1,
    )
    shape = tuple(base_logps.shape)
    require_tensor(op, "group_ids", group_ids, shape=shape, symbols="(B,)", dtypes=(torch.int64, torch.int32))
    if group_ids.device != logps.device:
        raise ValueError(f"{op}: group_ids must be on logps' device {logps.device}, got {group_ids.device}")

    # Groups become segments of a stable order: fixed sums on any device, and no wait for the number of groups.
    order = torch.argsort(group_ids, stable=True)
    ids = group_ids[order]
    rank = torch.zeros_like(order)
    rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    batch = torch.arange(len(order) + 1, device=order.device)
    offsets = torch.searchsorted(rank, batch, out_int32=True)
    weight = out.weight[order].double()
    weighted = segment_sum(weight * -out.delta[order], offsets)
    total = segment_sum(weight, offsets)
    # a total of zero: no member with tokens, or every weight clipped to zero
    log_z = (weighted / total).where(total != 0, 0.0)
    return log_z[rank][torch.argsort(order)].to(logps.dtype)
