"""Which attention a packed row goes through, and switching a model to it for a while.

flash-attn attends within each sequence of a packed row. Without it transformers builds the block-diagonal mask of the
whole row: the same numbers, at a cost that grows with the square of the row's length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from .heads import unwrap_peft

__all__ = ["attending", "packed_attention"]


def packed_attention(model: nn.Module, *, autocast: torch.dtype | None = None) -> str:
    """The model's own attention, or flash-attn where that imports, on CUDA, and computes in half precision.

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
    return own


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
