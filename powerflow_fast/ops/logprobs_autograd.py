"""Log-probs of a linear head and their gradients: which passes run for which gradients.

`forward` and `backward` are plain functions. The autograd function below and the operators of logprobs_custom_ops are
shells around them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import (
    ForwardOutput,
    HeadBackend,
    HeadCall,
    HeadSums,
    RowExponentials,
    RowStatistics,
    kept_width,
)
from . import torch_backend


class _RefuseSecondDerivative(torch.autograd.Function):
    """Identity on a gradient that is a constant to autograd; whoever differentiates it again gets an error."""

    @staticmethod
    def forward(ctx, gradient, anchor, op):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(
            f"{ctx.op}: second derivatives are not available; the *_ref functions in powerflow_fast.kernels can be "
            "differentiated twice"
        )


def refuse_second_derivative(op: str, gradient: Tensor | None) -> Tensor | None:
    """``gradient``, made by hand in a backward pass, such that differentiating it is an error and not a silent zero."""
    # Grad mode is on in a backward pass only if its own graph is wanted (create_graph=True).
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _RefuseSecondDerivative.apply(gradient, torch.zeros((), requires_grad=True), op)


CPU_CACHE_BYTES = 256 * 2**20


def bytes_of_all(hidden: Tensor, weight: Tensor, implementation: HeadBackend, most: int) -> int:
    """What the exponentials of all rows take, if that is at most ``most`` and the 4·V·H bytes of a bf16 head's gradient
    in fp32, which a pass over all rows at once saves; else 0."""
    if hidden.dtype != torch.bfloat16:
        return 0
    whole = hidden.shape[0] * kept_width(weight.shape[0]) * implementation.kept_dtype(hidden).itemsize
    return whole if whole <= most + 4 * weight.numel() else 0


def usual_cache_bytes(hidden: Tensor, weight: Tensor, implementation: HeadBackend) -> int:
    """As `linear_logprobs` says of ``cache_bytes``."""
    on_cpu = hidden.device.type == "cpu" and implementation is torch_backend
    if not on_cpu or implementation.kept_dtype(hidden) != hidden.dtype:
        return 0
    return bytes_of_all(hidden, weight, implementation, CPU_CACHE_BYTES)


def kept_rows(cache_bytes: int, hidden: Tensor, weight: Tensor, implementation: HeadBackend) -> int:
    """Rows whose exponentials fit into ``cache_bytes``.

    None of float16: its range is too short for exponentials whose factor comes only later.
    """
    if cache_bytes == 0 or hidden.dtype == torch.float16:
        return 0
    return cache_bytes // (kept_width(weight.shape[0]) * implementation.kept_dtype(hidden).itemsize)


class Needs(NamedTuple):
    """Which inputs need a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


class Saved(NamedTuple):
    """What a forward pass leaves to the backward pass, besides its inputs."""

    unit: Tensor | None = None
    """(N, H) ∂ logp/∂ hidden. With it nothing else is needed, not even the inputs."""
    rows: Tensor | None = None
    """numbers of the rows that count: first those that ``exps`` holds, then those whose logits are formed anew"""
    exps: Tensor | None = None
    scale: Tensor | None = None
    """of `RowExponentials`"""
    logp: Tensor | None = None
    anchor: Tensor | None = None
    others_sum: Tensor | None = None
    """of the `ForwardOutput` of the rows whose logits are formed anew: all, unless there are ``rows``"""


def forward(
    call: HeadCall, implementation: HeadBackend, needs: Needs, cache_bytes: int, *, stats: bool
) -> tuple[Tensor, RowStatistics | None, Saved]:
    """Log-probs, statistics if wanted, and what `backward` needs, by the cheapest pass for the gradients to come.

    Only ``hidden``: the gradient is made at once up to the upstream factor, and `backward` scales its rows (4NVH FLOP
    in all, N·H saved). Otherwise three numbers per row are kept and `backward` forms the logits anew (8NVH when both
    hidden and weight are trained), except for the rows whose exponentials fit into ``cache_bytes`` (6NVH).
    """
    hidden, weight, labels, ignore_index = call.hidden, call.weight, call.labels, call.ignore_index
    if needs.hidden and not needs.head:
        out = implementation.linear_logprob_fwd_d_hidden(call, stats=stats)
        return out.logp, out.stats, Saved(unit=out.unit)
    count = kept_rows(cache_bytes, hidden, weight, implementation) if needs.head else 0
    if count == 0:
        out = implementation.linear_logprob_fwd(call, stats=stats)
        return out.logp, out.stats, Saved(None, None, None, None, *out[:3])
    # the budget is for rows that count; to find them the host waits for the device
    rows = (labels != ignore_index).nonzero()[:, 0]
    kept, rest = rows[:count], rows[count:]
    exps = implementation.linear_logprob_fwd_exps(call.of_rows(kept), stats=stats)
    out = implementation.linear_logprob_fwd(call.of_rows(rest), stats=stats)

    def joined(first: Tensor, second: Tensor) -> Tensor:
        return exps.logp.new_zeros(labels.shape).index_copy_(0, rows, torch.cat([first, second]))

    statistics = RowStatistics(*map(joined, exps.stats, out.stats)) if stats else None
    return joined(exps.logp, out.logp), statistics, Saved(None, rows, exps.exps, exps.scale, *out[:3])


def scaled_unit(unit: Tensor, d_logp: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of a hidden state of ``dtype``, from ``Saved.unit``."""
    return torch.mul(unit, d_logp[:, None]).to(dtype)


def backward(
    call: HeadCall, implementation: HeadBackend, needs: Needs, saved: Saved, d_logp: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, None where not needed; for a ``saved.unit`` there is `scaled_unit`."""
    hidden, weight, bias = call.hidden, call.weight, call.bias
    again = ForwardOutput(saved.logp, saved.anchor, saved.others_sum)
    wanted = {"need_d_hidden": needs.hidden, "need_d_weight": needs.weight, "need_d_bias": needs.bias}
    if saved.rows is None:
        return implementation.linear_logprob_bwd(call, again, d_logp, **wanted)
    kept, rest = saved.rows[: saved.exps.shape[0]], saved.rows[saved.exps.shape[0] :]
    own_dtype = not rest.numel() and hidden.dtype == torch.bfloat16  # one product is all there is to sum
    sums = HeadSums.like(weight if needs.weight else None, bias if needs.bias else None, own_dtype=own_dtype)
    exps = RowExponentials(d_logp, saved.exps, saved.scale)
    parts = [
        implementation.linear_logprob_bwd_exps(
            hidden[kept], weight, exps, d_logp[kept], need_d_hidden=needs.hidden, add_to=sums
        )
    ]
    if rest.numel():
        others = call.of_rows(rest)
        part, _, _ = implementation.linear_logprob_bwd(others, again, d_logp[rest], **wanted, add_to=sums)
        parts.append(part)
    d_hidden = torch.zeros_like(hidden).index_copy_(0, saved.rows, torch.cat(parts)) if needs.hidden else None
    d_weight, d_bias = sums.finished()
    return (
        d_hidden,
        d_weight.to(weight.dtype) if needs.weight else None,
        d_bias.to(bias.dtype) if needs.bias else None,
    )


class LinearLogprobsFunction(torch.autograd.Function):
    """`forward` and `backward` for autograd: log-probs, and after them the three of `RowStatistics` if wanted."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, ignore_index, implementation, cache_bytes, stats):
        ctx.needs = Needs(*(ctx.needs_input_grad[i] for i in (0, 1, 3)))
        call = HeadCall(hidden, weight, labels, bias, transform, ignore_index)
        logp, statistics, saved = forward(call, implementation, ctx.needs, cache_bytes, stats=stats)
        ctx.save_for_backward(*(call[:4] if saved.unit is None else [None] * 4), *saved)
        ctx.options, ctx.implementation, ctx.dtype = call[4:], implementation, hidden.dtype
        ctx.set_materialize_grads(False)
        if statistics is None:
            return logp
        ctx.mark_non_differentiable(*statistics)
        return logp, *statistics

    @staticmethod
    def backward(ctx, d_logp, *_):
        if d_logp is None:
            return (None,) * 9
        inputs, saved = ctx.saved_tensors[:4], Saved(*ctx.saved_tensors[4:])
        with torch.no_grad():
            if saved.unit is not None:
                gradients = scaled_unit(saved.unit, d_logp, ctx.dtype), None, None
            else:
                gradients = backward(HeadCall(*inputs, *ctx.options), ctx.implementation, ctx.needs, saved, d_logp)
        d_hidden, d_weight, d_bias = (refuse_second_derivative("linear_logprobs", g) for g in gradients)
        return d_hidden, d_weight, None, d_bias, *[None] * 5
