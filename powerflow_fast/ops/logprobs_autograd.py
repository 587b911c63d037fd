"""Which passes run for which gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.interface import ForwardOutput, HeadSums, RowExponentials, RowStatistics, kept_width
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


def bytes_of_all(hidden: Tensor, weight: Tensor, implementation: object, most: int) -> int:
    """What the exponentials of all rows take, if that is at most ``most`` and the 4·V·H bytes of a bf16 head's gradient
    in fp32, which a pass over all rows at once saves; else 0."""
    if hidden.dtype != torch.bfloat16:
        return 0
    whole = hidden.shape[0] * kept_width(weight.shape[0]) * implementation.kept_dtype(hidden).itemsize
    return whole if whole <= most + 4 * weight.numel() else 0


def usual_cache_bytes(hidden: Tensor, weight: Tensor, implementation: object) -> int:
    """As `linear_logprobs` says of ``cache_bytes``; 0 in compiled code, whose sizes would depend on the labels."""
    on_cpu = hidden.device.type == "cpu" and implementation is torch_backend
    if not on_cpu or torch.compiler.is_compiling() or implementation.kept_dtype(hidden) != hidden.dtype:
        return 0
    return bytes_of_all(hidden, weight, implementation, CPU_CACHE_BYTES)


def kept_rows(cache_bytes: int, hidden: Tensor, weight: Tensor, implementation: object) -> int:
    """Rows whose exponentials fit into ``cache_bytes``.

    None of float16: its range is too short for exponentials whose factor comes only later.
    """
    if cache_bytes == 0 or hidden.dtype == torch.float16:
        return 0
    return cache_bytes // (kept_width(weight.shape[0]) * implementation.kept_dtype(hidden).itemsize)


class LinearLogprobsFunction(torch.autograd.Function):
    """Chooses the cheapest pass for the inputs that need a gradient.

    Only ``hidden``: the gradient is made in the forward pass up to the upstream factor, and backward scales its rows
    (4NVH FLOP in all, N·H saved). Otherwise: forward saves three numbers per row and backward recomputes the logits
    (8NVH when both hidden and weight are trained), except for the rows whose exponentials fit into ``cache_bytes``
    (6NVH). ``need_stats``: after the log-probs come their `RowStatistics`, from the same pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias, transform, ignore_index, implementation, cache_bytes, need_stats):
        logp, stats = LinearLogprobsFunction._scores(
            ctx, hidden, weight, labels, bias, transform, ignore_index, implementation, cache_bytes, need_stats
        )
        ctx.set_materialize_grads(False)
        if stats is None:
            return logp
        ctx.mark_non_differentiable(*stats)
        return logp, *stats

    @staticmethod
    def _scores(ctx, hidden, weight, labels, bias, transform, ignore_index, implementation, cache_bytes, need_stats):
        needs = ctx.needs_input_grad
        ctx.dtype = hidden.dtype
        ctx.only_hidden = needs[0] and not needs[1] and not needs[3]
        if ctx.only_hidden:
            out = implementation.linear_logprob_fwd_d_hidden(
                hidden, weight, labels, bias, transform, ignore_index, stats=need_stats
            )
            ctx.save_for_backward(out.unit)
            return out.logp, out.stats
        ctx.transform, ctx.ignore_index, ctx.implementation = transform, ignore_index, implementation
        count = kept_rows(cache_bytes, hidden, weight, implementation)
        if count == 0:
            out = implementation.linear_logprob_fwd(
                hidden, weight, labels, bias, transform, ignore_index, stats=need_stats
            )
            ctx.save_for_backward(hidden, weight, labels, bias, None, None, None, *out[:3])
            return out.logp, out.stats
        # the budget is for rows that count; to find them the host waits for the device
        rows = (labels != ignore_index).nonzero()[:, 0]
        kept, rest = rows[:count], rows[count:]
        exps = implementation.linear_logprob_fwd_exps(
            hidden[kept], weight, labels[kept], bias, transform, stats=need_stats
        )
        out = implementation.linear_logprob_fwd(
            hidden[rest], weight, labels[rest], bias, transform, ignore_index, stats=need_stats
        )
        ctx.save_for_backward(hidden, weight, labels, bias, rows, exps.exps, exps.scale, *out[:3])

        def joined(ours, others):
            return exps.logp.new_zeros(labels.shape).index_copy_(0, rows, torch.cat([ours, others]))

        stats = RowStatistics(*map(joined, exps.stats, out.stats)) if need_stats else None
        return joined(exps.logp, out.logp), stats

    @staticmethod
    def backward(ctx, d_logp, *_):
        if d_logp is None:
            return (None,) * 9
        with torch.no_grad():
            d_hidden, d_weight, d_bias = LinearLogprobsFunction._gradients(ctx, d_logp)
        grads = (refuse_second_derivative("linear_logprobs", g) for g in (d_hidden, d_weight, d_bias))
        d_hidden, d_weight, d_bias = grads
        return d_hidden, d_weight, None, d_bias, *[None] * 5

    @staticmethod
    def _gradients(ctx, d_logp):
        if ctx.only_hidden:
            (unit,) = ctx.saved_tensors
            return torch.mul(unit, d_logp[:, None]).to(ctx.dtype), None, None
        hidden, weight, labels, bias, rows, exps, scale, *forward = ctx.saved_tensors
        need_d_hidden, need_d_weight, need_d_bias = (ctx.needs_input_grad[i] for i in (0, 1, 3))
        needs = {"need_d_weight": need_d_weight, "need_d_bias": need_d_bias, "need_d_hidden": need_d_hidden}
        options = (bias, ctx.transform, ctx.ignore_index, ForwardOutput(*forward))
        if rows is None:
            return ctx.implementation.linear_logprob_bwd(hidden, weight, labels, *options, d_logp, **needs)
        kept, rest = rows[: exps.shape[0]], rows[exps.shape[0] :]
        own_dtype = not rest.numel() and hidden.dtype == torch.bfloat16  # one product is all there is to sum
        sums = HeadSums.like(weight if need_d_weight else None, bias if need_d_bias else None, own_dtype=own_dtype)
        parts = [
            ctx.implementation.linear_logprob_bwd_exps(
                *(hidden[kept], weight, RowExponentials(d_logp, exps, scale), d_logp[kept]),
                need_d_hidden=need_d_hidden,
                add_to=sums,
            )
        ]
        if rest.numel():
            d_rest, _, _ = ctx.implementation.linear_logprob_bwd(
                hidden[rest], weight, labels[rest], *options, d_logp[rest], **needs, add_to=sums
            )
            parts.append(d_rest)
        d_hidden = torch.zeros_like(hidden).index_copy_(0, rows, torch.cat(parts)) if need_d_hidden else None
        d_weight, d_bias = sums.finished()
        return (
            d_hidden,
            d_weight.to(weight.dtype) if need_d_weight else None,
            d_bias.to(bias.dtype) if need_d_bias else None,
        )
