from __future__ import annotations

import copy

import pytest
import torch
from distances import chi_square
from rollouts import PROMPTS, engine, hostile
from tiny import EOS, PAD, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.models import CausalLMScorer, add_lora, pad_batch
from powerflow_fast.rollout.engine import eos_token_ids


@pytest.mark.parametrize(("arch", "temperature", "leftovers"), [("llama", 1.0, True), ("gemma2", 1.7, False)])
def test_first_token_follows_the_full_softmax(arch, temperature, leftovers):
    model = tiny_model(arch, spread=0.3)
    if leftovers:
        hostile(model)
    prompt = PROMPTS[2]
    logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double()
    p = (logits / temperature).softmax(-1)
    rollout = engine(model, temperature=temperature, batch_size=500).generate(
        [prompt] * 2000, seed=11, max_completion_length=1
    )
    counts = torch.bincount(torch.tensor([c[0] for c in rollout.completion_ids]), minlength=VOCAB).double()
    assert counts.sum() == 2000 and (counts > 0).sum() > 30
    assert chi_square(counts, p) > 0.01
    if temperature != 1.0:
        assert chi_square(counts, logits.softmax(-1)) < 1e-6  # the test can tell temperatures apart


@pytest.mark.parametrize("leftovers", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "opt", "phi", "gemma2"])
def test_drawn_with_the_scored_probability(arch, leftovers):
    """Left-padded, cached decoding draws with the log-probs that the scorer gives on right-padded rows."""
    model = tiny_model(arch)
    if leftovers:
        hostile(model)
    rollout = engine(model, temperature=0.8).generate(PROMPTS, seed=5, return_logps=True)
    batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    scored = CausalLMScorer(model)(batch, temperature=0.8).logps
    drawn = torch.tensor([x for row in rollout.logps for x in row])
    assert torch.allclose(scored, drawn, atol=1e-4)


def test_generation_config_is_put_back_even_after_an_error(monkeypatch):
    model = hostile(tiny_model())
    own = model.generation_config
    before = copy.deepcopy(own.to_dict())
    engine(model).generate(PROMPTS, seed=0)
    assert model.generation_config is own and own.to_dict() == before

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model, "_sample", fail)
    monkeypatch.setattr(type(model), "_sample", fail)
    model.train()
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no memory"):
        engine(model).generate(PROMPTS, seed=0)
    assert model.generation_config is own and model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_rollout_depends_on_weights_prompts_and_seed_only():
    model = tiny_model()
    torch.manual_seed(1)
    first = engine(model).generate(PROMPTS, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = engine(model).generate(PROMPTS, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert engine(model).generate(PROMPTS, seed=8).completion_ids != first.completion_ids
    assert engine(model).generate([PROMPTS[0]] * 8, seed=7).completion_ids != [first.completion_ids[0]] * 8


def test_results_keep_the_order_of_the_prompts():
    """A model that says its last token again: whatever the batching, each completion must fit its own prompt."""
    model = tiny_model()
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        unit = torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1)
        model.lm_head.weight.copy_(100 * unit)
    for size in (1, 2, 64):
        rollout = engine(model, batch_size=size).generate(PROMPTS, seed=0)
        assert rollout.prompt_ids == PROMPTS
        assert rollout.completion_ids == [[prompt[-1]] * 6 for prompt in PROMPTS]
        assert rollout.finished == [False] * len(PROMPTS)


@pytest.mark.parametrize("pad", [True, False])
def test_completions_end_at_the_first_eos(pad):
    """With and without a padding token of its own; without one, padding is the end-of-sequence token."""
    model = tiny_model(spread=0.05)  # nearly uniform: end-of-sequence has about the probability of any other token
    ends = [EOS, *range(20, 30)]
    model.generation_config.eos_token_id = ends
    rollout = engine(model, tiny_tokenizer(pad=pad), max_completion_length=4).generate(PROMPTS * 8, seed=0)
    assert True in rollout.finished and False in rollout.finished
    seen = set()
    for ids, finished in zip(rollout.completion_ids, rollout.finished, strict=True):
        assert 1 <= len(ids) <= 4
        assert not set(ids[:-1]) & set(ends)
        assert finished == (ids[-1] in ends)
        assert finished or len(ids) == 4
        seen.add(ids[-1])
    assert len(seen & set(ends)) > 3
    assert (4, True) in zip(map(len, rollout.completion_ids), rollout.finished, strict=True)  # at the very limit


def test_a_drawn_padding_token_counts():
    model = tiny_model(spread=0.05)
    tokens = [
        t for ids in engine(model, max_completion_length=12).generate(PROMPTS * 20, seed=0).completion_ids for t in ids
    ]
    assert PAD in tokens  # it has a probability like any other and is scored, so it must not be dropped


def test_eos_ids():
    model = tiny_model()
    model.generation_config.eos_token_id = [5, VOCAB + 3]
    assert eos_token_ids(model, tiny_tokenizer()) == [EOS, 5]
    assert eos_token_ids(add_lora(model), tiny_tokenizer()) == [EOS, 5]
    model = tiny_model()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    none = tiny_tokenizer(eos=False)
    assert eos_token_ids(model, none) == []
    rollout = engine(model, none).generate(PROMPTS, seed=0)
    assert rollout.finished == [False] * 5 and {len(ids) for ids in rollout.completion_ids} == {6}


def test_training_flags_and_checkpointing():
    """Decoding runs in eval mode with a cache, also for a model that trains with activation checkpointing."""
    model = tiny_model("gpt2")  # it has dropout
    want = engine(model).generate(PROMPTS, seed=0)
    model.gradient_checkpointing_enable()
    model.train()
    model.transformer.h[0].eval()
    assert engine(model).generate(PROMPTS, seed=0) == want
    assert model.training and not model.transformer.h[0].training and model.transformer.h[1].training


def test_peft_model():
    model = tiny_model()
    want = engine(model).generate(PROMPTS, seed=0)
    policy = add_lora(copy.deepcopy(model))
    assert engine(policy).generate(PROMPTS, seed=0) == want
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    rollout = engine(policy).generate(PROMPTS, seed=0, return_logps=True)
    assert rollout.completion_ids != want.completion_ids
    scored = CausalLMScorer(policy)(pad_batch(rollout.prompt_ids, rollout.completion_ids, PAD), temperature=1.0).logps
    assert torch.allclose(scored, torch.tensor([x for row in rollout.logps for x in row]), atol=1e-4)


def test_autocast_is_entered():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    engine(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).generate(PROMPTS[:1], seed=0)
    assert set(seen) == {torch.bfloat16}


def test_no_prompts_and_an_empty_prompt():
    assert len(engine(tiny_model()).generate([], seed=0)) == 0
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        engine(tiny_model()).generate([[4], []], seed=0)
