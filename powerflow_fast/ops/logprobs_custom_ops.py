"""``linear_logprobs`` and ``linear_logprob_stats`` as PyTorch operators, which ``torch.compile(fullgraph=True)`` and
``torch.export`` take whole.

The work stays in the launchers that the eager function calls, behind three operators that a compiler doesn't look into:

    powerflow_fast::linear_logprobs_unit      only hidden needs a gradient: log-probs and ∂ logp/∂ hidden, 4NVH FLOP
    powerflow_fast::linear_logprobs_forward   otherwise: log-probs, and what the backward pass needs besides
    powerflow_fast::linear_logprobs_backward  the gradients of the latter

The first two also return the statistics, or none where they aren't wanted.
Which of the first two is taken follows from the inputs that need a gradient, and is settled while the graph is traced.
The backward pass of ``unit`` is a multiplication that the compiler sees and can fuse with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.interface import LogitTransform, kept_width
from .backends import Backend, implementation_for
from .checks import autocast_inputs, check_cache_bytes, check_linear_inputs
from .logprobs import LogprobStats
from .logprobs_autograd import LinearLogprobsFunction, kept_rows, refuse_second_derivative, usual_cache_bytes

_NAME = "linear_logprobs"
_OPTIONS = "float temperature, float logit_scale, float? logit_softcap, int ignore_index, str backend"
_INPUTS = f"Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, {_OPTIONS}"


class _Context:
    """What ``LinearLogprobsFunction`` needs of autograd's context."""

    only_hidden = False

    def __init__(self, needs: Sequence[bool], saved: Sequence[Tensor | None] = ()):
        self.needs_input_grad = needs
        self.saved_tensors = saved

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


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
    """``powerflow_fast.linear_logprobs`` for code that is compiled: same arguments, same result and gradients to the
    bit, same FLOP and memory, and one node of the graph instead of a graph break.

        @torch.compile(fullgraph=True)
        def loss(hidden, weight, labels):
            return -powerflow_fast.ops.logprobs_custom_ops.linear_logprobs(hidden, weight, labels).mean()

    N may be dynamic. Called without a compiler it is the eager function with a little more overhead. With
    ``cache_bytes``, which keeps a number of rows that depends on the labels, the graph holds sizes that are known when
    it runs; compiled code keeps none unless told so.

    Args:
        all: as in ``powerflow_fast.linear_logprobs``. Gradients: hidden (N, H), weight (V, H), bias (V,).

    Returns:
        (N,) fp32, nats.

    Raises:
        TypeError, ValueError, BackendUnavailableError: as ``powerflow_fast.linear_logprobs``. In compiled code, what is
            wrong with a shape or dtype is found while tracing, and is quoted by the compiler's own error.
    """
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments = (hidden, weight, labels, bias, transform, ignore_index, backend, cache_bytes)
    return scored("linear_logprobs", *arguments, need_stats=False)[0]


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
    """``powerflow_fast.linear_logprob_stats`` for code that is compiled; as ``linear_logprobs`` here."""
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    arguments = (hidden, weight, labels, bias, transform, ignore_index, backend, cache_bytes)
    return LogprobStats(*scored("linear_logprob_stats", *arguments, need_stats=True))


def scored(
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
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    # A compiler may hold the numbers as symbols, which cannot be checked: the operators check them when they run.
    # (It takes literals for constants, and defaults of LogitTransform for symbols too.)
    checked = LogitTransform(1.0, 1.0, None) if torch.compiler.is_compiling() else transform
    check_linear_inputs(op, hidden, weight, labels, bias, checked, ignore_index)
    check_cache_bytes(op, cache_bytes)
    trains_head = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not (torch.is_grad_enabled() and trains_head):
        cache_bytes = 0
    elif cache_bytes is None:
        cache_bytes = usual_cache_bytes(hidden, weight, implementation_for(backend, hidden))
    arguments = (hidden, weight, labels, bias, *transform, ignore_index, backend, need_stats)
    if torch.is_grad_enabled() and hidden.requires_grad and not trains_head:
        logp, _, stats = _unit(*arguments)
    else:
        logp, _, stats = _forward(*arguments, cache_bytes)
    return logp, *stats


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_unit",
    mutates_args=(),
    schema=f"({_INPUTS}, bool need_stats) -> (Tensor, Tensor, Tensor[])",
)
@torch.no_grad()
def _unit(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, need_stats):
    """logp (N,), ∂ logp/∂ hidden (N, H), statistics."""
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    transform = check_linear_inputs(_NAME, hidden, weight, labels, bias, transform, ignore_index)
    run = implementation_for(backend, hidden).linear_logprob_fwd_d_hidden
    out = run(hidden, weight, labels, bias, transform, ignore_index, stats=need_stats)
    return out.logp, out.unit, _apart(out.stats)


@_unit.register_fake
def _(hidden, weight, labels, bias, temperature, logit_scale, logit_softcap, ignore_index, backend, need_stats):
    implementation_for(backend, hidden)  # a backend that cannot run is refused while tracing
    unit_dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return _new_logp(hidden), hidden.new_empty(hidden.shape, dtype=unit_dtype), _new_stats(hidden, need_stats)


def _save_unit(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    _, unit, stats = output
    ctx.mark_non_differentiable(unit, *stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(unit)
    ctx.dtype = inputs[0].dtype


def _scale_unit(ctx: Any, d_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    d_hidden = None
    if d_logp is not None:
        with torch.no_grad():
            d_hidden = torch.mul(ctx.saved_tensors[0], d_logp[:, None]).to(ctx.dtype)
    return refuse_second_derivative(_NAME, d_hidden), *[None] * 9


_unit.register_autograd(_scale_unit, setup_context=_save_unit)


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_forward",
    mutates_args=(),
    schema=f"({_INPUTS}, bool need_stats, int cache_bytes) -> (Tensor, Tensor[], Tensor[])",
)
@torch.no_grad()
def _forward(
    hidden,
    weight,
    labels,
    bias,
    temperature,
    logit_scale,
    logit_softcap,
    ignore_index,
    backend,
    need_stats,
    cache_bytes,
):
    """logp (N,), what the backward pass needs besides, and statistics. The second is [anchor, sum], or, where
    ``cache_bytes`` holds a row, [numbers of the rows that count, exponentials and scale of those kept, logp, anchor and
    sum of the others]."""
    context = _Context((True, True, False, True))
    transform = LogitTransform(temperature, logit_scale, logit_softcap)
    transform = check_linear_inputs(_NAME, hidden, weight, labels, bias, transform, ignore_index)
    arguments = (transform, ignore_index, implementation_for(backend, hidden), cache_bytes, need_stats)
    logp, stats = LinearLogprobsFunction._scores(context, hidden, weight, labels, bias, *arguments)
    rows, exps, scale, *others = context.saved_tensors[4:]
    others = _apart(others)
    return logp, others[1:] if rows is None else [rows, exps, scale, *others], _apart(stats)


@_forward.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    temperature,
    logit_scale,
    logit_softcap,
    ignore_index,
    backend,
    need_stats,
    cache_bytes,
):
    implementation = implementation_for(backend, hidden)
    logp, stats = _new_logp(hidden), _new_stats(hidden, need_stats)
    if kept_rows(cache_bytes, hidden, weight, implementation) == 0:
        return logp, [torch.empty_like(logp), torch.empty_like(logp)], stats
    new_size = torch.library.get_ctx().new_dynamic_size
    count, kept, rest = new_size(), new_size(), new_size()
    v = weight.shape[0]
    exps = hidden.new_empty_strided((kept, v), (kept_width(v), 1), dtype=implementation.kept_dtype(hidden))
    saved = [labels.new_empty(count), exps, logp.new_empty(kept), *(logp.new_empty(rest) for _ in range(3))]
    return logp, saved, stats


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    logp, saved, stats = output
    ctx.mark_non_differentiable(*saved, *stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4], logp, *saved)
    ctx.options = inputs[4:9]


def _gradients(ctx: Any, d_logp: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 11
    if d_logp is None:
        return tuple(grads)
    positions = [i for i in (0, 1, 3) if ctx.needs_input_grad[i]]
    hidden, weight, labels, bias, logp, *saved = ctx.saved_tensors
    with torch.no_grad():
        made = _backward(hidden, weight, labels, bias, *ctx.options, logp, saved, d_logp, positions)
    for i, grad in zip(positions, made, strict=True):
        grads[i] = refuse_second_derivative(_NAME, grad)
    return tuple(grads)


_forward.register_autograd(_gradients, setup_context=_save_forward)


@torch.library.custom_op(
    "powerflow_fast::linear_logprobs_backward",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor logp, Tensor[] saved, Tensor d_logp, int[] positions) -> Tensor[]",
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
    logp,
    saved,
    d_logp,
    positions,
):
    """Gradients of the inputs with these ``positions`` among hidden, weight, labels, bias."""
    kept = saved if len(saved) == 6 else [None, None, None, logp, *saved]
    context = _Context([i in positions for i in range(4)], (hidden, weight, labels, bias, *kept))
    context.transform = LogitTransform(temperature, logit_scale, logit_softcap)
    context.ignore_index, context.implementation = ignore_index, implementation_for(backend, hidden)
    d_hidden, d_weight, d_bias = LinearLogprobsFunction._gradients(context, d_logp)
    return [(d_hidden, d_weight, None, d_bias)[i].contiguous() for i in positions]


@_backward.register_fake
def _(
    hidden,
    weight,
    labels,
    bias,
    temperature,
    logit_scale,
    logit_softcap,
    ignore_index,
    backend,
    logp,
    saved,
    d_logp,
    positions,
):
    inputs = (hidden, weight, labels, bias)
    return [inputs[i].new_empty(inputs[i].shape) for i in positions]


def _new_logp(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


def _new_stats(hidden: Tensor, need_stats: bool) -> list[Tensor]:
    return [_new_logp(hidden) for _ in range(3 if need_stats else 0)]


def _apart(tensors: Sequence[Tensor] | None) -> list[Tensor]:
    """Copies: results of an operator must not share memory, and a launcher's may be rows of one tensor."""
    return [x.clone() for x in tensors or ()]
