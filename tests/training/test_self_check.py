from __future__ import annotations

import pytest
import torch
import transformers as tf
from tiny import ARCHITECTURES, BOS, EOS, PAD, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401

from powerflow_fast.errors import SelfCheckError
from powerflow_fast.models import CausalLMScorer, add_lora, disable_dropout
from powerflow_fast.rollout import HFGenerateEngine
from powerflow_fast.training.self_check import check_packing, self_check

PROMPTS = ragged_ids([6, 1, 9], seed=4)


def engine(model, temperature=0.9, cls=HFGenerateEngine, batch_size=4):
    return cls(model, tiny_tokenizer(), temperature=temperature, max_completion_length=64, batch_size=batch_size)


def check(model, *, temperature=0.9, **options):
    self_check(model, tiny_tokenizer(), temperature=temperature, sample_prompts_ids=PROMPTS, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_passes(arch):
    model = disable_dropout(tiny_model(arch)).train()
    check(model, engine=engine(model))
    assert model.training


def test_passes_with_lora_in_half_precision_and_under_autocast():
    policy = add_lora(tiny_model())
    check(policy, engine=engine(policy))
    half = tiny_model().to(torch.bfloat16)
    check(half, engine=engine(half))
    model = tiny_model("gemma2")
    check(model, engine=engine(model), autocast=lambda: torch.autocast("cpu", torch.bfloat16))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda z: 2.0 * z, r"constant factor 2: a logit scale"),
        (lambda z: 0.25 * z, r"constant factor 0.25: a logit scale"),
        (lambda z: 3.0 * torch.tanh(z / 3.0), "saturating softcap"),
        (lambda z: z + torch.linspace(-2, 2, VOCAB).roll(17), "a bias was missed"),
        (lambda z: z.roll(1, dims=1), "1 position off"),
        (lambda z: z.flip(-1), "computes its logits from something else"),
        (lambda z: z.masked_fill(torch.arange(VOCAB) == 9, float("-inf")), "infinities or NaN"),
    ],
)
def test_names_what_the_model_does_to_its_logits(change, cause):
    model = tiny_model()
    scorer = CausalLMScorer(model)
    forward = model.forward

    def changed(**kwargs):
        output = forward(**kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(SelfCheckError, match=cause):
        check(scorer)


def test_catches_dropout():
    with pytest.raises(SelfCheckError, match=r"disable_dropout\(model\)"):
        check(tiny_model("gpt2"))


class LeakyEngine(HFGenerateEngine):
    """Lets the model's own options through, as an engine that was written with less care would."""

    def _generate_batch(self, lm, *args):
        own = lm.generation_config
        for name, value in self.leak.items():
            setattr(own, name, value)
        wrapped = lm.generate
        lm.generate = lambda **kwargs: wrapped(**{**kwargs, "generation_config": own, **self.forced(kwargs)})
        try:
            return super()._generate_batch(lm, *args)
        finally:
            del lm.generate

    def forced(self, kwargs):
        given = kwargs["generation_config"]
        keep = ("do_sample", "max_new_tokens", "return_dict_in_generate", "output_scores", "pad_token_id")
        return {name: getattr(given, name) for name in keep}


@pytest.mark.parametrize(
    ("leak", "cause"),
    [
        ({"top_k": 3}, r"top-k, top-p or min-p.*top_k=3"),
        ({"top_k": 0, "repetition_penalty": 1.8}, r"full softmax.*repetition_penalty=1.8"),
        ({"top_k": 0, "min_p": 0.3}, r"top-k, top-p or min-p.*min_p=0.3"),
        ({"top_k": 0, "temperature": 0.4}, r"temperature 0.4, but scores are taken at 0.9"),
        ({"top_k": 0, "suppress_tokens": list(range(4, 40))}, r"suppress_tokens"),
    ],
)
def test_names_leftovers_in_an_engine(leak, cause):
    model = tiny_model()
    for name, value in leak.items():
        setattr(model.generation_config, name, value)
    leaky = engine(model, cls=LeakyEngine)
    leaky.leak = {"temperature": 0.9, **leak}
    with pytest.raises(SelfCheckError, match=cause):
        check(model, engine=leaky)
    check(model, engine=engine(model))  # our own engine puts them aside


def test_an_engine_at_another_temperature():
    model = tiny_model()
    with pytest.raises(SelfCheckError, match=r"temperature 1, but scores are taken at 0\.9"):
        check(model, engine=engine(model, temperature=1.0))


def test_a_model_that_cannot_be_padded_on_the_left():
    model = disable_dropout(tiny_model("bart"))
    with pytest.raises(SelfCheckError, match="set rollout_batch_size=1"):
        check(model, engine=engine(model))
    check(model, engine=engine(model, batch_size=1))


def test_needs_a_prompt():
    with pytest.raises(SelfCheckError, match="no prompt"):
        self_check(tiny_model(), tiny_tokenizer(), temperature=1.0, sample_prompts_ids=[[]])


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != "opt"])  # gemma2: softcap, sliding window
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_passes(arch, dtype):
    model = disable_dropout(tiny_model(arch)).to(dtype)
    check_packing(CausalLMScorer(model), temperature=0.9, sample_prompts_ids=PROMPTS)
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_packing_passes_for_lora_a_frozen_base_autocast_checkpointing_and_one_prompt():
    options = {"temperature": 0.9, "sample_prompts_ids": PROMPTS}
    policy = add_lora(tiny_model())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    check_packing(CausalLMScorer(policy), autocast=lambda: torch.autocast("cpu", torch.bfloat16), **options)
    check_packing(CausalLMScorer(tiny_model().requires_grad_(False)), **options)
    checkpointed = tiny_model()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_packing(CausalLMScorer(checkpointed), **options)
    check_packing(CausalLMScorer(tiny_model()), temperature=0.9, sample_prompts_ids=PROMPTS[:1])


def own_mask(model):
    """As a model that fills in an attention mask where it is given none; OPT does."""
    forward = model.forward
    model.forward = lambda **kw: forward(**{"attention_mask": torch.ones_like(kw["input_ids"]), **kw})
    return model


def own_cache(model):
    forward = model.forward
    model.forward = lambda **kw: forward(**{**kw, "use_cache": True})
    return model


def shifted_positions(model):
    forward = model.forward

    def changed(position_ids=None, **kwargs):
        return forward(position_ids=None if position_ids is None else position_ids + 3, **kwargs)

    model.forward = changed
    return model


def no_positions(model):
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None, use_cache=None: forward(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache
    )
    return model


def packed_layer(change):
    """The second layer's attention output goes through ``change`` when several sequences are in the row."""

    def patch(model):
        attention = model.model.layers[1].self_attn
        forward = attention.forward

        def changed(*args, position_ids=None, **kwargs):
            output, *rest = forward(*args, position_ids=position_ids, **kwargs)
            packed = position_ids is not None and bool((position_ids.diff() < 0).any())
            return change(output) if packed else output, *rest

        attention.forward = changed
        return model

    return patch


@pytest.mark.parametrize(
    ("arch", "broken", "cause"),
    [
        ("opt", lambda model: model, "OPTForCausalLM with sdpa attention cannot be packed: .*Only the first"),
        ("llama", own_mask, "LlamaForCausalLM .*Only the first of a row is right"),
        ("llama", own_cache, "Only the first of a row is right"),
        ("gpt2", shifted_positions, "Even the first of a row is wrong: position ids"),
        ("llama", no_positions, "raises TypeError: .*position_ids"),
        ("llama", packed_layer(lambda x: x.detach()), "log-probs are right, but their gradient"),
        ("llama", packed_layer(lambda x: x + 0.5 * (x - x.detach())), "log-probs are right, but their gradient"),
        ("llama", packed_layer(lambda x: x * float("nan")), "difference inf"),
        # What a recurrent layer or a convolution over the row does: a little of the token before, whoever's it is.
        ("qwen2", packed_layer(lambda x: x + 0.1 * x.roll(1, 1)), "cannot be packed"),
    ],
)
def test_packing_that_is_broken_is_refused(arch, broken, cause):
    model = broken(disable_dropout(tiny_model(arch)))
    with pytest.raises(SelfCheckError, match=cause):
        check_packing(CausalLMScorer(model), temperature=0.9, sample_prompts_ids=PROMPTS)


def test_a_leak_between_prompts_that_are_all_alike_is_caught():
    with pytest.raises(SelfCheckError, match="Only the first of a row is right"):
        check_packing(CausalLMScorer(own_mask(tiny_model())), temperature=0.9, sample_prompts_ids=[[5]] * 4)


def test_a_recurrent_state_is_caught():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": VOCAB}
    model = tf.MambaForCausalLM(tf.MambaConfig(**sizes, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.normal_(0.0, 0.6)
    with pytest.raises(SelfCheckError, match=r"MambaForCausalLM .*cannot be packed"):
        check_packing(CausalLMScorer(model), temperature=0.9, sample_prompts_ids=PROMPTS)


def test_a_prompt_is_needed_to_check_packing():
    with pytest.raises(SelfCheckError, match="check_packing: sample_prompts_ids holds no prompt"):
        check_packing(CausalLMScorer(tiny_model()), temperature=1.0, sample_prompts_ids=[[]])
