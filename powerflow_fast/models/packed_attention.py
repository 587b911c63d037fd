"""torch's variable-length attention as one of transformers' attentions: packed rows without flash-attn installed.

``torch.nn.attention.varlen`` is the flash kernel that torch itself brings. transformers has no entry for it; what it
passes to an attention is enough: positions that begin at 0 in each sequence.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import unwrap_peft

VARLEN = "powerflow_varlen"
"""Its name for ``model.set_attn_implementation``, after `register_varlen`."""


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Names of them; every layer of every forward pass asks."""
    return frozenset(inspect.signature(function).parameters)


def varlen_available(config: Any) -> bool:
    """Whether this torch's kernel takes a causal window, and a model of this config asks for no more: no softcap, no
    attention in chunks."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return False
    if not {"window_size", "scale"} <= _parameters(varlen.varlen_attn):
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    softcap = getattr(config, "attn_logit_softcapping", None)
    chunks = getattr(config, "attention_chunk_size", None)
    return kinds <= {"full_attention", "sliding_attention"} and softcap is None and chunks is None


def register_varlen() -> str:
    """Make it known to transformers; returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _no_mask)
    return VARLEN


def _no_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """Padding on the right needs no mask: no real token sees it. Elsewhere it would be seen."""
    if attention_mask is not None and not bool((attention_mask[:, 1:] <= attention_mask[:, :-1]).all()):
        raise ValueError(f"{VARLEN}: rows must be padded on the right, got an attention_mask with padding elsewhere")


class _Sequences:
    """Where the sequences of the last positions begin: all layers of a forward pass get the same tensor, and to count
    in it makes the host wait for the device."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._rows = 0
        self._found: tuple[Tensor, int]

    def __call__(self, position_ids: Tensor, rows: int) -> tuple[Tensor, int]:
        """(cu_seqlens int32, length of the longest) over all rows end to end; (1, T) are the positions of each row."""
        if self._of is None or self._of() is not position_ids or self._rows != rows:
            starts = position_ids.expand(rows, -1) == 0
            starts[:, 0] = True  # whatever a row begins with doesn't belong to the row before
            bounds = torch.cat(
                [starts.flatten().nonzero()[:, 0], starts.new_tensor([starts.numel()], dtype=torch.int64)]
            )
            self._found = bounds.to(torch.int32), int(bounds.diff().max())
            self._of, self._rows = weakref.ref(position_ids), rows
        return self._found


_sequences = _Sequences()


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_ids: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. query (B, heads, T, D), key and value (B, key heads, T, D), position_ids
    (B, T) or (1, T); returns (B, T, heads, D).

    Raises:
        ValueError: for what the kernel does not have (a mask, dropout, a softcap, attention sinks, no causality), or
            where there are no positions to cut at.
    """
    from torch.nn.attention.varlen import varlen_attn

    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    lacking = {
        "an attention mask": attention_mask is not None,
        "dropout": dropout != 0.0,
        "a softcap": softcap is not None,
        "attention sinks": kwargs.get("s_aux") is not None,
        "attention that is not causal": not causal,
        "a forward pass without position_ids": position_ids is None,
        "a cache of keys": key.shape[2] != query.shape[2],
    }
    if asked := [name for name, wanted in lacking.items() if wanted]:
        raise ValueError(f"{VARLEN}: torch's variable-length attention doesn't take {', '.join(asked)}")
    cu_seqlens, longest = _sequences(position_ids, query.shape[0])
    # (B·T, heads, D), in the dtype of a linear layer's result: under autocast the rotation leaves the others in fp32.
    packed = [x.transpose(1, 2).flatten(0, 1).to(value.dtype) for x in (query, key, value)]
    options = {}
    if (group := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _parameters(varlen_attn):
            options["enable_gqa"] = True
        else:  # torch 2.11
            packed[1:] = [x.repeat_interleave(group, 1) for x in packed[1:]]
    out = varlen_attn(
        *packed,
        cu_seqlens,
        cu_seqlens,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


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
