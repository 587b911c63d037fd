"""An LM small enough to enumerate, trained through the public API, ends at the distribution the method promises.

One fixed length: exactly p_base^α, normalised. Several lengths: p_base^α · exp(−λ|y|), where λ is what normalises it
(METHOD: Z(q, y) = Z'(q)^|y| leaves one parameter, a tilt by length).
"""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

import powerflow_fast
from powerflow_fast.config import PowerFlowConfig

LETTERS = "abcde"
END = LETTERS.index("e")


def enumerable_lm(*, ends: bool):
    """(model, tokenizer, every completion it can give): 3 tokens of 5, or up to 4 tokens ended by 'e' or the limit."""
    torch.manual_seed(3)
    tokens = {"pad_token": "a"} | ({"eos_token": "e"} if ends else {})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    config = tf.LlamaConfig(
        vocab_size=5,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=END if ends else None,
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.05)  # no completion is so rare that it is never drawn
    if not ends:
        return model, tokenizer, list(itertools.product(range(5), repeat=3))
    letters = range(END)
    completions = [(*head, END) for length in range(4) for head in itertools.product(letters, repeat=length)] + list(
        itertools.product(letters, repeat=4)
    )
    return model, tokenizer, completions


@torch.no_grad()
def log_probs(model, completions):
    """Exact log-prob of each completion after the prompt 'a', by plain transformers."""
    total = []
    for completion in completions:
        logits = model(torch.tensor([[0, *completion]])).logits[0, :-1].double().log_softmax(-1)
        total.append(logits.gather(1, torch.tensor(completion)[:, None]).sum())
    return torch.stack(total)


def power_target(base, lengths, alpha):
    """p_base^α exp(−λ|y|), with the λ that makes it sum to one."""
    low, high = torch.tensor(-50.0).double(), torch.tensor(50.0).double()
    for _ in range(100):
        middle = (low + high) / 2
        too_heavy = (alpha * base - middle * lengths).exp().sum() > 1
        low, high = (middle, high) if too_heavy else (low, middle)
    return (alpha * base - low * lengths).exp()


def total_variation(p, q):
    return float((p - q).abs().sum() / 2)


# Every pair of two settings, not every triple: each case trains for ten seconds.
@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "variable-length"])
@pytest.mark.parametrize(("alpha", "log_z"), [(0.5, "learned"), (2.0, "group"), (4.0, "learned")])
def test_training_reaches_the_power_of_the_base(alpha, log_z, ends, tmp_path):
    if ends:
        log_z = "learned" if log_z == "group" else "group"
    model, tokenizer, completions = enumerable_lm(ends=ends)
    base = log_probs(model, completions)
    assert abs(float(base.exp().sum()) - 1) < 1e-5, "the completions are all there is"
    lengths = torch.tensor([len(c) for c in completions]).double()
    target = power_target(base, lengths, alpha)
    if not ends:
        torch.testing.assert_close(target, (alpha * base).softmax(0))
    config = PowerFlowConfig(
        output_dir=str(tmp_path / "run"),
        num_generations=192,
        per_device_train_batch_size=192,
        max_completion_length=4 if ends else 3,
        rollout_engine="hf",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        log_z=log_z,
        log_z_learning_rate=1e-2,
        adam_beta2=0.99,
        rollout_batch_size=192,
        max_steps=250,
        logging_steps=250,
        num_sample_prompts=0,
    )
    result = powerflow_fast.train(model, ["a"], alpha=alpha, tokenizer=tokenizer, config=config)
    reached = log_probs(result.model, completions).exp()
    assert total_variation(base.exp(), target) > 0.1, "there was something to learn"
    assert total_variation(reached, target) <= 0.03
    if ends and alpha != 1:
        untilted = (alpha * base).softmax(0)
        assert total_variation(reached, target) < total_variation(reached, untilted)
