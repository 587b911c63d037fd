"""Continuous batching: what transformers' manager does by itself and must not do to a training run."""

from __future__ import annotations

import copy

import pytest
import torch
from distances import chi_square
from rollouts import HOSTILE, PROMPTS, hostile
from rollouts import engine as hf_engine
from tiny import EOS, PAD, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig
from transformers.generation.continuous_batching import cache as paged

from powerflow_fast.errors import ConfigError, RolloutError
from powerflow_fast.models import CausalLMScorer, add_lora, pad_batch
from powerflow_fast.rollout import ContinuousBatchingEngine
from powerflow_fast.rollout.continuous import batching_config


def engine(model, tokenizer=None, **options):
    bounds = {"batch_size": 64, "cache_tokens": 1024, "max_batch_tokens": 64}
    options = {"temperature": 1.0, "max_completion_length": 6, **bounds, **options}
    return ContinuousBatchingEngine(model, tokenizer or tiny_tokenizer(), **options)


def scored(model, rollout, temperature=1.0):
    batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, PAD)
    with torch.no_grad():
        return CausalLMScorer(model)(batch, temperature=temperature).logps


def flat(rollout):
    return torch.tensor([x for row in rollout.logps for x in row])


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gpt2", "cohere"])
def test_drawn_with_the_scored_probability(arch):
    model = hostile(tiny_model(arch))
    rollout = engine(model, temperature=0.8).generate(PROMPTS, seed=5, return_logps=True)
    assert rollout.prompt_ids == PROMPTS
    torch.testing.assert_close(scored(model, rollout, 0.8), flat(rollout), atol=1e-4, rtol=0)
    assert all(getattr(model.generation_config, name) == value for name, value in HOSTILE.items())


def test_first_tokens_follow_the_full_softmax():
    """Of one prompt 600 times: its copies are forked from one prefill and must be drawn independently."""
    model = tiny_model(spread=0.3)
    prompt = PROMPTS[2]
    p = model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1)
    sampler = engine(model, batch_size=600, cache_tokens=20000, max_batch_tokens=600)
    rollout = sampler.generate([prompt] * 600, seed=11, max_completion_length=1)
    counts = torch.bincount(torch.tensor([c[0] for c in rollout.completion_ids]), minlength=VOCAB).double()
    assert counts.sum() == 600 and (counts > 0).sum() > 20
    assert chi_square(counts, p) > 0.01


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("size", [2, 64])
def test_results_keep_the_order_of_the_prompts(size, copies):
    """A model that says its last token again: whatever comes back first, each completion must fit its own prompt."""
    model = tiny_model()
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        model.lm_head.weight.copy_(100 * torch.nn.functional.normalize(model.model.embed_tokens.weight, dim=1))
    prompts = ragged_ids([3, 1, 7, 2], seed=3)
    prompts = [p for p in prompts for _ in range(copies)] + ([prompts[1]] if copies == 1 else [])
    rollout = engine(model, batch_size=size).generate(prompts, seed=0)
    assert rollout.prompt_ids == prompts
    assert rollout.completion_ids == [[prompt[-1]] * 6 for prompt in prompts]
    assert rollout.finished == [False] * len(prompts)


def test_a_rollout_depends_on_weights_prompts_and_seed_only():
    model = tiny_model()
    torch.manual_seed(1)
    first = engine(model).generate(PROMPTS, seed=7)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    again = engine(model).generate(PROMPTS, seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    other = engine(model).generate(PROMPTS, seed=8)
    assert all(a != b for a, b in zip(first.completion_ids, other.completion_ids, strict=True)), "fresh noise"
    copies = engine(model).generate([PROMPTS[0]] * 8, seed=7).completion_ids
    assert len(set(map(tuple, copies))) > 4


def test_no_keys_and_values_of_older_weights():
    """Also where somebody keeps a manager on the model: its prefix cache is of the weights from before."""
    model = tiny_model()
    prompts = ragged_ids([40, 33], seed=1)  # more than a page, so that there is something to share
    sampler = engine(model)
    sampler.generate(prompts, seed=0)
    config = batching_config(16, num_blocks=64, max_batch_tokens=64)
    own = GenerationConfig(max_new_tokens=2, eos_token_id=EOS, pad_token_id=PAD)
    model.generate_batch(prompts, own, continuous_batching_config=config, persistent_manager=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    rollout = sampler.generate(prompts, seed=0, return_logps=True)
    torch.testing.assert_close(scored(model, rollout), flat(rollout), atol=1e-4, rtol=0)


def test_training_flags_attention_and_forward_are_put_back(monkeypatch):
    model = tiny_model("gpt2").train()  # it has dropout
    model.transformer.h[0].eval()
    model.set_attn_implementation("eager")
    sampler = engine(model)
    rollout = sampler.generate(PROMPTS, seed=0, return_logps=True)
    torch.testing.assert_close(scored(model.eval(), rollout), flat(rollout), atol=1e-4, rtol=0)
    model.train()
    model.transformer.h[0].eval()

    def unchanged():
        flags = (model.training, model.transformer.h[0].training, model.transformer.h[1].training)
        assert flags == (True, False, True)
        assert model.config._attn_implementation == "eager" and "forward" not in vars(model)

    unchanged()
    state = torch.get_rng_state()

    def fail(*args, **kwargs):
        raise MemoryError("no room for the cache")

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", fail)
    with pytest.raises(RolloutError, match="no room for the cache"):
        sampler.generate(PROMPTS, seed=0)
    unchanged()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_failing_forward_is_an_error_and_not_a_shorter_rollout(monkeypatch):
    model = tiny_model()

    def fail(*args, **kwargs):
        raise ValueError("broken layer")

    monkeypatch.setattr(model.model.layers[1], "forward", fail)
    with pytest.raises(RolloutError, match="broken layer"):
        engine(model).generate(PROMPTS, seed=0)


def test_memory_is_what_the_config_says(monkeypatch):
    caches = []
    original = paged.PagedAttentionCache.__init__

    def spy(self, *args, **kwargs):
        original(self, *args, **kwargs)
        one = hasattr(self, "cache_tensor")  # older releases have one tensor per layer
        tensors = [self.cache_tensor] if one else [*self.key_cache, *self.value_cache]
        caches.append((sum(x.nbytes for x in tensors), self.max_batch_tokens))

    monkeypatch.setattr(paged.PagedAttentionCache, "__init__", spy)
    model = tiny_model()
    per_token = 2 * 2 * 1 * 8 * 4  # keys and values, layers, heads, head size, bytes
    for tokens in (64, 640):
        engine(model, cache_tokens=tokens, max_batch_tokens=16).generate(PROMPTS, seed=0)
        size, batch_tokens = caches[-1]
        assert batch_tokens == 16
        assert per_token * tokens <= size <= per_token * (tokens + 3 * 16)  # and two pages that are never handed out
    with pytest.raises(ConfigError, match=r"cache_tokens=12 must hold the longest .* 13 tokens; raise rollout_cache"):
        engine(model, cache_tokens=12).generate(PROMPTS, seed=0)


def test_a_cache_smaller_than_the_rollout_changes_no_log_prob():
    """Requests wait or are evicted and prefilled again."""
    model = tiny_model()
    sampler = engine(model, cache_tokens=48, max_batch_tokens=8, max_completion_length=20)
    rollout = sampler.generate(PROMPTS * 4, seed=2, return_logps=True)
    assert [len(row) for row in rollout.logps] == [len(ids) for ids in rollout.completion_ids]
    torch.testing.assert_close(scored(model, rollout), flat(rollout), atol=1e-4, rtol=0)


def test_kernels_are_not_looked_for(monkeypatch):
    from transformers.generation.continuous_batching import continuous_api

    def fail(**kwargs):
        raise AssertionError("looked for a flash kernel")

    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", fail)
    monkeypatch.setattr(continuous_api, "is_flash_attn_2_available", fail)
    assert len(engine(tiny_model()).generate(PROMPTS[:1], seed=0)) == 1


def test_completions_end_at_the_first_eos_or_the_limit():
    model = tiny_model(spread=0.05)
    ends = [EOS, *range(20, 30)]
    model.generation_config.eos_token_id = ends
    rollout = engine(model, max_completion_length=4).generate(PROMPTS * 8, seed=0, return_logps=True)
    assert True in rollout.finished and False in rollout.finished
    for ids, logps, finished in zip(rollout.completion_ids, rollout.logps, rollout.finished, strict=True):
        assert 1 <= len(ids) <= 4 and len(logps) == len(ids)
        assert not set(ids[:-1]) & set(ends)
        assert finished == (ids[-1] in ends)
        assert finished or len(ids) == 4
    assert (4, True) in zip(map(len, rollout.completion_ids), rollout.finished, strict=True)  # at the very limit
    model.generation_config.eos_token_id = None  # the config's own must not come back in through the manager
    none = engine(model, eos_ids=[], max_completion_length=4).generate(PROMPTS * 8, seed=0)
    assert {len(ids) for ids in none.completion_ids} == {4} and not any(none.finished)
    assert any(EOS in ids for ids in none.completion_ids)


def test_autocast_holds_in_the_engines_thread():
    model = tiny_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.dtype))

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    rollout = engine(model, autocast=autocast).generate(PROMPTS, seed=0, return_logps=True)
    assert set(seen) == {torch.bfloat16}
    with autocast():
        gap = (scored(model, rollout) - flat(rollout)).abs()
    assert gap.max() < 0.15 and gap.mean() < 0.03


@pytest.mark.parametrize("make", [engine, hf_engine])
@pytest.mark.parametrize("frozen", [False, True])
def test_autocast_casts_the_weights_once_a_rollout(frozen, make):
    """Its copies of them are dropped with a thread's outermost context, which must not be that of one forward; and it
    keeps none of weights that require no gradient, such as those below a LoRA adapter."""
    casts: list[int] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter):
                casts[-1] += 1
            return func(*args, **(kwargs or {}))

    class Watched(torch.nn.Linear):
        def forward(self, x):
            casts.append(0)
            with Casts():
                return super().forward(x)

    model = tiny_model()
    head = model.lm_head
    model.lm_head = Watched(head.in_features, head.out_features, bias=False)
    model.requires_grad_(not frozen)
    model.model.norm.requires_grad_(frozen)
    sampler = make(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    for _ in range(2):
        casts.clear()
        sampler.generate(PROMPTS, seed=0)
        assert len(casts) > 3 and casts[0] == 1 and sum(casts) == 1
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert ("lm_head.weight" in trained) != frozen and ("model.norm.weight" in trained) == frozen
    casts.clear()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():  # no copy stays behind for the weights of later
        model.lm_head(torch.ones(1, head.in_features))
    assert casts == [1]


def test_peft_model():
    policy = add_lora(copy.deepcopy(tiny_model()))
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    rollout = engine(policy).generate(PROMPTS, seed=0, return_logps=True)
    torch.testing.assert_close(scored(policy, rollout), flat(rollout), atol=1e-4, rtol=0)


def test_no_prompts_and_an_empty_prompt():
    assert engine(tiny_model()).generate([], seed=0, return_logps=True).logps == []
    with pytest.raises(ValueError, match=r"prompts\[1\] is empty"):
        engine(tiny_model()).generate([[4], []], seed=0)
