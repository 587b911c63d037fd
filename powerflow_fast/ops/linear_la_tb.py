"""The LA-TB loss from hidden states, with its gradients made in the same pass over the vocabulary.

The gradient of a token's logits needs the residual of its whole sequence, which is known once the sequence has been
scored. Scoring and differentiating chunk by chunk, each of complete sequences (or of whole groups, where log Z' is the
group's), the exponentials of the logits are still at hand when their factor is: a trainable head costs 6NVH FLOP
instead of the 8NVH of a loss that gets its log-probs from elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..kernels.interface import HeadBackend, HeadCall, HeadSums, LogitTransform, kept_width
from .backends import Backend, implementation_for
from .checks import (
    ImportanceLevel,
    autocast_inputs,
    check_cache_bytes,
    check_head,
    require_tensor,
    values_are_readable,
)
from .la_tb import LATBOutput, check_la_tb, group_log_z, la_tb
from .logprobs import linear_logprobs
from .logprobs_autograd import CPU_CACHE_BYTES, bytes_of_all, kept_rows, refuse_second_derivative

# Rows per chunk that the products need to run at full speed, and bytes that hold as many for vocabularies of today.
_FEWEST_ROWS = 128
_CACHE_BYTES = {"cpu": CPU_CACHE_BYTES, "cuda": 2**30}
_WHOLE_BYTES = 2 * 2**30  # of exponentials on a GPU that has 16 times as much, where that makes one chunk of all rows

_NO_LABEL = torch.iinfo(torch.int64).min  # an ignore_index that ignores nothing


def linear_la_tb_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    base_logps: Tensor,
    log_z: Tensor | None,
    *,
    alpha: float,
    group_ids: Tensor | None = None,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: ImportanceLevel = "sequence",
    num_sequences: int | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    backend: Backend = "auto",
    cache_bytes: int | None = None,
) -> LATBOutput:
    """LA-TB loss of B packed completions from the hidden states that predict their tokens. In plain torch:

        logps = linear_logprobs(hidden, weight, labels, bias=bias, ...)
        if log_z is None:
            log_z = group_log_z(logps, base_logps, group_ids, cu_seqlens, alpha=alpha, ...)
        la_tb_loss(logps, base_logps, log_z, cu_seqlens, alpha=alpha, ...)

    and, where weight or bias need gradients, with all gradients made in the forward pass.

    Args:
        hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, backend: as in ``linear_logprobs``. Every
            row counts in its completion's length, so labels can't hold ``-100``: leave such rows out when packing (that
            is checked on a CPU).
        cu_seqlens: (B+1,) int32, from 0 to N, not decreasing. It and group_ids may be on the CPU when the other tensors
            are on a GPU: then the host never waits. Otherwise it does if the rows don't fit into ``cache_bytes``.
        base_logps, psi, old_logps: (B,) fp32, as in ``la_tb_loss``; no gradient.
        log_z: (B,) fp32 log Z' of each completion's prompt, with gradient, or None: the group's, without one.
        group_ids: (B,) int64, equal for the completions of one prompt; given if and only if log_z is None.
        alpha, clip, importance_level, num_sequences: as in ``la_tb_loss``.
        cache_bytes: bound on the exponentials that wait for their factor, V elements per row in hidden's dtype (fp32 on
            a CPU that doesn't multiply bf16 natively). None: 256 MiB on a CPU, 1 GiB on a GPU; for bf16 also as much as
            holds all rows, where that is at most so many bytes (2 GiB on a GPU with 32 GiB or more) and the sums of
            4·V·H bytes that it saves. Completions are cut into chunks that fit; a completion (or, without log_z, a
            group) that is too long for one is recomputed.

    Returns:
        LATBOutput: loss () and detached delta, weight, logp_mean (B,).

    Gradients: hidden, weight, bias, log_z. FLOP: 2NVH for each of the logits and of the gradients of hidden and weight;
    2NVH more for what is recomputed, and for float16, whose range is too short to keep exponentials. With a frozen
    head, 4NVH. Memory beyond that of ``linear_logprobs``: the cache, while the call lasts; then the gradients, N·H
    elements and 4·V·H bytes, or V·H elements where a bf16 problem was one chunk. Summed in a fixed order: same inputs,
    same bits. No second derivatives, and with a trainable head one backward pass per call (RuntimeError otherwise): it
    gives the gradients away.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as ``linear_logprobs`` and ``la_tb_loss``.

    Source: the loss is PowerFlow's (arXiv 2603.18363); the one-pass form is ours.
    """
    op = "linear_la_tb_loss"
    if isinstance(labels, Tensor) and values_are_readable(labels) and bool((labels == -100).any()):
        row = int((labels == -100).nonzero()[0])
        raise ValueError(
            f"{op}: labels must not hold ignored rows, got labels[{row}]=-100: "
            "every packed row counts in a completion's length"
        )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    transform = check_head(op, HeadCall(hidden, weight, labels, bias, transform, None)).transform
    if (log_z is None) == (group_ids is None):
        raise ValueError(
            f"{op}: exactly one of log_z and group_ids must be given, got {'neither' if log_z is None else 'both'}"
        )
    implementation = implementation_for(backend, hidden)
    if cache_bytes is None:
        cache_bytes = default_cache_bytes(hidden, weight, implementation)
    check_cache_bytes(op, cache_bytes)

    host_cu_seqlens, host_group_ids = cu_seqlens, None
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = cu_seqlens.to(hidden.device, non_blocking=True)
    loss_options = {"alpha": alpha, "clip": clip, "importance_level": importance_level}
    logps = hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))
    # group_log_z checks its own, but later: nothing expensive may run before all arguments are known to be good
    z = torch.zeros_like(base_logps) if log_z is None and isinstance(base_logps, Tensor) else log_z
    sequences = (base_logps, z, cu_seqlens, psi, old_logps)
    check_la_tb(op, logps, *sequences, **loss_options, num_sequences=num_sequences)
    if group_ids is not None:
        shape = tuple(base_logps.shape)
        require_tensor(op, "group_ids", group_ids, shape=shape, symbols="(B,)", dtypes=(torch.int64, torch.int32))
        host_group_ids = group_ids
        group_ids = group_ids.to(hidden.device, non_blocking=True)

    call = _Call(
        labels, transform, implementation, cu_seqlens, base_logps.detach(), group_ids, psi, old_logps, loss_options
    )
    trains_head = any(t is not None and t.requires_grad for t in (weight, bias))
    most = kept_rows(cache_bytes, hidden, weight, implementation)
    if torch.is_grad_enabled() and trains_head and most >= min(_FEWEST_ROWS, hidden.shape[0]) > 0:
        chunks, count = [(0, len(base_logps), 0, hidden.shape[0])], num_sequences
        if hidden.shape[0] > most:
            bounds = host_cu_seqlens.tolist()
            groups = None if host_group_ids is None else host_group_ids.tolist()
            chunks = list(chunks_of_sequences(bounds, groups, most))
            if not count:
                count = max(1, sum(a < b for a, b in itertools.pairwise(bounds)))
        return LATBOutput(*LinearLATBFunction.apply(hidden, weight, bias, log_z, call, chunks, most, count))
    options = {**transform._asdict(), "ignore_index": _NO_LABEL}
    logps = linear_logprobs(hidden, weight, labels, bias=bias, backend=backend, cache_bytes=0, **options)
    if log_z is None:
        log_z = call.group_log_z(logps.detach(), 0, len(base_logps))
    return call.loss(op, logps, log_z, 0, len(base_logps), num_sequences)


def default_cache_bytes(hidden: Tensor, weight: Tensor, implementation: HeadBackend) -> int:
    """As `linear_la_tb_loss` says of ``cache_bytes``. What the device has counts, not what is free at the moment: the
    chunks show in the last bits of the gradients, and those are to be the same on every run."""
    device = hidden.device
    usual = _CACHE_BYTES.get(device.type, _CACHE_BYTES["cuda"])
    most = usual
    if device.type == "cuda":
        most = max(usual, min(_WHOLE_BYTES, torch.cuda.get_device_properties(device).total_memory // 16))
    return max(usual, bytes_of_all(hidden, weight, implementation, most))


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a call was given, checked; sequences are taken from it as ``first`` to ``last``."""

    labels: Tensor
    transform: LogitTransform
    implementation: HeadBackend
    cu_seqlens: Tensor
    base_logps: Tensor
    group_ids: Tensor | None
    psi: Tensor | None
    old_logps: Tensor | None
    loss_options: dict

    def _sequences(self, first: int, last: int) -> dict:
        cu_seqlens = self.cu_seqlens[first : last + 1]
        if first:
            cu_seqlens = cu_seqlens - cu_seqlens[0]
        optional = {"psi": self.psi, "old_logps": self.old_logps}
        optional = {name: None if x is None else x[first:last] for name, x in optional.items()}
        return {"base_logps": self.base_logps[first:last], "cu_seqlens": cu_seqlens, **optional, **self.loss_options}

    def group_log_z(self, logps: Tensor, first: int, last: int) -> Tensor:
        return group_log_z(logps, group_ids=self.group_ids[first:last], **self._sequences(first, last))

    def loss(self, op: str, logps: Tensor, log_z: Tensor, first: int, last: int, count: int | None) -> LATBOutput:
        return la_tb(op, logps, log_z=log_z, num_sequences=count, **self._sequences(first, last))


def chunks_of_sequences(
    bounds: list[int], group_ids: list[int] | None, most: int
) -> Iterator[tuple[int, int, int, int]]:
    """(first sequence, end, first row, end) of chunks of at most ``most`` rows that cut no sequence and no group.

    A sequence or group with more rows than that is in a chunk of its own kind, together with its like that adjoin it:
    what is recomputed needs no memory for more rows.
    """
    last_of_group: dict[int, int] = {}
    for i, group in enumerate(group_ids or []):
        last_of_group[group] = i
    first = start = reach = 0
    pending: tuple[int, int, int, int] | None = None
    for i in range(len(bounds) - 1):
        reach = max(reach, i if group_ids is None else last_of_group[group_ids[i]])
        if i < reach:
            continue
        unit = (first, i + 1, start, bounds[i + 1])
        first, start = i + 1, bounds[i + 1]
        if pending is None:
            pending = unit
            continue
        fits = unit[3] - pending[2] <= most
        both_too_long = min(pending[3] - pending[2], unit[3] - unit[2]) > most
        if fits or both_too_long:
            pending = (pending[0], unit[1], pending[2], unit[3])
        else:
            yield pending
            pending = unit
    if pending is not None:
        yield pending


class LinearLATBFunction(torch.autograd.Function):
    """Loss and gradients chunk by chunk; the backward pass multiplies them by the upstream number."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, log_z, call, chunks, most, count):
        need_d_hidden, need_d_weight, need_d_bias, need_d_log_z = ctx.needs_input_grad[:4]
        rows_kept = max([end - start for _, _, start, end in chunks if end - start <= most], default=0)
        one_pass = len(chunks) == 1 and rows_kept > 0 and hidden.dtype == torch.bfloat16
        trained = weight if need_d_weight else None, bias if need_d_bias else None
        sums = HeadSums.like(*trained, own_dtype=one_pass)
        memory = hidden.new_empty(rows_kept * kept_width(weight.shape[0]), dtype=call.implementation.kept_dtype(hidden))
        d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if need_d_hidden else None
        outputs, d_log_z = [], []
        for first, last, start, end in chunks:
            rows = slice(start, end)
            part = HeadCall(hidden[rows], weight, call.labels[rows], bias, call.transform, _NO_LABEL)
            kept = forward = None
            if end - start <= most:
                kept = call.implementation.linear_logprob_fwd_exps(part, memory=memory)
            else:
                forward = call.implementation.linear_logprob_fwd(part)
            logps = (kept or forward).logp
            z = call.group_log_z(logps, first, last) if log_z is None else log_z[first:last].detach()
            with torch.enable_grad():
                leaves = [logps.requires_grad_(), z.requires_grad_()]
                out = call.loss("linear_la_tb_loss", *leaves, first, last, count)
                d_logps, d_z = torch.autograd.grad(out.loss, leaves)
            outputs.append([x.detach() for x in out])
            d_log_z.append(d_z)
            if kept is not None:
                d_part = call.implementation.linear_logprob_bwd_exps(
                    part.hidden, weight, kept, d_logps, need_d_hidden=need_d_hidden, add_to=sums
                )
            else:
                d_part, _, _ = call.implementation.linear_logprob_bwd(
                    part,
                    forward,
                    d_logps,
                    need_d_hidden=need_d_hidden,
                    need_d_weight=need_d_weight,
                    need_d_bias=need_d_bias,
                    add_to=sums,
                )
            if need_d_hidden:
                d_hidden[rows] = d_part
        loss, *per_sequence = zip(*outputs, strict=True)
        per_sequence = [torch.cat(parts) for parts in per_sequence]
        ctx.mark_non_differentiable(*per_sequence)
        ctx.set_materialize_grads(False)
        # Not saved tensors: the backward pass gives them away instead of copying gradients of a head's size.
        ctx.units = [d_hidden, *sums.finished(), torch.cat(d_log_z) if need_d_log_z else None]
        ctx.scaled = call.implementation.scaled
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype, logps.dtype
        return torch.stack(loss).sum(), *per_sequence

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss is None:
            return (None,) * 8
        units, ctx.units = ctx.units, None
        if units is None:
            raise RuntimeError(
                "linear_la_tb_loss: a second backward pass through one call is not available, with retain_graph=True "
                "either: the first one gave the gradients away; call linear_la_tb_loss again"
            )
        with torch.no_grad():
            grads = [
                None if unit is None else ctx.scaled(unit, d_loss, dtype)
                for unit, dtype in zip(units, ctx.dtypes, strict=True)
            ]
        return *(refuse_second_derivative("linear_la_tb_loss", g) for g in grads), None, None, None, None
