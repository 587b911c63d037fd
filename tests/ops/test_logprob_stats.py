"""linear_logprob_stats on every backend, by itself and beside gradients, against fp64 on the same inputs."""

from __future__ import annotations

import pytest
import torch
from test_logprobs import BACKENDS, DTYPES, TRANSFORMS, make_case, special_row

from powerflow_fast.kernels.linear_logprob_reference import linear_logprob_stats_ref
from powerflow_fast.ops import linear_logprob_stats, linear_logprobs

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_stats(backend, dtype, transform, check_accuracy):
    case = make_case(dtype, **TRANSFORMS[transform])
    leaves = case.tensors(torch.float64)
    options = {**case.options, **({"bias": leaves["bias"]} if "bias" in leaves else {})}
    exact = linear_logprob_stats_ref(leaves["hidden"], leaves["weight"], case.labels, **options)
    ours = linear_logprob_stats(case.hidden, case.weight, case.labels, **case.options, backend=backend)
    for name, value in zip(ours._fields, exact, strict=True):
        result = getattr(ours, name)
        assert result.dtype == torch.float32 and not result.requires_grad
        check_accuracy(result, value.detach(), value.detach(), dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", ["plain", "all"])
@pytest.mark.parametrize(
    "trainable", [{}, {"weight": False, "bias": False}, {"hidden": False}], ids=["all", "hidden", "head"]
)
@pytest.mark.parametrize("cache_bytes", [0, 9 * 131 * 4])
def test_stats_beside_gradients(backend, dtype, transform, trainable, cache_bytes, check_accuracy):
    """Statistics of the pass that makes the gradients: as those of a pass of their own, and the gradients unchanged."""
    case = make_case(dtype, **TRANSFORMS[transform])
    options = {"backend": backend, "cache_bytes": cache_bytes}
    found = []

    def with_stats(*args, **kwargs):
        found.append(linear_logprob_stats(*args, **kwargs))
        return found[0].logp

    logp, grads = case.run(linear_logprobs, None, trainable, **options)
    same_logp, same_grads = case.run(with_stats, None, trainable, **options)
    assert torch.equal(logp, same_logp)
    assert all(torch.equal(grad, same_grads[name]) for name, grad in grads.items())
    exact = linear_logprob_stats_ref(
        *(x.double() for x in case.tensors().values() if x.dim() == 2),
        case.labels,
        **{name: x.double() if name == "bias" else x for name, x in case.options.items()},
    )
    for name, value in zip(found[0]._fields, exact, strict=True):
        result = getattr(found[0], name)
        assert result.dtype == torch.float32 and result.requires_grad == (name == "logp")
        check_accuracy(result.detach(), value.detach(), value.detach(), dtype, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [26.0, -120.0])
def test_stats_of_extreme_tokens(backend, gap):
    case = special_row(gap)
    exact = linear_logprob_stats_ref(case.hidden.double(), case.weight.double(), case.labels)
    ours = linear_logprob_stats(case.hidden, case.weight, case.labels, backend=backend)
    for result, value in zip(ours, exact, strict=True):
        torch.testing.assert_close(result.double(), value, rtol=5e-5, atol=0)
