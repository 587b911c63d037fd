from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny import one_thread, tiny_model  # noqa: F401

from powerflow_fast.attention import attending, packed_attention
from powerflow_fast.models import add_lora


def model_on(device, dtype, own="sdpa"):
    """As much of a model as the choice looks at; there need be no such device here."""
    weight = SimpleNamespace(device=torch.device(device), dtype=dtype)
    embedding = SimpleNamespace(weight=weight)
    config = SimpleNamespace(_attn_implementation=own)
    return SimpleNamespace(config=config, get_input_embeddings=lambda: embedding)


def test_flash_attention_where_it_imports_on_cuda_in_half_precision(monkeypatch):
    half = model_on("cuda", torch.bfloat16)
    assert packed_attention(half) == "sdpa", "flash-attn is not installed here"
    for version in (4, 3, 2):
        monkeypatch.setattr(tf.utils, f"is_flash_attn_{version}_available", lambda: True)
        assert packed_attention(half) == f"flash_attention_{version}"
    single = model_on("cuda", torch.float32)
    assert packed_attention(single) == "sdpa", "flash-attn has no fp32"
    assert packed_attention(single, autocast=torch.bfloat16) == "flash_attention_2"
    assert packed_attention(model_on("cpu", torch.bfloat16, own="eager")) == "eager"
    assert packed_attention(model_on("cuda", torch.bfloat16, own="flash_attention_3")) == "flash_attention_3"


def test_attending_gives_the_models_own_attention_back():
    first, second = tiny_model("llama"), add_lora(tiny_model("qwen2"))
    inner = second.get_base_model()
    inner.set_attn_implementation("eager")
    with pytest.raises(KeyError), attending([first, second, first], "eager"):
        assert first.model.config._attn_implementation == inner.config._attn_implementation == "eager"
        raise KeyError
    assert first.model.config._attn_implementation == "sdpa" and inner.config._attn_implementation == "eager"
