"""The frozen base model in 8 or 4 bits: its linear layers are bitsandbytes', which dequantise as they multiply."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from torch import nn

from ..errors import ConfigError
from .logprob_model import BaseScorer

QUANTIZED = ("8bit", "4bit")
_BLOCK = 64  # what bitsandbytes' CPU kernels cut layers into; layers of other sizes stay as they are


def quantize_base(base: BaseScorer, mode: str) -> BaseScorer:
    """Quantise the linear layers of a frozen copy in place; embeddings, norms and the head stay as they are.

    ``"8bit"``: rows of int8 with a scale each, and activations quantised token by token (LLM.int8() without its outlier
    columns: which columns those are depends on the batch, and a log-prob must not). ``"4bit"``: NF4 with double
    quantisation, weights only. Both make p_base another model than the policy started from: log-ratios of an untrained
    policy are not zero, and α acts on the quantised model's probabilities.

    Source: LLM.int8(), arXiv 2208.07339; NF4, arXiv 2305.14314.
    """
    try:
        bnb = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ConfigError(
            f"PowerFlowConfig: base={mode!r} needs bitsandbytes ({error}); run: pip install bitsandbytes, or set "
            "base='copy' or base='cpu'"
        ) from error
    # It warns in every product that fp32 activations are rounded, which is what was asked for.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    head = base.scorer.head.module
    count = 0
    for parent in list(base.scorer.model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not head and not any(n % _BLOCK for n in child.weight.shape):
                setattr(parent, name, _quantized(bnb, child, mode))
                count += 1
    if not count:
        raise ConfigError(
            f"PowerFlowConfig: base={mode!r} finds no linear layer to quantise in this model: none but the head has "
            f"sides that are multiples of {_BLOCK}; set base='copy' or base='cpu'"
        )
    return base


def _quantized(bnb: Any, linear: nn.Linear, mode: str) -> nn.Module:
    shape, bias, device = (linear.in_features, linear.out_features), linear.bias is not None, linear.weight.device
    # From the CPU: moving to the device is what quantises.
    weight = linear.weight.detach().cpu()
    if mode == "8bit":
        made = bnb.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=0.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(*shape, bias=bias, quant_type="nf4", compress_statistics=True)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    if bias:
        made.bias = nn.Parameter(linear.bias.detach().cpu(), requires_grad=False)
    return made.to(device).eval().requires_grad_(False)
