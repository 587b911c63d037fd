"""Tiny models and a tokenizer, made from configs in memory: no download, no file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

VOCAB = 61  # more than the tokenizer has, and no power of two
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?!+-=\n"
PAD, BOS, EOS, UNK = range(4)
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + '\n' + m['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)

_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS, "vocab_size": VOCAB}
_MODERN = {
    **_IDS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def one_thread():
    """On matrices this small, threads only wait for each other. Works in a test file that imports it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _config(arch: str) -> Any:
    if arch == "llama":
        return tf.LlamaConfig(**_MODERN)
    if arch == "llama_tied":
        return tf.LlamaConfig(**_MODERN, tie_word_embeddings=True)
    if arch == "qwen2":
        return tf.Qwen2Config(**_MODERN, tie_word_embeddings=True)
    if arch == "gemma2":
        cap = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8}
        return tf.Gemma2Config(**_MODERN, **cap, sliding_window=4)
    if arch == "cohere":
        return tf.CohereConfig(**_MODERN, logit_scale=0.0625)
    if arch == "granite":
        return tf.GraniteConfig(**_MODERN, logits_scaling=6.0)
    if arch == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
        return tf.GPT2Config(**_IDS, **sizes, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)
    if arch == "gpt_neox":
        return tf.GPTNeoXConfig(**{k: v for k, v in _MODERN.items() if k not in ("num_key_value_heads", "head_dim")})
    if arch == "phi":  # its head has a bias
        return tf.PhiConfig(**{k: v for k, v in _MODERN.items() if k != "head_dim"})
    if arch == "opt":
        small = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        return tf.OPTConfig(**_IDS, **small, word_embed_proj_dim=8, max_position_embeddings=64, dropout=0.1)
    if arch == "bart":  # its positions count the padding on the left
        sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24}
        return tf.BartConfig(**_IDS, **sizes, max_position_embeddings=64)
    if arch == "t5":  # an encoder-decoder, which is to be refused
        return tf.T5Config(**_IDS, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    raise ValueError(f"unknown tiny architecture {arch!r}")


ARCHITECTURES = ("llama", "llama_tied", "qwen2", "gemma2", "cohere", "granite", "gpt2", "gpt_neox", "phi", "opt")


def tiny_model(arch: str = "llama", *, seed: int = 0, spread: float = 0.6) -> Any:
    """A model in eval mode with normal weights of deviation ``spread``: large enough that logits differ clearly."""
    torch.manual_seed(seed)
    config = _config(arch)
    model = (tf.AutoModelForSeq2SeqLM if arch == "t5" else tf.AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, spread)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
    return model.eval()


def tiny_tokenizer(*, chat_template: bool = False, pad: bool = True, eos: bool = True) -> Any:
    """One token per character; ids follow ``SPECIAL + LETTERS``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate((*SPECIAL, *LETTERS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokens = {"bos_token": "<bos>", "unk_token": "<unk>"}
    if pad:
        tokens["pad_token"] = "<pad>"
    if eos:
        tokens["eos_token"] = "<eos>"
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **tokens)
    if chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def ragged_ids(lengths: list[int], *, seed: int = 0) -> list[list[int]]:
    """Token ids, no special ones among them, in lists of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCAB, (n,), generator=generator).tolist() for n in lengths]
