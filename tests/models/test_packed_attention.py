from __future__ import annotations

import inspect
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import transformers as tf
from runs import run
from tiny import one_thread, tiny_model  # noqa: F401
from torch.utils.flop_counter import FlopCounterMode

from powerflow_fast.models import CausalLMScorer, add_lora, pack_batch, pad_batch
from powerflow_fast.models.packed_attention import (
    VARLEN,
    attending,
    break_even,
    packed_attention,
    register_varlen,
    varlen_attention,
    varlen_available,
)
from powerflow_fast.training import prepare
from powerflow_fast.training.self_check import check_packing


def model_on(device, dtype, own="sdpa"):
    """As much of a model as the choice looks at; there need be no such device here."""
    weight = SimpleNamespace(device=torch.device(device), dtype=dtype)
    embedding = SimpleNamespace(weight=weight)
    config = SimpleNamespace(_attn_implementation=own)
    config.get_text_config = lambda: config
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
    counted = (flop[8] - 8 * per_pair) / per_pair  # with the rotations, in some releases of torch: a thousandth
    assert break_even(model, "sdpa") == pytest.approx(counted, rel=2e-3)
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


def attend_one_by_one(query, key, value, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
    """What torch's kernel computes, which exists for CUDA only: (T, heads, D) packed, causal within a left window."""
    assert cu_q is cu_k and max_q == max_k == int(cu_q.diff().max()) and cu_q.dtype == torch.int32
    assert query.dtype == key.dtype == value.dtype, "the kernel takes one dtype, and is not cast for by autocast"
    assert query.ndim == 3 and (query.shape[1] != key.shape[1]) == enable_gqa and window_size[1] == 0
    rows = []
    for first, last in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        q, k, v = (x[first:last].transpose(0, 1)[None] for x in (query, key, value))
        back = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (back >= 0) & (back <= (window_size[0] if window_size[0] >= 0 else last))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        rows.append(out[0].transpose(0, 1))
    return torch.cat(rows)


@pytest.fixture(params=["torch 2.11", "newer"])
def varlen(monkeypatch, request):
    from torch.nn.attention import varlen as module

    calls = []
    known = [*inspect.signature(attend_one_by_one).parameters.values()]
    known = known[:-1] if request.param == "torch 2.11" else known  # it has no enable_gqa

    def spy(*args, **kwargs):
        spy.__signature__.bind(*args, **kwargs)
        calls.append((args[3], kwargs))
        return attend_one_by_one(*args, **kwargs)

    spy.__signature__ = inspect.Signature(known)
    monkeypatch.setattr(module, "varlen_attn", spy)
    register_varlen()
    return calls


PROMPTS, COMPLETIONS = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3]], [[5, 6], [7, 8, 9, 1, 2], [3], [2, 2, 4]]


@pytest.mark.parametrize("arch", ["llama", "qwen2", "mistral"])
def test_varlen_attention_gives_the_models_own_log_probs_and_gradients(varlen, arch):
    options = {"sliding_window": 3} if arch == "mistral" else {}
    model = tiny_model("llama" if arch == "mistral" else arch)
    if options:
        config = tf.MistralConfig(**{**model.config.to_dict(), **options, "num_key_value_heads": 1})
        config._attn_implementation = "sdpa"
        torch.manual_seed(0)
        model = tf.MistralForCausalLM(config)
    scorer = CausalLMScorer(model)

    def scored(batch):
        logps = scorer(batch, temperature=1.0).logps
        return logps.detach(), torch.autograd.grad(logps.sum(), list(model.parameters()))

    own, gradient = scored(pad_batch(PROMPTS, COMPLETIONS, 0))
    assert not varlen
    with attending([model], VARLEN):
        for batch in (
            pack_batch(PROMPTS, COMPLETIONS),
            pack_batch(PROMPTS, COMPLETIONS, break_even=0.0),  # several rows
            pad_batch(PROMPTS, COMPLETIONS, 0),
        ):
            varlen.clear()
            logps, packed = scored(batch)
            torch.testing.assert_close(logps, own)
            for a, b in zip(packed, gradient, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            assert len(varlen) == model.config.num_hidden_layers
            assert all(cu is varlen[0][0] for cu, _ in varlen), "the borders are looked for once"
            window = (2, 0) if options else (-1, 0)
            assert all(kwargs["window_size"] == window for _, kwargs in varlen)
        check_packing(scorer, temperature=1.0, sample_prompts_ids=PROMPTS)
        autocast = partial(torch.autocast, "cpu", torch.bfloat16)
        check_packing(scorer, temperature=1.0, sample_prompts_ids=PROMPTS, autocast=autocast)


def test_varlen_is_taken_without_flash_attention_where_the_model_needs_no_more():
    half = model_on("cuda", torch.bfloat16)
    assert packed_attention(half) == "sdpa", "not written for flash-attn"
    half._supports_flash_attn = True
    assert packed_attention(half) == VARLEN and break_even(half, VARLEN) is None
    assert packed_attention(model_on("cpu", torch.bfloat16)) == "sdpa"
    assert varlen_available(SimpleNamespace(layer_types=["sliding_attention", "full_attention"]))
    for lacking in (
        {"layer_types": ["chunked_attention"]},
        {"attn_logit_softcapping": 50.0},
        {"attention_chunk_size": 8},
    ):
        assert not varlen_available(SimpleNamespace(**lacking))
        for name, value in lacking.items():
            setattr(half.config, name, value)
        assert packed_attention(half) == "sdpa"
        for name in lacking:
            delattr(half.config, name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softcap": 30.0}, "a softcap"),
        ({"dropout": 0.1}, "dropout"),
        ({"s_aux": torch.zeros(1)}, "attention sinks"),
        ({"is_causal": False}, "attention that is not causal"),
        ({"position_ids": None}, "a forward pass without position_ids"),
    ],
)
def test_varlen_refuses_what_the_kernel_lacks(varlen, options, message):
    q = torch.zeros(1, 1, 4, 8)
    arguments = {"position_ids": torch.arange(4)[None], **options}
    with pytest.raises(ValueError, match=f"variable-length attention doesn't take {message}$"):
        varlen_attention(torch.nn.Module(), q, q, q, None, **arguments)
    with pytest.raises(ValueError, match=r"a cache of keys$"):
        varlen_attention(torch.nn.Module(), q[:, :, :1], q, q, None, position_ids=torch.tensor([[3]]))


def test_varlen_refuses_padding_on_the_left(varlen):
    model = tiny_model("llama")
    ids, mask = torch.tensor([[0, 1, 2], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with attending([model], VARLEN), pytest.raises(ValueError, match="padded on the right"):
        model(ids, attention_mask=mask, use_cache=False)
    with attending([model], VARLEN):
        right = model(ids, attention_mask=mask.flip(1), use_cache=False).logits
    own = model(ids, attention_mask=mask.flip(1), use_cache=False).logits
    torch.testing.assert_close(right[0, :2], own[0, :2])


def test_an_attention_that_fails_leaves_packing_to_the_models_own(tmp_path, monkeypatch, caplog):
    """Here the kernel raises, since it exists for CUDA only."""
    monkeypatch.setattr(prepare, "packed_attention", lambda *args, **kwargs: register_varlen())
    with caplog.at_level("INFO", "powerflow_fast"):
        run(tmp_path, max_steps=1, packing="on", num_sample_prompts=1)
    assert "packed rows go through sdpa: check_packing" in caplog.text
    assert "rows are packed, with sdpa attention" in caplog.text
