"""Prompts, an engine, and a generation config that must not be heeded."""

from __future__ import annotations

from tiny import EOS, PAD, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.rollout import HFGenerateEngine

PROMPTS = ragged_ids([3, 1, 7, 2, 3], seed=3)
HOSTILE = {
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.5,
    "temperature": 0.1,
    "repetition_penalty": 2.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[7], [8]],
    "suppress_tokens": [9, 10, 11],
    "begin_suppress_tokens": [12],
    "sequence_bias": [[[13], -9.0]],
    "min_new_tokens": 6,
    "forced_eos_token_id": EOS,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_time": 1e-9,
    "exponential_decay_length_penalty": [1, 5.0],
}


def engine(model, tokenizer=None, **options):
    options = {"temperature": 1.0, "max_completion_length": 6, "batch_size": 64, **options}
    return HFGenerateEngine(model, tokenizer or tiny_tokenizer(), **options)


def hostile(model):
    for name, value in HOSTILE.items():
        setattr(model.generation_config, name, value)
    return model
