"""Which attention a packed row goes through, and switching a model to it for a while.

flash-attn attends within each sequence of a packed row, and so does the kernel that torch brings for it. Without them
transformers builds the block-diagonal mask of the whole row: the same numbers, at a cost that grows with the square of
the row's length, so rows are kept shorter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .heads import unwrap_peft
from .varlen import VARLEN, register_varlen, varlen_available

__all__ = ["attending", "break_even", "packed_attention"]


def packed_attention(model: nn.Module, *, autocast: torch.dtype | None = None) -> str:
    """The model's own attention; on CUDA, where it computes in half precision, flash-attn if that imports, else torch's
    variable-length attention if the model was written for flash-attn.

    ``autocast``: the dtype that the model computes in, None: that of its weights.
    """
    lm = unwrap_peft(model)
    weight = lm.get_input_embeddings().weight
    own = lm.config._attn_implementation
    if weight.device.type != "cuda" or (autocast or weight.dtype) == torch.float32 or own.startswith("flash"):
        return own
    from transformers import utils

    for version in (2, 3, 4):  # 2 runs on the most devices
        available = getattr(utils, f"is_flash_attn_{version}_available", lambda: False)
        if available():
            return f"flash_attention_{version}"
    if getattr(lm, "_supports_flash_attn", False) and varlen_available(lm.config.get_text_config()):
        return register_varlen()
    return own


def break_even(model: nn.Module, attention: str) -> float | None:
    """Row length at which ``attention`` costs as much as the products with the weights; None: it costs no more.

    By FLOP: 2 per token and weight of the layers, 4 per pair of tokens, layer and hidden unit.
    """
    if attention.startswith("flash") or attention == VARLEN:
        return None
    lm = unwrap_peft(model)
    outside = {id(m.weight) for m in (lm.get_input_embeddings(), lm.get_output_embeddings())}
    weights = sum(p.numel() for p in lm.parameters() if p.ndim > 1 and id(p) not in outside)
    config = lm.config.get_text_config()
    return weights / (2 * config.num_hidden_layers * config.hidden_size)


@contextmanager
def attending(models: Iterable[nn.Module], implementation: str) -> Iterator[None]:
    """Inside, the attention of ``models`` is ``implementation``; afterwards their own again, which is what decodes."""
    with ExitStack() as stack:
        for lm in map(unwrap_peft, models):
            own = lm.config._attn_implementation
            if own != implementation:
                stack.callback(lm.set_attn_implementation, own)
                lm.set_attn_implementation(implementation)
        yield
