from __future__ import annotations

import copy
import json

import pytest
import torch
from tiny import ARCHITECTURES, EOS, PAD, UNK, VOCAB, one_thread, ragged_ids, tiny_model, tiny_tokenizer  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

from powerflow_fast.errors import ModelError
from powerflow_fast.models import (
    CausalLMScorer,
    add_lora,
    disable_dropout,
    load_model,
    make_base,
    pack_batch,
    pad_batch,
)
from powerflow_fast.models.head import find_head
from powerflow_fast.models.loading import max_positions, pad_token_id

PROMPTS = ragged_ids([1, 6, 3, 2], seed=1)
COMPLETIONS = ragged_ids([5, 2, 0, 7], seed=2)


def batch():
    return pad_batch(PROMPTS, COMPLETIONS, PAD)


def plain_logits(model, ids):
    tensor = torch.tensor([ids])
    return model(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits[0].float()


def plain_logps(model, temperature):
    """One unpadded sequence at a time, by the model's own logits."""
    rows = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = plain_logits(model, prompt + completion) / temperature
        rows += [
            logits[t - 1].log_softmax(-1)[(prompt + completion)[t]]
            for t in range(len(prompt), len(prompt + completion))
        ]
    return torch.stack(rows)


HEADS = {
    "gemma2": (1.0, 3.0, True, False),
    "cohere": (0.0625, None, True, False),
    "granite": (1 / 6, None, False, False),
    "phi": (1.0, None, False, True),
    "llama": (1.0, None, False, False),
    "llama_tied": (1.0, None, True, False),
}


@pytest.mark.parametrize("arch", HEADS)
def test_find_head(arch):
    scale, softcap, tied, bias = HEADS[arch]
    model = tiny_model(arch)
    head = find_head(model)
    assert head.logit_scale == pytest.approx(scale, rel=1e-6)
    assert head.logit_softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-6))
    assert head.tied is tied
    assert (head.bias is not None) is bias
    assert head.weight is model.get_output_embeddings().weight


def test_a_scale_and_softcap_unknown_to_us_are_measured():
    model = tiny_model("gemma2")
    forward = model.forward

    def scaled(**kwargs):
        output = forward(**kwargs)
        output.logits = 5.0 * torch.tanh(0.25 * output.logits / 5.0)
        return output

    model.config.final_logit_softcapping = None
    model.forward = scaled
    head = find_head(model)
    assert head.logit_scale == pytest.approx(0.25, rel=1e-5)
    assert head.logit_softcap == pytest.approx(5.0, rel=1e-5)
    got = CausalLMScorer(model)(batch(), temperature=1.0).logps
    assert torch.allclose(got, plain_logps(model, 1.0), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.sign() * z.abs().sqrt(), "neither a positive scale nor a softcap"),
        (lambda z: z.masked_fill(torch.arange(VOCAB) == 7, -1e9), "at vocabulary entry 7"),
        (lambda z: z + 0.1 * (torch.arange(VOCAB) == 11), "at vocabulary entry 11"),
        (lambda z: z.log_softmax(-1), "neither a positive scale"),
        (lambda z: z[..., :50], "cut or regrouped"),
        (lambda z: -z, "neither a positive scale"),
    ],
)
def test_find_head_refuses_other_logits(change, message):
    model = tiny_model()
    forward = model.forward

    def changed(**kwargs):
        output = forward(**kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    with pytest.raises(ModelError, match=message):
        find_head(model)


def test_find_head_refuses_other_models():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    with pytest.raises(ModelError, match="encoder-decoder"):
        find_head(tiny_model("t5"))
    with pytest.raises(ModelError, match=r"lora.*take the head out of the adapter"):
        find_head(get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"])))
    with pytest.raises(ModelError, match="take the head out of the adapter"):
        config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"])
        find_head(get_peft_model(tiny_model(), config))
    with pytest.raises(ModelError, match="virtual tokens"):
        find_head(get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)))
    model = tiny_model()
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, VOCAB))
    with pytest.raises(ModelError, match=r"Sequential, not nn\.Linear"):
        find_head(model)


@pytest.mark.parametrize(
    ("arch", "attention", "packed"),
    [(arch, None, False) for arch in ARCHITECTURES]
    + [(arch, None, True) for arch in ARCHITECTURES if arch != "opt"]  # it makes an attention mask of its own
    + [(arch, "eager", True) for arch in ("llama", "qwen2", "gpt2")],
)
def test_scorer_equals_plain_logits(arch, attention, packed):
    """Values and gradients of every parameter, at a temperature that is not one, and with an empty completion."""
    model = disable_dropout(tiny_model(arch)).train()
    if attention is not None:
        model.set_attn_implementation(attention)
    scorer = CausalLMScorer(model)
    weights = torch.linspace(-1, 1, sum(map(len, COMPLETIONS)))
    want = plain_logps(model, 0.7)
    (want * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)

    out = scorer(pack_batch(PROMPTS, COMPLETIONS) if packed else batch(), temperature=0.7)
    assert out.logps.dtype == torch.float32
    assert out.cu_seqlens.tolist() == [0, 5, 7, 7, 14]
    assert torch.allclose(out.logps, want, atol=2e-5, rtol=1e-5)
    (out.logps * weights).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (gradients[name] is None), name
        if p.grad is not None:
            tolerance = 1e-5 + 1e-4 * float(gradients[name].abs().max())
            assert torch.allclose(p.grad, gradients[name], atol=tolerance), name


@pytest.mark.parametrize("lora", [False, True])
def test_activation_checkpointing_changes_no_gradient(lora):
    model = tiny_model().train()
    if lora:
        model = add_lora(model)
    scorer = CausalLMScorer(model)
    gradients = []
    for _ in range(2):
        scorer.zero_grad(set_to_none=True)
        scorer(batch(), temperature=1.0).logps.sum().backward()
        gradients.append({name: p.grad for name, p in scorer.named_parameters() if p.grad is not None})
        model.gradient_checkpointing_enable()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name in gradients[0]:
        assert torch.allclose(gradients[0][name], gradients[1][name], atol=1e-5), name


def test_scorer_is_not_shifted():
    """A model whose next token is certain: token i is followed by i + 1, so a shift by one would show."""
    model = tiny_model("llama")
    with torch.no_grad():
        for p in model.model.layers.parameters():
            p.zero_()
        model.model.embed_tokens.weight.copy_(torch.randn(VOCAB, 16, generator=torch.Generator().manual_seed(0)))
        unit = model.model.embed_tokens.weight / model.model.embed_tokens.weight.norm(dim=1, keepdim=True)
        model.lm_head.weight.copy_(100 * unit.roll(1, dims=0))
    out = CausalLMScorer(model)(pad_batch([[5, 6], [9]], [[7, 8, 9], [10]], PAD), temperature=1.0)
    assert out.logps.min() > -1e-2
    wrong = CausalLMScorer(model)(pad_batch([[5, 6]], [[6, 6]], PAD), temperature=1.0)
    assert wrong.logps.max() < -5


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_entropy_and_pooled_prompt(arch, packed):
    model = tiny_model(arch)
    scorer = CausalLMScorer(model)
    made = pack_batch(PROMPTS, COMPLETIONS) if packed else batch()
    out = scorer(made, temperature=1.3, need_stats=True, pool_prompt=True)
    logps, pooled = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        logits = plain_logits(model, prompt + completion)[len(prompt) - 1 : len(prompt + completion) - 1]
        logps.append((logits / 1.3).log_softmax(-1))
        hidden = model.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[0]
        pooled.append(hidden.mean(0))  # every prompt token, the last one included
    logps = torch.cat(logps)
    assert torch.allclose(out.stats.entropy, -(logps.exp() * logps).sum(-1), atol=1e-4)
    assert torch.allclose(out.pooled_prompt, torch.stack(pooled), atol=1e-5)
    assert out.logps.requires_grad and not out.stats.entropy.requires_grad and not out.pooled_prompt.requires_grad
    with torch.no_grad():
        again = scorer(batch(), temperature=1.3, need_stats=True)
    assert torch.allclose(again.logps, out.logps, atol=1e-6)
    assert again.pooled_prompt is None


class Outputs(TorchDispatchMode):
    """Records (rows, last size) of every tensor that is made, backward included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.ndim:
            self.sizes.add((result.shape[:-1].numel(), result.shape[-1]))
        return result

    def __enter__(self):
        self.sizes = set()
        return super().__enter__()


def test_scorer_makes_no_logits_of_all_positions_and_leaves_the_model_alone():
    model = tiny_model()
    scorer = CausalLMScorer(model)
    before = plain_logits(model, PROMPTS[1])
    with Outputs() as outputs:
        scorer(batch(), temperature=1.0).logps.sum().backward()
    rows = batch().input_ids.numel()
    assert (rows, 16) in outputs.sizes  # the recorder sees the hidden states, in any shape of the same size
    assert (rows, VOCAB) not in outputs.sizes
    assert "forward" not in model.lm_head.__dict__
    assert torch.equal(plain_logits(model, PROMPTS[1]), before)
    assert set(scorer.state_dict()) == {f"model.{name}" for name in model.state_dict()}


def test_all_completions_empty():
    out = CausalLMScorer(tiny_model())(pad_batch(PROMPTS, [[]] * 4, PAD), temperature=1.0, pool_prompt=True)
    assert out.logps.shape == (0,) and out.pooled_prompt.shape == (4, 16)
    out.logps.sum().backward()


def test_scorer_in_half_precision_and_under_autocast():
    model = tiny_model()
    want = plain_logps(model, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = CausalLMScorer(model)(batch(), temperature=1.0).logps
    assert got.dtype == torch.float32 and (got - want).abs().max() < 0.5
    half = copy.deepcopy(model).to(torch.bfloat16)
    got = CausalLMScorer(half)(batch(), temperature=1.0).logps
    assert got.dtype == torch.float32 and (got - want).abs().max() < 0.5


def test_base_copy_does_not_move():
    for arch in ("llama_tied", "gpt2"):
        model = tiny_model(arch).train()
        base = make_base(model)
        assert base.mode == "copy"
        model.eval()
        want = plain_logps(model, 0.9)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        got = base.score(batch(), temperature=0.9)
        assert torch.allclose(got, want, atol=1e-4)
        assert not got.requires_grad
        frozen = list(base.scorer.parameters())
        assert not any(p.requires_grad for p in frozen) and not base.scorer.model.training
        assert all(p.requires_grad for p in model.parameters())
        assert len(frozen) == len(list(model.parameters()))  # a tied head stays tied


def test_base_on_the_cpu():
    model = tiny_model()
    base = make_base(CausalLMScorer(model), "cpu")
    assert base.scorer.model is not model
    assert torch.allclose(
        base.score(batch(), temperature=1.0), make_base(model, "copy").score(batch(), temperature=1.0)
    )
    with pytest.raises(ModelError, match="needs a PEFT model"):
        make_base(model, "adapter_off")


@pytest.mark.parametrize("arch", ["llama", "llama_tied", "gpt2"])
def test_lora_base_is_the_original(arch):
    model = disable_dropout(tiny_model(arch))
    want = plain_logps(model, 1.0)
    policy = add_lora(copy.deepcopy(model), r=4, alpha=8)
    scorer = CausalLMScorer(policy).train()
    base = make_base(policy)
    assert base.mode == "adapter_off"
    fresh = scorer(batch(), temperature=1.0)
    assert torch.allclose(fresh.logps, want, atol=1e-4)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_()
    moved = scorer(batch(), temperature=1.0)
    assert (moved.logps - want).abs().max() > 0.1
    assert torch.allclose(base.score(batch(), temperature=1.0), want, atol=1e-4)
    assert scorer.training and policy.training
    scorer(batch(), temperature=1.0).logps.sum().backward()
    trained = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert trained and all("lora_" in name for name in trained)
    assert trained == {name for name, p in policy.named_parameters() if "lora_" in name}
    assert isinstance(find_head(policy).module, torch.nn.Linear)
    assert torch.allclose(make_base(policy, "copy").score(batch(), temperature=1.0), moved.logps, atol=1e-4)


def test_add_lora_errors(monkeypatch):
    with pytest.raises(ModelError, match="target_modules"):
        add_lora(tiny_model(), target_modules=["nothing_like_it"])
    with pytest.raises(ModelError, match="target_modules"):
        add_lora(tiny_model(), target_modules=["lm_head"])  # the head is never adapted
    with pytest.raises(ModelError, match="already has an adapter"):
        add_lora(add_lora(tiny_model()))
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ModelError, match=r"powerflow-fast\[lora\]"):
        add_lora(tiny_model())


@pytest.mark.parametrize("arch", ["gpt2", "opt"])
def test_disable_dropout(arch):
    model = tiny_model(arch).train()
    scorer = CausalLMScorer(model)
    assert not torch.equal(scorer(batch(), temperature=1.0).logps, scorer(batch(), temperature=1.0).logps)
    disable_dropout(model)
    assert torch.equal(scorer(batch(), temperature=1.0).logps, scorer(batch(), temperature=1.0).logps)
    assert torch.allclose(scorer(batch(), temperature=1.0).logps, scorer.eval()(batch(), temperature=1.0).logps)
    assert model.training is False


def test_pad_token_and_positions():
    model = tiny_model()
    assert pad_token_id(tiny_tokenizer()) == PAD
    assert pad_token_id(tiny_tokenizer(pad=False)) == EOS
    assert pad_token_id(tiny_tokenizer(pad=False, eos=False)) == UNK
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    for i in range(VOCAB - len(tokenizer) + 1):
        tokenizer.add_tokens(f"<x{i}>")
    tokenizer.pad_token = f"<x{i}>"
    assert tokenizer.pad_token_id >= VOCAB
    assert pad_token_id(tokenizer, model) == EOS
    assert max_positions(model) == 64 and max_positions(add_lora(tiny_model("gpt2"))) == 64


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    tiny_tokenizer(chat_template=True).save_pretrained(tmp_path)
    return tmp_path


def test_load_model_from_a_folder(folder):
    loaded = load_model(folder, dtype="float32")
    assert loaded.name == str(folder)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model("llama").lm_head.weight)
    assert loaded.tokenizer.decode(loaded.tokenizer("a cat")["input_ids"]) == "a cat"
    assert loaded.tokenizer.chat_template
    assert load_model(str(folder), dtype=torch.bfloat16, device="cpu").model.dtype == torch.bfloat16


def test_load_model_from_a_model(folder):
    model = load_model(folder).model
    again = load_model(model)
    assert again.model is model and again.name == str(folder) and again.tokenizer.chat_template
    tokenizer = tiny_tokenizer()
    assert load_model(add_lora(model), tokenizer=tokenizer).tokenizer is tokenizer
    with pytest.raises(ModelError, match="pass tokenizer="):
        load_model(tiny_model())


def test_load_model_errors(folder, tmp_path, monkeypatch):
    def refused(match, where, **options):
        with pytest.raises(ModelError, match=match) as caught:
            load_model(where, **options)
        assert len(str(caught.value)) < 600

    refused("does not exist", tmp_path / "nowhere")
    refused("does not exist", "./nowhere")
    refused("does not exist", "~/no/where")
    refused("does not exist", " ")
    (empty := tmp_path / "empty").mkdir()
    refused("no config.json", empty)
    (empty / "adapter_config.json").write_text("{}")
    refused("holds an adapter", empty)

    config = json.loads((folder / "config.json").read_text())
    (pickled := tmp_path / "pickled").mkdir()
    (pickled / "config.json").write_text(json.dumps(config))
    refused("no weights", pickled)
    torch.save({}, pickled / "pytorch_model.bin")
    refused(r"pytorch_model.bin, a pickle.*save_pretrained", pickled)

    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5", "is_encoder_decoder": True}))
    refused("encoder-decoder", folder)
    code = {"model_type": "new", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}}
    (folder / "config.json").write_text(json.dumps({**config, **code}))
    refused("trust_remote_code=True", folder)
    (folder / "config.json").write_text("{")
    refused("cannot load the model in folder", folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    refused("lacks .* weights", folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    refused("tokenizer of .*pass tokenizer=", folder)
    (folder / "model.safetensors").write_bytes(b"broken")
    refused("cannot load the model in folder", folder)

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", offline)
    refused("no such local folder, and the hub did not give it.*no network", "some/model")


def test_a_trained_adapter_under_adapter_off_is_announced(caplog):
    model = add_lora(tiny_model(), r=2)
    make_base(model, "adapter_off")
    assert not caplog.records
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_B" in name).fill_(0.1)
    make_base(model, "adapter_off")
    assert "p_base is the model without it" in caplog.text
