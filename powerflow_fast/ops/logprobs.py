"""Log-probabilities of tokens under a linear head, without the [tokens, vocabulary] matrix of logits.

``linear_logprobs`` is the differentiable core; ``sequence_logprobs`` sums it over packed sequences and
``linear_logprob_stats`` adds entropy, log-sum-exp and mean logit, for monitoring and confidence rewards, from the same
pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.interface import HeadCall, LogitTransform
from . import logprobs_custom_ops
from .backends import Backend, implementation_for
from .checks import autocast_inputs, check_cache_bytes, check_head
from .logprobs_autograd import LinearLogprobsFunction, Needs, usual_cache_bytes
from .segments import check_cu_seqlens, segment_sum


class LogprobStats(NamedTuple):
    """Log-probs and statistics, each (N,) fp32, in nats; zeros at ignored rows."""

    logp: Tensor
    """differentiable; the others are not"""
    lse: Tensor
    entropy: Tensor
    mean_logit: Tensor


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
    call = HeadCall(hidden, weight, labels, bias, transform, ignore_index)
    return scored("linear_logprobs", call, backend, cache_bytes, stats=False)[0]


def scored(
    op: str, call: HeadCall, backend: Backend, cache_bytes: int | None, *, stats: bool, by_operator: bool = False
) -> tuple[Tensor, ...]:
    """Log-probs, and the three of `RowStatistics` if wanted.

    ``by_operator``: through the operators of logprobs_custom_ops, which give the same bits, as where a compiler traces.
    """
    compiling = torch.compiler.is_compiling()
    hidden, weight, bias = autocast_inputs(call.hidden, call.weight, call.bias)
    # A compiler may hold the numbers as symbols, which cannot be checked: the operators check them when they run.
    # (It takes literals for constants, and defaults of LogitTransform for symbols too.)
    transform = LogitTransform(1.0, 1.0, None) if compiling else call.transform
    checked = check_head(op, HeadCall(hidden, weight, call.labels, bias, transform, call.ignore_index))
    check_cache_bytes(op, cache_bytes)
    with_gradient = torch.is_grad_enabled()
    needs = Needs(*(with_gradient and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    if not needs.head or (compiling and cache_bytes is None):  # what is kept by itself has sizes that no graph knows
        cache_bytes = 0
    if compiling:
        call = HeadCall(hidden, weight, call.labels, bias, call.transform, call.ignore_index)
        return logprobs_custom_ops.scored(call, backend, needs, cache_bytes, stats=stats)
    implementation = implementation_for(backend, hidden)
    if cache_bytes is None:
        cache_bytes = usual_cache_bytes(hidden, weight, implementation)
    if by_operator:
        return logprobs_custom_ops.scored(checked, backend, needs, cache_bytes, stats=stats)
    if any(needs):
        out = LinearLogprobsFunction.apply(*checked, implementation, cache_bytes, stats)
        return out if stats else (out,)
    out = implementation.linear_logprob_fwd(checked, stats=stats)
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
    call = HeadCall(hidden, weight, labels, bias, transform, ignore_index)
    return LogprobStats(*scored("linear_logprob_stats", call, backend, cache_bytes, stats=True))
