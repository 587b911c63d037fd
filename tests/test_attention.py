from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from tiny import one_thread, tiny_model  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from powerflow_fast.attention import attending, break_even, packed_attention
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


def test_break_even_is_where_attention_costs_as_much_as_the_weights():
    model = tiny_model("llama_tied")
    model.set_attn_implementation("eager")
    flop = {}
    for length in (8, 32):
        with FlopCounterMode(display=False) as counter:
            model.model(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False)
        flop[length] = counter.get_total_flops() / length
    per_pair = (flop[32] - flop[8]) / (32 - 8)
    assert break_even(model, "sdpa") == pytest.approx((flop[8] - 8 * per_pair) / per_pair, rel=1e-6)
    assert break_even(add_lora(tiny_model("gpt2"), r=1), "eager") > 0
    assert break_even(model, "flash_attention_2") is None


def test_attending_gives_the_models_own_attention_back():
    first, second = tiny_model("llama"), add_lora(tiny_model("qwen2"))
    inner = second.get_base_model()
    inner.set_attn_implementation("eager")
    with pytest.raises(KeyError), attending([first, second, first], "eager"):
        assert first.model.config._attn_implementation == inner.config._attn_implementation == "eager"
        raise KeyError
    assert first.model.config._attn_implementation == "sdpa" and inner.config._attn_implementation == "eager"
