"""base="8bit" and base="4bit", with bitsandbytes itself on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch
import transformers
from runs import run, same, weights
from tiny import EOS, PAD, VOCAB, ragged_ids

from powerflow_fast.errors import ConfigError
from powerflow_fast.models import make_base, pad_batch
from powerflow_fast.models.quantization import QUANTIZED, quantize_base

BATCH = pad_batch(ragged_ids([2, 7, 4], seed=1), ragged_ids([5, 1, 9], seed=2), 0)


def model_of_blocks(tied):
    """bitsandbytes wants sides that are multiples of 64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
    ids = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD}
    more = {"num_hidden_layers": 2, "max_position_embeddings": 64, "initializer_range": 0.12}
    config = transformers.LlamaConfig(**sizes, **ids, **more, tie_word_embeddings=tied)
    return transformers.LlamaForCausalLM(config).eval()


def stored(model):
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


@pytest.mark.parametrize("mode", QUANTIZED)
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_base_is_near_the_model_and_smaller(tied, mode):
    pytest.importorskip("bitsandbytes")
    model = model_of_blocks(tied)
    before = {name: p.clone() for name, p in model.named_parameters()}
    exact = make_base(model, "copy")
    base = quantize_base(make_base(model, "copy"), mode)
    want, got = (b.score(BATCH, temperature=1.0) for b in (exact, base))
    error = float((got - want).abs().mean())
    assert 0 < error < {"8bit": 0.1, "4bit": 0.5}[mode], "another model, and close"
    assert stored(base.scorer.model) < stored(exact.scorer.model)
    assert type(base.scorer.head.module) is torch.nn.Linear
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters()), "the policy keeps its weights"
    assert not any(p.requires_grad for p in base.scorer.parameters())
    alone = pad_batch(ragged_ids([2, 7, 4], seed=1)[:1], ragged_ids([5, 1, 9], seed=2)[:1], 0)
    torch.testing.assert_close(base.score(alone, temperature=1.0), got[:5], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", QUANTIZED)
def test_training_on_a_quantised_base_resumes(tmp_path, mode):
    pytest.importorskip("bitsandbytes")
    whole = run(tmp_path, model_of_blocks(False), name="whole", base=mode, max_steps=3)
    run(tmp_path, model_of_blocks(False), name="cut", base=mode, max_steps=2, save_steps=1)
    resumed = run(tmp_path, model_of_blocks(False), name="cut", base=mode, max_steps=3, resume_from_checkpoint=True)
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(weights(whole.model), weights(model_of_blocks(False)))


def test_a_model_without_such_layers_is_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ConfigError, match=r"base='4bit' finds no linear layer .* multiples of 64"):
        run(tmp_path, base="4bit")


def test_without_bitsandbytes_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"base='4bit' needs bitsandbytes .*pip install bitsandbytes"):
        run(tmp_path, base="4bit")
    with pytest.raises(ConfigError, match="base='8bit' quantises a copy"):
        run(tmp_path, base="8bit", use_peft=True)
