"""Log-probabilities of tokens under a linear head, without the [tokens, vocabulary] matrix of logits.

``linear_logprobs`` is the differentiable core; ``sequence_logprobs`` sums it over packed sequences and
``linear_logprob_stats`` adds entropy, log-sum-exp and mean logit, for monitoring and confidence rewards, from the same
pass.
"""

from __future__ import annotations

import types
from typing import NamedTuple

import torch
from torch import Tensor

from . import chunked as torch_backend
from .dispatch import Backend, check_linear_inputs, require_tensor, resolve_backend, values_are_readable
from .kernels.interface import ForwardOutput, HeadSums, LogitTransform, RowExponentials, RowStatistics, kept_width

__all__ = ["LogprobStats", "linear_logprob_stats", "linear_logprobs", "sequence_logprobs"]


class LogprobStats(NamedTuple):
    """Log-probs and statistics, each (N,) fp32, in nats; zeros at ignored rows."""

    logp: Tensor
    """differentiable; the others are not"""
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor


def implementation_for(backend: Backend, hidden: Tensor) -> types.SimpleNamespace | types.ModuleType:
    """The launchers of the backend that will run."""
    if resolve_backend(backend, hidden.device, hidden.dtype) == "torch":
        return torch_backend
    from .kernels.linear_logprob_bwd import linear_logprob_bwd, linear_logprob_bwd_exps
    from .kernels.linear_logprob_exps import kept_dtype, linear_logprob_fwd_d_hidden, linear_logprob_fwd_exps
    from .kernels.linear_logprob_fwd import linear_logprob_fwd
    from .kernels.scale import scaled

    return types.SimpleNamespace(
        linear_logprob_fwd=linear_logprob_fwd,
        linear_logprob_fwd_d_hidden=linear_logprob_fwd_d_hidden,
        linear_logprob_fwd_exps=linear_logprob_fwd_exps,
        linear_logprob_bwd=linear_logprob_bwd,
        linear_logprob_bwd_exps=linear_logprob_bwd_exps,
        kept_dtype=kept_dtype,
        scaled=scaled,
    )


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


def check_cache_bytes(op: str, cache_bytes: int | None) -> None:
    if cache_bytes is None:
        return
    if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
        raise TypeError(f"{op}: cache_bytes must be an int, got {type(cache_bytes).__name__}")
    if cache_bytes < 0:
        raise ValueError(f"{op}: cache_bytes must be >= 0, got {cache_bytes}")


def autocast_inputs(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Inside ``torch.autocast`` a head takes part as ``torch.nn.Linear`` does: its operands in the autocast dtype."""
    if not isinstance(tensors[0], Tensor):
        return tensors  # the check that follows names it
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t is not None and t.is_floating_point() else t for t in tensors)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
    cache_bytes: int | None = None,
) -> Tensor:
    """Log-probability of each label under a linear head. In plain torch:

        z = logit_scale * torch.nn.functional.linear(hidden, weight, bias).float()
        if logit_softcap is not None:
            z = logit_softcap * torch.tanh(z / logit_softcap)
        logp = torch.log_softmax(z / temperature, -1).gather(-1, labels[:, None])[:, 0]

    but without the (N, V) logits, with fp32 logits whatever the dtype of the inputs, and exact where ``log_softmax``
    is not: a token whose probability is within 1e-8 of one keeps a non-zero log-prob and gradient.

    Args:
        hidden: (N, H) fp32, bf16 or fp16; the hidden state that predicts each label. Gradient: yes.
        weight: (V, H), hidden's dtype and device. Gradient: yes, accumulated in fp32. May be tied to an embedding.
        labels: (N,) int64 in [0, V), or ``ignore_index``: such a row gives 0.0 and no gradient.
        bias: (V,) or None. Gradient: yes.
        temperature: the *sampling* temperature (> 0); the log-probs are those of ``softmax(z / temperature)``.
        logit_scale: factor on the logits (Cohere multiplies by it, Granite divides by ``logits_scaling``).
        logit_softcap: bound of ``cap · tanh(z / cap)`` (Gemma), or None.
        ignore_index: label of rows to leave out.
        backend: ``"auto"`` (Triton on a CUDA device of capability >= 8.0, else torch), or one of them by name.
        cache_bytes: with a trainable head, memory in which exponentials of the logits may wait for the backward pass
            instead of being recomputed: V elements per row, in hidden's dtype, or fp32 on a CPU that doesn't multiply
            bf16 natively; float16 is never kept. None: 0, except for bf16 on a CPU that multiplies it, where all rows
            are kept if they fit into 256 MiB and the 4·V·H bytes of fp32 sums that this saves.

    Returns:
        (N,) fp32, nats.

    Inputs that need no gradient cost nothing. FLOP: 2NVH without gradients; 4NVH forward and backward when only
    ``hidden`` needs one (the gradient is produced in the forward pass, N·H elements are saved); 8NVH for a trainable
    head, 6NVH for the rows that ``cache_bytes`` holds. Extra memory: one tile buffer (CPU: 32 MiB, and as much again
    with a softcap) plus 4·H bytes per row of a tile; a trainable half-precision head adds 4·V·H bytes to sum its
    gradient in fp32. None of it but the cache grows with N. ``linear_la_tb_loss`` trains a head at 6NVH with a bounded
    cache.
    Under ``torch.autocast`` hidden, weight and bias are cast to the autocast dtype, as for ``torch.nn.Linear``.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or range. Label values are checked on
            a CPU only; on a GPU, where a check would wait for the device, a label outside [0, V) gives NaN.
        BackendUnavailableError: the backend asked for by name cannot run here; the message says why.

    Source: the method's s and r terms, PowerFlow (arXiv 2603.18363); the tiling is ours.
    """
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments = (hidden, weight, labels, bias, transform, ignore_index, backend, cache_bytes)
    return _scored("linear_logprobs", *arguments, need_stats=False)[0]


def _scored(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    transform: LogitTransform,
    ignore_index: int,
    backend: Backend,
    cache_bytes: int | None,
    *,
    need_stats: bool,
) -> tuple[Tensor, ...]:
    """Log-probs, and the three of `RowStatistics` if they are needed."""
    if torch.compiler.is_compiling():
        from .compiled import scored  # instead of a graph break; it imports this module

        return scored(
            op, hidden, weight, labels, bias, transform, ignore_index, backend, cache_bytes, need_stats=need_stats
        )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    transform = check_linear_inputs(op, hidden, weight, labels, bias, transform, ignore_index)
    check_cache_bytes(op, cache_bytes)
    implementation = implementation_for(backend, hidden)
    if cache_bytes is None:
        cache_bytes = usual_cache_bytes(hidden, weight, implementation)
    head = (hidden, weight, labels, bias, transform, ignore_index)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias)):
        out = LinearLogprobsFunction.apply(*head, implementation, cache_bytes, need_stats)
        return out if need_stats else (out,)
    out = implementation.linear_logprob_fwd(*head, stats=need_stats)
    return (out.logp, *(out.stats or ()))


def sequence_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Tensor:
    """Log-probability of each packed sequence: the sum of its tokens' ``linear_logprobs``.

    Equals ``torch.stack([linear_logprobs(...)[a:b].sum() for a, b in zip(cu_seqlens[:-1], cu_seqlens[1:])])`` with the
    sums taken in fp64, since a sum of thousands of tokens in fp32 loses the digits that an importance ratio needs.

    Args:
        cu_seqlens: (B+1,) int32, from 0 to N, not decreasing: sequence b is rows cu_seqlens[b] to cu_seqlens[b+1].
            An empty sequence gives 0.
        others: as in ``linear_logprobs``, with the same gradients, memory and errors.

    Returns:
        (B,) fp32, nats.
    """
    logp = linear_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        ignore_index=ignore_index,
        backend=backend,
    )
    check_cu_seqlens("sequence_logprobs", cu_seqlens, logp.shape[0])
    return segment_sum(logp, cu_seqlens)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum of ``values`` (N,) over each packed sequence, (B,), accumulated in fp64, deterministic, differentiable."""
    if cu_seqlens.shape[0] == 1:
        return values[:0]
    # unsafe=True skips a check of the offsets that would make the host wait for a GPU.
    sums = torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.long(), unsafe=True, initial=0.0)
    return sums.to(values.dtype)


def check_cu_seqlens(op: str, cu_seqlens: Tensor, n: int) -> None:
    """Shape and dtype always, values on a CPU only."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: cu_seqlens must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{op}: cu_seqlens must have shape (B+1,), got {tuple(cu_seqlens.shape)}")
    require_tensor(op, "cu_seqlens", cu_seqlens, shape=cu_seqlens.shape, symbols="(B+1,)", dtypes=(torch.int32,))
    if not values_are_readable(cu_seqlens):
        return
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != n or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(
            f"{op}: cu_seqlens must rise from 0 to N={n} without decreasing, got {cu_seqlens[:8].tolist()}"
            f"{'...' if cu_seqlens.shape[0] > 8 else ''} ending in {int(cu_seqlens[-1])}"
        )


def linear_logprob_stats(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
    backend: Backend = "auto",
    cache_bytes: int | None = None,
) -> LogprobStats:
    """``linear_logprobs`` with log-sum-exp, entropy and mean logit of each row, from the same pass over the vocabulary.

    With ``z`` (N, V) the scaled, capped and tempered logits of ``linear_logprobs``:

        logp = log_softmax(z)[labels]      lse = logsumexp(z)      entropy = -(softmax(z) * log_softmax(z)).sum(-1)
        mean_logit = z.mean(-1)            so that lse - mean_logit = KL(uniform || p) + log V, Intuitor's confidence

    A training step can log them for two more sums per logit: no product of matrices is added. Where no gradient is
    wanted, ``torch.no_grad()`` saves the products of the backward pass, as with ``linear_logprobs``.

    Arguments, memory and errors are those of ``linear_logprobs``.

    Returns:
        LogprobStats: logp with the gradients of ``linear_logprobs``, the others without; each (N,) fp32, 0 at ignored
        rows.
    """
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments = (hidden, weight, labels, bias, transform, ignore_index, backend, cache_bytes)
    return LogprobStats(*_scored("linear_logprob_stats", *arguments, need_stats=True))
