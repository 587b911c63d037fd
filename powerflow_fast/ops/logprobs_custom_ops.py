"""Log-probs of a linear head as PyTorch operators, which ``torch.compile(fullgraph=True)`` and ``torch.export`` take
whole: `linear_logprobs` and `linear_logprob_stats` go through them where a compiler traces.

The operators are shells around `forward` and `backward` of logprobs_autograd; a compiler doesn't look into them:

    powerflow_fast::linear_logprobs_unit      only hidden needs a gradient: log-probs and ∂ logp/∂ hidden, 4NVH FLOP
    powerflow_fast::linear_logprobs_forward   otherwise: log-probs, and what the backward pass needs besides
    powerflow_fast::linear_logprobs_backward  the gradients of the latter

The first two also return the statistics, or none where they aren't wanted. Which of them is taken follows from the
inputs that need a gradient, and is settled while the graph is traced. The backward pass of ``unit`` is a
multiplication that the compiler sees and can fuse with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.interface import HeadCall, LogitTransform, kept_width
from .backends import Backend, implementation_for
from .checks import check_head
from .logprobs_autograd import Needs, Saved, backward, forward, kept_rows, refuse_second_derivative, scaled_unit

_NAME = "linear_logprobs"
_OPTIONS = "float temperature, float logit_scale, float? logit_softcap, int ignore_index, str backend"
_INPUTS = f"Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_OPTIONS}"


def scored(call: HeadCall, backend: Backend, needs: Needs, cache_bytes: int, *, stats: bool) -> tuple[Tensor, ...]:
    """Log-probs, and the three of `RowStatistics` if wanted."""
    arguments = (*call[:4], *call.transform, call.ignore_index, backend, stats)
    if needs.hidden and not needs.head:
        logp, _, statistics = _unit(*arguments)
    else:
        logp, _, _, statistics = _forward(*arguments, cache_bytes)
    return logp, *statistics


def _call(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index) -> HeadCall:
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    return check_head(_NAME, HeadCall(hidden, weight, labels, bias, transform, ignore_index))


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_unit",
    mutates_args=(),
    schema=f"({_INPUTS}, bool stats) -> (Tensor, Tensor, Tensor[])",
)
@torch.no_grad()
def _unit(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, stats):
    """logp (N,), ∂ logp/∂ hidden (N, H), statistics."""
    call = _call(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index)
    needs = Needs(hidden=True, weight=False, bias=False)
    logp, statistics, saved = forward(call, implementation_for(backend, hidden), needs, 0, stats=stats)
    return logp, saved.unit, _apart(statistics)


@_unit.register_fake
def _(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, stats):
    implementation_for(backend, hidden)  # a backend that cannot run is refused while tracing
    unit_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return _new_logp(hidden), hidden.new_empty(hidden.shape, dtype=unit_dtype), _new_logps(hidden, 3 * stats)


def _save_unit(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, unit, statistics = output
    ctx.mark_non_differentiable(unit, *statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unit)
    ctx.dtype = inputs[0].dtype


def _scale_unit(ctx: Any, d_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    d_hidden = None
    if d_logp is not None:
        with torch.no_grad():
            d_hidden = scaled_unit(ctx.saved_tensors[0], d_logp, ctx.dtype)
    return refuse_second_derivative(_NAME, d_hidden), *[None] * 9


_unit.register_autograd(_scale_unit, setup_context=_save_unit)


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_forward",
    mutates_args=(),
    schema=f"({_INPUTS}, bool stats, int cache_bytes) -> (Tensor, Tensor[], Tensor[], Tensor[])",
)
@torch.no_grad()
def _forward(
    hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, stats, cache_bytes
):
    """logp (N,); rows, exponentials and scale of `Saved`, or none where ``cache_bytes`` holds no row; the other three
    of `Saved`; statistics."""
    call = _call(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index)
    needs = Needs(hidden=True, weight=True, bias=True)
    logp, statistics, saved = forward(call, implementation_for(backend, hidden), needs, cache_bytes, stats=stats)
    kept = [] if saved.rows is None else [saved.rows, saved.exps, saved.scale]
    return logp, kept, _apart((saved.logp, saved.anchor, saved.others_sum)), _apart(statistics)


@_forward.register_fake
def _(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, stats, cache_bytes):
    implementation = implementation_for(backend, hidden)
    logp, statistics = _new_logp(hidden), _new_logps(hidden, 3 * stats)
    if kept_rows(cache_bytes, hidden, weight, implementation) == 0:
        return logp, [], _new_logps(hidden, 3), statistics
    new_size = torch.library.get_ctx().new_dynamic_size
    count, kept, rest = new_size(), new_size(), new_size()
    v = weight.shape[0]
    exps = hidden.new_empty_strided((kept, v), (kept_width(v), 1), dtype=implementation.kept_dtype(hidden))
    kept_tensors = [labels.new_empty(count), exps, logp.new_empty(kept)]
    return logp, kept_tensors, [logp.new_empty(rest) for _ in range(3)], statistics


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, kept, others, statistics = output
    ctx.mark_non_differentiable(*kept, *others, *statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], *others, *kept)
    ctx.options = inputs[4:9]


def _gradients(ctx: Any, d_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 11
    if d_logp is None:
        return tuple(grads)
    positions = [i for i in (0, 1, 3) if ctx.needs_input_grad[i]]
    inputs, others, kept = ctx.saved_tensors[:4], ctx.saved_tensors[4:7], ctx.saved_tensors[7:]
    with torch.no_grad():
        made = _backward(*inputs, *ctx.options, list(kept), list(others), d_logp, positions)
    for i, grad in zip(positions, made, strict=True):
        grads[i] = refuse_second_derivative(_NAME, grad)
    return tuple(grads)


_forward.register_autograd(_gradients, setup_context=_save_forward)


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor[] kept, Tensor[] others, Tensor d_logp, int[] positions) -> Tensor[]",
)
@torch.no_grad()
def _backward(
    hidden,
    weight,
    labels,
    bias,
    temperature,
    logit_scale,
    logit_softcap,
    ignore_index,
    backend,
    kept,
    others,
    d_logp,
    positions,
):
    """Gradients of the inputs with these ``positions`` among hidden, weight, labels, bias."""
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    call = HeadCall(hidden, weight, labels, bias, transform, ignore_index)
    needs = Needs(*(i in positions for i in (0, 1, 3)))
    saved = Saved(None, *(kept or [None] * 3), *others)
    d_hidden, d_weight, d_bias = backward(call, implementation_for(backend, hidden), needs, saved, d_logp)
    return [(d_hidden, d_weight, None, d_bias)[i].contiguous() for i in positions]


@_backward.register_fake
def _(hidden, weight, labels, bias, *others):
    inputs, positions = (hidden, weight, labels, bias), others[-1]
    return [inputs[i].new_empty(inputs[i].shape) for i in positions]


def _new_logp(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _new_logps(hidden: Tensor, count: int) -> list[Tensor]:
    return [_new_logp(hidden) for _ in range(count)]


def _apart(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """Copies: results of an operator must not share memory, and a launcher's may be rows of one tensor."""
    return [x.clone() for x in tensors or ()]
