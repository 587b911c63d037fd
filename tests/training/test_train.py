"""train(): what it leaves behind, the loss scale, log Z', stale rollouts, LoRA, and every way to refuse bad input."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers as tf
from runs import FAST, PROMPTS, run, same, weights
from tiny import tiny_model, tiny_tokenizer

import powerflow_fast
from powerflow_fast import PowerFlowConfig
from powerflow_fast.checkpoints.folder import load_checkpoint
from powerflow_fast.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NonFiniteLossError,
    OutputDirError,
    SelfCheckError,
)
from powerflow_fast.rollout import generate
from powerflow_fast.training import run as training_run


def test_a_run_leaves_everything_behind(tmp_path):
    seen = []
    result = run(
        tmp_path,
        eval_fn=lambda model, tokenizer, step: {"step_seen": step},
        callbacks=[lambda report: seen.append((report.step, report.metrics["loss"]))],
        eval_steps=2,
        log_completions=True,
        report_to="tensorboard",
    )
    folder = tmp_path / "run"
    assert result.output_dir == folder and not result.model.training
    assert [step for step, _ in seen] == [1, 2, 3]
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert [row["eval/step_seen"] for row in rows if "eval/step_seen" in row] == [0.0, 2.0, 3.0]
    needed = ["delta_abs", "log_z", "policy_logp", "base_logp", "length", "entropy", "grad_norm", "learning_rate"]
    for row in steps:
        assert all(math.isfinite(row[name]) for name in [*needed, "tokens_per_second", "seconds/rollout"])
        assert 0 < row["length"] <= 6 and row["policy_logp"] < 0 and 0 < row["entropy"] <= math.log(61) + 1e-5
    assert steps[0]["policy_logp"] == pytest.approx(steps[0]["base_logp"], abs=1e-5), "the policy starts at the base"
    assert (folder / "history.png").stat().st_size > 20_000
    assert "**Prompt:**" in (folder / "samples.md").read_text()
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 3 * 4
    assert list(folder.glob("powerflow/events*")), "tensorboard was fed"
    card = (folder / "model" / "README.md").read_text()
    assert "α: 2" in card and "sha256" in card and "powerflow_fast" in card
    assert (folder / "log_z_head.safetensors").is_file()
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt")) and not list(folder.rglob("*.pkl"))
    reloaded = tf.AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert same(weights(reloaded), weights(result.model))
    assert (
        tf.AutoTokenizer.from_pretrained(result.model_dir)("two")["input_ids"] == tiny_tokenizer()("two")["input_ids"]
    )


def gradient_of_first_step(tmp_path, monkeypatch, name, **options):
    """Gradients before clipping and the loss of step 1."""
    found = {}
    original = training_run.Updater.gradient

    def spy(self, samples, **keywords):
        sums = original(self, samples, **keywords)
        found.update({n: p.grad.clone() for n, p in self.policy.named_parameters() if p.grad is not None})
        found["loss"] = sums.loss.clone()
        return sums

    monkeypatch.setattr(training_run.Updater, "gradient", spy)
    run(tmp_path, name=name, max_steps=1, **options)
    return found


@pytest.mark.parametrize("log_z", ["learned", "group"])
def test_micro_batches_do_not_show(tmp_path, monkeypatch, log_z):
    """24 sequences in 1, 3 or 12 micro-batches: the same loss and the same gradient. Lengths are uneven."""
    options = {"log_z": log_z, "prompts": PROMPTS * 2, "format_fn": lambda prompt, text: "a" in text}
    found = [
        gradient_of_first_step(
            tmp_path,
            monkeypatch,
            f"split{size}",
            per_device_train_batch_size=size,
            gradient_accumulation_steps=24 // size,
            **options,
        )
        for size in (24, 8, 2)
    ]
    whole = found[0]
    assert whole["loss"] > 0
    for parts in found[1:]:
        assert parts.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("log_z", ["learned", "group"])
def test_packing_and_token_budgets_do_not_show(tmp_path, monkeypatch, log_z):
    options = {"log_z": log_z, "per_device_train_batch_size": 8, "format_fn": lambda prompt, text: "a" in text}
    cuts = [{"packing": "off"}, {"packing": "on"}, {"packing": "on", "max_tokens_per_batch": 30}]
    cuts += [{"packing": "auto", "max_tokens_per_batch": 16}, {"packing": "off", "max_tokens_per_batch": 30}]
    whole, *others = [
        gradient_of_first_step(tmp_path, monkeypatch, f"cut{i}", **options, **cut) for i, cut in enumerate(cuts)
    ]
    assert whole["loss"] > 0
    for found in others:
        assert found.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-5, msg=name)


def test_packing_is_chosen_by_measuring(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    kinds = []
    original = training_run.CausalLMScorer.forward

    def spy(self, batch, **keywords):
        kinds.append(type(batch).__name__)
        return original(self, batch, **keywords)

    monkeypatch.setattr(training_run.CausalLMScorer, "forward", spy)
    run(tmp_path, name="llama", max_steps=1)
    assert kinds[-1] == "PackedBatch" and "rows are packed, with sdpa attention" in caplog.text
    run(tmp_path, name="opt", model=tiny_model("opt"), max_steps=1)
    assert kinds[-1] == "PaddedBatch"
    assert "rows are padded instead of packed: check_packing: OPTForCausalLM with sdpa attention" in caplog.text
    run(tmp_path, name="off", max_steps=1, packing="off")
    assert kinds[-1] == "PaddedBatch"
    with pytest.raises(SelfCheckError, match="OPTForCausalLM with sdpa attention cannot be packed"):
        run(tmp_path, name="on", model=tiny_model("opt"), packing="on")
    assert not (tmp_path / "on").exists()


def test_a_base_that_cannot_be_packed_keeps_rows_padded(tmp_path, monkeypatch, caplog):
    original = training_run.make_base

    def broken(model, mode):
        base = original(model, mode)
        forward = base.scorer.model.forward
        base.scorer.model.forward = lambda **kw: forward(**{"attention_mask": torch.ones_like(kw["input_ids"]), **kw})
        return base

    monkeypatch.setattr(training_run, "make_base", broken)
    run(tmp_path, max_steps=1, base="cpu")
    assert "rows are padded instead of packed" in caplog.text


def test_alpha_one_is_at_its_optimum(tmp_path):
    """At α = 1 the base model is the target: group log Z' makes every residual zero."""
    result = run(tmp_path, alpha=1.0, log_z="group", max_steps=1)
    assert result.history[0]["loss"] < 1e-10 and result.history[0]["delta_abs"] < 1e-5


def test_learned_log_z_starts_at_the_best_constant(tmp_path):
    result = run(tmp_path, alpha=2.0, max_steps=1, per_device_train_batch_size=12, prompts=PROMPTS[:1])
    row = result.history[0]
    assert row["log_z"] == pytest.approx(2.0 * row["base_logp"] - row["policy_logp"], abs=1e-4)


def test_several_updates_per_rollout_weigh_by_the_ratio(tmp_path):
    result = run(tmp_path, num_iterations=3, max_steps=6, learning_rate=2e-2, importance_clip=(0.9, 1.1))
    by_update = [row["importance_weight"] for row in result.history]
    clipped = [row["clip_fraction"] for row in result.history]
    assert by_update[0] == by_update[3] == 1.0, "fresh samples have weight one"
    assert clipped[0] == 0.0 and max(clipped[1:3]) > 0.0
    assert all(0.9 - 1e-6 <= w <= 1.1 + 1e-6 for w in by_update)
    rolled_out = [row["seconds/rollout"] > 0 for row in result.history]
    assert rolled_out == [True, False, False, True, False, False]


def test_steps_per_generation_uses_each_sample_once(tmp_path, monkeypatch):
    seen = []
    original = training_run.Updater.gradient
    monkeypatch.setattr(
        training_run.Updater,
        "gradient",
        lambda self, samples, **k: seen.append(samples.completion_ids) or original(self, samples, **k),
    )
    run(tmp_path, steps_per_generation=3, max_steps=3, per_device_train_batch_size=4, log_completions=True)
    rows = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").read_text().splitlines()]
    texts = tiny_tokenizer().batch_decode([ids for step in seen for ids in step], skip_special_tokens=True)
    assert len(seen) == 3 and [row["text"] for row in rows] == texts


def test_lora_trains_the_adapter_and_saves_a_plain_model(tmp_path):
    base = tiny_model()
    before = weights(base)
    result = run(tmp_path, model=base, use_peft=True, lora_r=4, learning_rate=1e-2)
    frozen = {
        n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in weights(result.model).items()
    }
    assert all(torch.equal(before[n], frozen[n]) for n in before), "the base weights did not move"
    reloaded = tf.AutoModelForCausalLM.from_pretrained(result.model_dir)
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(reloaded(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(reloaded(ids).logits, tiny_model()(ids).logits, atol=1e-3), "and the adapter did"
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoint-3")
    assert all("lora" in name or "log_z" in name for name in checkpoint.tensors["weights"])


@pytest.mark.parametrize("arch", ["gemma2", "qwen2", "gpt2"])
@pytest.mark.parametrize("base", ["copy", "cpu"])
def test_other_architectures_train(tmp_path, arch, base):
    model = tiny_model(arch)
    before = weights(model)
    result = run(tmp_path, model=model, base=base, max_steps=2, activation_checkpointing=arch == "qwen2")
    assert not same(before, weights(result.model))
    assert result.history[0]["policy_logp"] == pytest.approx(result.history[0]["base_logp"], abs=1e-4)


def test_chat_prompts_and_format_columns(tmp_path):
    seen = set()

    def format_fn(prompt, completion, answer):
        seen.add((prompt[0]["content"], answer))
        return False

    path = tmp_path / "prompts.jsonl"
    rows = [{"messages": [{"role": "user", "content": c}], "answer": i} for i, c in enumerate(["aa", "bb"])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(
        tmp_path,
        prompts=path,
        tokenizer=tiny_tokenizer(chat_template=True),
        format_fn=format_fn,
        max_steps=2,
        max_prompt_length=24,
    )
    assert seen == {("aa", 0), ("bb", 1)}
    assert [row["format_ok"] for row in result.history] == [0.0, 0.0]


def test_a_callback_stops_the_run(tmp_path):
    result = run(tmp_path, max_steps=50, callbacks=[lambda report: report.step == 2])
    assert result.history[-1]["step"] == 2 and (tmp_path / "run" / "checkpoint-2").is_dir()


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    model = tiny_model()
    torch.manual_seed(7)
    run(tmp_path, model=model, max_steps=1, use_peft=True)
    assert torch.equal(torch.rand(3), expected)


def test_same_seed_same_run_and_other_seed_another(tmp_path):
    a, b, c = (run(tmp_path, name=f"r{i}", seed=seed) for i, seed in enumerate((0, 0, 1)))
    assert same(weights(a.model), weights(b.model)) and not same(weights(a.model), weights(c.model))


def test_non_finite_loss_stops_before_the_weights_change(tmp_path, monkeypatch):
    original = training_run.Updater.score_base
    calls = []

    def infinite_later(self, samples):
        calls.append(len(samples))
        return original(self, samples) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(training_run.Updater, "score_base", infinite_later)
    model, seen = tiny_model(), {}
    with pytest.raises(NonFiniteLossError, match=r"step 3: loss (nan|inf).*after step 2 is in") as caught:
        run(
            tmp_path,
            model=model,
            max_steps=5,
            on_nonfinite="stop",
            callbacks=[lambda report: seen.update(weights(report.model))],
        )
    assert caught.value.step == 3
    assert same(seen, weights(model))
    kept = load_checkpoint(caught.value.checkpoint)
    assert kept.state["step"] == 2
    assert all(torch.equal(kept.tensors["weights"][f"scorer.model.{n}"], seen[n]) for n in seen)


def test_non_finite_gradient_keeps_finite_weights(tmp_path, monkeypatch):
    original = training_run.Updater.gradient

    def spoiled(self, samples, **keywords):
        sums = original(self, samples, **keywords)
        if spoiled.calls == 1:
            next(self.policy.parameters()).grad.fill_(float("nan"))
        spoiled.calls += 1
        return sums

    spoiled.calls = 0
    monkeypatch.setattr(training_run.Updater, "gradient", spoiled)
    model = tiny_model()
    with pytest.raises(NonFiniteLossError, match=r"step 2: .*gradient norm nan.*after step 1 is in") as caught:
        run(tmp_path, model=model, on_nonfinite="stop")
    kept = load_checkpoint(caught.value.checkpoint)
    assert kept.state["step"] == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())


def broken_model():
    model = tiny_model()
    forward = model.forward

    def doubled(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = out.logits * 2 + out.logits.abs().sqrt()
        return out

    model.forward = doubled
    return model


BAD = {
    "alpha missing": ({"alpha": None}, ConfigError, "alpha is required"),
    "alpha zero": ({"alpha": 0.0}, ConfigError, "alpha must be > 0, got 0.0"),
    "alpha nan": ({"alpha": float("nan")}, ConfigError, "alpha must be finite, got nan"),
    "unknown field": (
        {"learning_rat": 1e-3},
        ConfigError,
        "unknown field 'learning_rat'; did you mean 'learning_rate'",
    ),
    "missing prompts": ({"prompts": "nowhere.jsonl"}, DataError, "nowhere.jsonl: does not exist"),
    "no prompts": ({"prompts": []}, DataError, "holds no prompts"),
    "long prompt": ({"prompts": ["x" * 40]}, DataError, r"prompts\[0\] \(40 tokens\).*max_prompt_length=40"),
    "positions": ({"max_completion_length": 500}, ConfigError, "exceeds the model's 64 positions"),
    "missing model": ({"model": "./no-such-folder"}, ModelError, "does not exist"),
    "groups": (
        {"log_z": "group", "per_device_train_batch_size": 2, "steps_per_generation": 2},
        ConfigError,
        "whole groups",
    ),
    "division": ({"num_generations": 3}, ConfigError, "num_generations=3 must divide the 4 sequences"),
    "adapter_off": ({"base": "adapter_off"}, ModelError, "needs a PEFT model"),
    "top_p": ({"top_p": 0.9}, ConfigError, "top_p must be 1.0, got 0.9"),
    "broken model": ({"model": broken_model}, ModelError, "changes the logits after its head"),
    "a plain module": ({"model": lambda: torch.nn.Linear(2, 2)}, ModelError, "got Linear"),
    "float64": ({"model": lambda: tiny_model().double()}, ModelError, "weights are float64"),
    "other tokenizer": ({"tokenizer": "gpt2"}, TypeError, "tokenizer must be a tokenizer object, got str"),
    "config dict": ({"config": {"seed": 1}}, TypeError, "config must be a PowerFlowConfig, got dict"),
    "callback": ({"callbacks": [3]}, TypeError, "callbacks must be callable, got int"),
    "tracker": ({"report_to": "trackio"}, ConfigError, "report_to='trackio' needs a package"),
    "resume nothing": ({"resume_from_checkpoint": "nowhere"}, CheckpointError, "nowhere: no such checkpoint folder"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_the_first_step(case, tmp_path):
    options, error, message = BAD[case]
    options = {k: v() if callable(v) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        run(tmp_path, **options)
    assert not (tmp_path / "run").exists(), "nothing was left behind"


def test_a_rollout_that_is_not_what_is_scored_is_refused(tmp_path, monkeypatch):
    original = generate.HFGenerateEngine.__init__

    def hotter(self, *args, temperature, **kwargs):
        original(self, *args, temperature=2 * temperature, **kwargs)

    monkeypatch.setattr(generate.HFGenerateEngine, "__init__", hotter)
    with pytest.raises(SelfCheckError, match="samples at temperature 2"):
        run(tmp_path)


def test_output_dir_of_another_run_is_refused(tmp_path):
    run(tmp_path, max_steps=1)
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(OutputDirError, match=r"already holds a run .newest checkpoint: checkpoint-1"):
        run(tmp_path, max_steps=1)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_files_of_others_are_never_replaced(tmp_path):
    folder = tmp_path / "run"
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "mine.txt").write_text("x")
    with pytest.raises(OutputDirError, match=r"holds model, which no run of powerflow_fast put there"):
        run(tmp_path, model=str(folder / "model"))
    assert (folder / "model" / "mine.txt").read_text() == "x" and [p.name for p in folder.iterdir()] == ["model"]


def test_half_precision_weights_are_trained_in_fp32(tmp_path, caplog):
    model = tiny_model().to(torch.bfloat16)
    before = weights(model)
    result = run(tmp_path, model=model, learning_rate=1e-6)
    assert "converted to float32" in caplog.text
    moved = [(p != before[name].float()).float().mean() for name, p in weights(result.model).items()]
    assert sum(m > 0.5 for m in moved) >= len(moved) - 2
    kept = run(tmp_path, name="as-is", model=tiny_model().to(torch.bfloat16), dtype="bfloat16", max_steps=1)
    assert next(kept.model.parameters()).dtype == torch.bfloat16


def test_lora_on_half_precision_weights_is_merged_without_rounding(tmp_path):
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    result = run(tmp_path, model=str(tmp_path / "base"), tokenizer=None, use_peft=True, learning_rate=1e-4)
    ids = torch.tensor([[5, 6, 7, 8]])
    merged = tf.AutoModelForCausalLM.from_pretrained(result.model_dir)
    exact = result.model.float()
    torch.testing.assert_close(merged(ids).logits, exact(ids).logits, rtol=1e-5, atol=1e-5)


def test_an_update_that_breaks_the_weights_is_named(tmp_path):
    with pytest.raises(NonFiniteLossError, match=r"step \d: .*(weights non-finite|did not change)") as caught:
        run(tmp_path, learning_rate=1e20, max_grad_norm=0.0, max_steps=4)
    assert caught.value.step <= 3


def test_config_object_and_overrides(tmp_path):
    config = PowerFlowConfig(**{**FAST, "output_dir": str(tmp_path / "run"), "max_steps": 9})
    result = powerflow_fast.train(tiny_model(), PROMPTS, config=config, max_steps=1, tokenizer=tiny_tokenizer())
    assert result.history[-1]["step"] == 1
    assert config.max_steps == 9, "the caller's config is not changed"
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["alpha"] == 2.0
