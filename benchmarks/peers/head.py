"""Who computes the head. Each provider is a function ``(hidden, weight, labels) -> (N,) fp32 log-probs``.

Peers come from their installed packages, at the settings they ship with; nothing of theirs is copied here. Rows with
label -100 must give 0.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from cases.head import DTYPES, IGNORE, HeadCase, HeadInputs
from measure import Outputs
from providers import Provider, package, require_cuda
from torch import Tensor

from powerflow_fast import linear_logprob_stats, linear_logprobs
from powerflow_fast.ops import torch_backend
from powerflow_fast.ops.backends import resolve_backend
from powerflow_fast.ops.logprobs_autograd import usual_cache_bytes
from powerflow_fast.ops.torch_products import CompiledProducts, compiled_products_run

Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]


def masked(compute: Logprobs) -> Logprobs:
    """For peers without an ignore_index: compute every row, then zero the ignored ones, as their callers do."""

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return compute(hidden, weight, labels.clamp(min=0)).where(labels != IGNORE, 0.0)

    return logprobs


def naive(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Logits, float32, log_softmax, gather: what a model's ``logits`` and three lines of PyTorch give."""
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, labels[:, None])[:, 0]


def load_naive(device: torch.device) -> Logprobs:
    return masked(naive)


def load_naive_compiled(device: torch.device) -> Logprobs:
    torch.compiler.reset()  # past eight shapes of one function it would run uncompiled, without a word
    return torch.compile(masked(naive), dynamic=False)


def load_torch_lce(device: torch.device, *, chunk: Literal["none", "auto"] | int) -> Logprobs:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no F.linear_cross_entropy (2.13 or newer has)")
    options = None
    if chunk == "auto":  # sizes the chunk by N·H/V, a few rows for a language model's head
        options = torch.nn.LinearCrossEntropyOptions()
    elif chunk != "none":
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk, chunking_method=None)

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        loss = F.linear_cross_entropy(hidden, weight, labels, reduction="none", ignore_index=IGNORE, options=options)
        return -loss.float()

    return logprobs


def load_liger_ce(device: torch.device) -> Logprobs:
    require_cuda(device)
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out = LigerFusedLinearCrossEntropyFunction.apply(
            hidden, weight, labels, None, None, IGNORE, 0.0, 0.0, "none", None, False
        )
        return -out[0].float()

    return logprobs


def load_liger_scaled_ce(device: torch.device) -> Logprobs:
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    return lambda hidden, weight, labels: -LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, labels)


def load_liger_grpo(device: torch.device) -> Logprobs:
    from liger_kernel.chunked_loss.fused_linear_ppo import LigerFusedLinearPPOBase

    @masked
    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return LigerFusedLinearPPOBase.chunk_forward(hidden[None], weight, labels[None])[0]

    return logprobs


def load_cce(device: torch.device, *, exact: bool) -> Logprobs:
    require_cuda(device)
    from cut_cross_entropy import linear_cross_entropy

    options = {"filter_eps": None} if exact else {}  # the default leaves out gradients below a 32nd of the dtype's eps

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden, weight, labels, reduction="none", **options).float()

    return logprobs


def load_trl(device: torch.device) -> Logprobs:
    package("trl.kernels")
    # The backward pass imports this from the trainers' module, which needs all of TRL's dependencies. Without DeepSpeed
    # it gathers nothing.
    if "trl.trainer.utils" not in sys.modules:
        package("trl.trainer")
        utils = types.ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = utils
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction

    def logprobs(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # 32768 columns are what its trainers ask for; they drop ignored rows first on a GPU.
        keep = labels != IGNORE
        if hidden.is_cuda and bool((~keep).any()):
            logp = function.apply(hidden[keep], weight, None, labels[keep], 1.0, 32768, None, 1.0, ())[0]
            return logp.new_zeros(labels.shape).masked_scatter(keep, logp)
        logp = function.apply(hidden, weight, None, labels.clamp(min=0), 1.0, 32768, None, 1.0, ())[0]
        return logp.where(keep, 0.0)

    return logprobs


def load_verl(device: torch.device) -> Logprobs:
    package("verl.utils.kernel")
    require_cuda(device)
    if "verl.utils.device" not in sys.modules:  # the real one needs verl's platform plugins
        stub = types.ModuleType("verl.utils.device")
        stub.is_cuda_available = torch.cuda.is_available()
        stub.get_device_name = lambda: "cuda"
        stub.get_device_capability = torch.cuda.get_device_capability
        stub.get_torch_device = lambda: torch.cuda
        sys.modules["verl.utils.device"] = stub
    function = importlib.import_module("verl.utils.kernel.linear_cross_entropy").linear_cross_entropy
    return masked(lambda hidden, weight, labels: function(hidden, weight, labels, 1.0, "none")[0])


def load_unsloth(device: torch.device) -> Logprobs:
    package("unsloth_zoo.fused_losses")
    function = importlib.import_module("unsloth_zoo.fused_losses.fused_linear").fused_linear_logprobs
    return lambda hidden, weight, labels: function(hidden, weight, labels, mask=labels != IGNORE)


def load_ours(device: torch.device, *, backend: str, entropy: bool = False) -> Logprobs:
    """With ``entropy``: as a step that logs one, from the same pass."""
    resolve_backend(backend, device, torch.float32)
    if entropy:
        return lambda hidden, weight, labels: linear_logprob_stats(hidden, weight, labels, backend=backend).logp
    return lambda hidden, weight, labels: linear_logprobs(hidden, weight, labels, backend=backend)


def our_passes(case: HeadCase, device: torch.device) -> tuple[int, int, int]:
    """A trained head takes three where all exponentials are kept without being asked for."""
    if device.type != "cpu":
        return 1, 2, 4
    operands = (torch.empty(rows, case.h, dtype=DTYPES[case.dtype]) for rows in (case.n, case.v))
    return 1, 2, 3 if usual_cache_bytes(*operands, torch_backend) else 4


def _bind(load: Callable[..., Logprobs], **options: object) -> Callable[[torch.device], Logprobs]:
    return lambda device: load(device, **options)


_WITH_ENTROPY = _bind(load_ours, backend="auto", entropy=True)
HEAD_PROVIDERS = [
    Provider("powerflow_fast", "powerflow_fast", _bind(load_ours, backend="auto"), our_passes, "auto"),
    Provider("powerflow_fast with entropy", "powerflow_fast", _WITH_ENTROPY, our_passes, "auto"),
    Provider("powerflow_fast torch", "powerflow_fast", _bind(load_ours, backend="torch"), our_passes, "torch"),
    Provider("powerflow_fast triton", "powerflow_fast", _bind(load_ours, backend="triton"), (1, 2, 4), "triton"),
    Provider("naive", "torch", load_naive, (1, 2, 3)),
    Provider("naive compiled", "torch", load_naive_compiled, (1, 2, 3), warm_whole=True),
    Provider("F.linear_cross_entropy", "torch", _bind(load_torch_lce, chunk="none"), (1, 2, 3)),
    Provider("F.linear_cross_entropy auto chunks", "torch", _bind(load_torch_lce, chunk="auto"), (1, 3, 4)),
    Provider("F.linear_cross_entropy 512 rows", "torch", _bind(load_torch_lce, chunk=512), (1, 3, 4)),
    Provider("liger fused linear CE", "liger-kernel", load_liger_ce, (1, 3, 4)),
    Provider("liger scaled CE", "liger-kernel", load_liger_scaled_ce, (1, 4, 4)),
    Provider("liger chunked GRPO", "liger-kernel", load_liger_grpo, (1, 3, 4)),
    Provider("cut-cross-entropy", "cut-cross-entropy", _bind(load_cce, exact=False)),
    Provider("cut-cross-entropy exact", "cut-cross-entropy", _bind(load_cce, exact=True), (1, 3, 4)),
    Provider("trl chunked", "trl", load_trl, (1, 3, 4)),
    Provider("verl triton", "verl", load_verl, (1, 4, 4)),
    Provider("unsloth fused", "unsloth-zoo", load_unsloth, (1, 2, 4)),
    Provider("gemm", "torch", load_naive, (1, 2, 3)),  # see gemm_step
    Provider("gemm fp32", "torch", load_naive, (1, 2, 3)),
    Provider("gemm blocks", "torch", load_naive, (1, 2, 3)),
]


def gemm_step(provider: Provider, inputs: HeadInputs, mode: str, dtype: torch.dtype) -> Callable[[], Outputs]:
    """The floor: nothing but the products that the mode needs, whole, into memory that is already there."""
    if provider.name == "gemm fp32":
        dtype = torch.float32
    hidden, weight = inputs.hidden.to(dtype), inputs.weight.to(dtype)
    # random, since a GPU that multiplies ones draws less power and runs faster
    exps = torch.rand(hidden.shape[0], weight.shape[0], dtype=dtype, device=hidden.device)
    multiply, result_dtype = torch.mm, dtype
    if provider.name == "gemm blocks":  # oneDNN's, as powerflow_fast calls it: fp32 results, of bf16 operands too
        multiply, result_dtype = partial(CompiledProducts(hidden).product, add=False), torch.float32
    logits = exps if result_dtype == dtype else torch.empty_like(exps, dtype=result_dtype)
    d_hidden = torch.empty_like(hidden, dtype=result_dtype) if mode != "no_grad" else None
    d_weight = torch.empty_like(weight, dtype=result_dtype) if mode == "full" else None

    def step() -> Outputs:
        multiply(hidden, weight.t(), out=logits)
        if d_hidden is not None:
            multiply(exps, weight, out=d_hidden)
        if d_weight is not None:
            multiply(exps.t(), hidden, out=d_weight)
        return ()

    return step


def head_step(provider: Provider, case: HeadCase, inputs: HeadInputs) -> Callable[[], Outputs]:
    """(logp,), (logp, d_hidden) or (logp, d_hidden, d_weight) by mode."""
    if provider.kind == "floor":
        return gemm_step(provider, inputs, case.mode, DTYPES[case.dtype])
    logprobs = provider.load(inputs.hidden.device)
    trained = {"no_grad": 0, "frozen": 1, "full": 2}[case.mode]
    leaves = [t.detach().requires_grad_(i < trained) for i, t in enumerate((inputs.hidden, inputs.weight))]

    def step() -> Outputs:
        with torch.set_grad_enabled(bool(trained)):
            logp = logprobs(*leaves, inputs.labels)
        if not trained:
            return (logp,)
        return logp.detach(), *torch.autograd.grad(logp, leaves[:trained], inputs.upstream)

    return step


def default_head_providers(device: torch.device, dtype: str) -> list[Provider]:
    """All of them, without those that would be measured twice: ``auto`` is ``torch`` on a CPU, ``triton`` on a GPU, and
    what an entropy adds there is in kernel_times.py.

    The floor of a CPU is the fastest of several products: fp32 for a half-precision type that it emulates, and
    oneDNN's blocks where torch calls a library that leaves vector units unused.
    """
    on_cpu = device.type == "cpu"
    left_out = {"powerflow_fast torch" if on_cpu else "powerflow_fast triton"}
    if not on_cpu or dtype == "fp32":
        left_out.add("gemm fp32")
    if not on_cpu:
        left_out.add("powerflow_fast with entropy")
    if not on_cpu or not compiled_products_run():
        left_out.add("gemm blocks")
    return [p for p in HEAD_PROVIDERS if p.name not in left_out]
