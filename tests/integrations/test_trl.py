"""TRL's trainer with our loss: values and gradients, cuts of a step, the head, checkpoints, and what is refused."""

from __future__ import annotations

import copy
import importlib
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
from tiny import EOS, one_thread, tiny_model, tiny_tokenizer  # noqa: F401

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from powerflow_fast.errors import CheckpointError, ConfigError  # noqa: E402
from powerflow_fast.integrations import trl as integration  # noqa: E402
from powerflow_fast.integrations.trl import PowerFlowTRLConfig, PowerFlowTRLTrainer  # noqa: E402

ROWS = [{"prompt": p, "tag": i} for i, p in enumerate(["one ", "two and ", "a third one ", "4"] * 8)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("CI", "1")  # TRL reports its use to the hub otherwise


HERE = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True}
SIZES = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 6, "max_steps": 2}
SGD = {"optim": "sgd", "learning_rate": 1e-3, "log_z_learning_rate": 1e-2, "max_grad_norm": 0.0}
STEPS = {"save_strategy": "no", "logging_steps": 1, "lr_scheduler_type": "constant", "optim": "adamw_torch"}


def config(folder, **options):
    return PowerFlowTRLConfig(**{"alpha": 4.0, "output_dir": str(folder), **HERE, **SIZES, **STEPS, **options})


def trainer(folder, model=None, *, cls=PowerFlowTRLTrainer, rows=ROWS, eval_rows=None, **options):
    passed_on = {name: options.pop(name, None) for name in ("format_fn", "reward_funcs", "peft_config")}
    model = tiny_model() if model is None else model
    model.generation_config.eos_token_id = [EOS, *range(20, 32)]  # so that completions end at all lengths
    return cls(
        model,
        args=config(folder, **options),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_rows and Dataset.from_list(eval_rows),
        processing_class=tiny_tokenizer(),
        **passed_on,
    )


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM")


def sampled(t, rows=ROWS[:2], each=4):
    """What the trainer samples and keeps for the loss, as in training: ``each`` completions of each row."""
    t.model.train()
    return t._generate_and_score_completions([dict(row) for row in rows for _ in range(each)])["powerflow"][0][0]


def moved(model, scale=0.1):
    """Shift every trained weight, so that the policy differs from p_base and from what sampled."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


def plain_sums(model, prompts, completions, temperature):
    """(B,) log-probs of whole completions, each alone and unpadded, in fp64 from the model's own logits."""
    sums = []
    for p, c in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([p + c])).logits[0, len(p) - 1 : -1]
        sums.append((logits / temperature).log_softmax(-1).gather(1, torch.tensor(c)[:, None]).sum())
    return torch.stack(sums)


def fp64(model, arch):
    """The same weights in a model that nobody has patched."""
    weights = {name: value.detach().double() for name, value in model.state_dict().items()}
    plain = tiny_model(arch).double()
    plain.load_state_dict(weights)
    return plain


@pytest.mark.parametrize(
    ("arch", "log_z", "micro", "stale"),
    [
        ("llama", "learned", 8, False),
        ("llama", "group", 8, False),  # a micro-batch that is the whole rollout
        ("gpt2", "group", 2, True),  # groups are split, and the policy is no longer the one that sampled
        ("gpt2", "learned", 4, True),
    ],
)
def test_loss_and_gradients_are_those_of_plain_logits(tmp_path, arch, log_z, micro, stale):
    temperature, alpha, parts = 0.8, 2.0, 8 // micro
    options = {"alpha": alpha, "log_z": log_z, "log_z_num_layers": 2, "temperature": temperature}
    sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": parts, "num_iterations": 1 + stale}
    t = trainer(tmp_path, tiny_model(arch), format_fn=lambda prompt, completion, tag: tag == 0, **options, **sizes)
    base = fp64(t.model, arch)
    moved(t.model)  # from here on it samples with other weights than p_base's
    sampler = fp64(t.model, arch)
    rollout = sampled(t)
    if stale:
        moved(t.model, 0.02)
        t.state.global_step += 1  # what an optimiser step does
    t.current_gradient_accumulation_steps = parts
    if t.log_z_head is not None:
        moved(t.log_z_head)
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    total = 0.0
    for start in range(0, 8, micro):
        loss = t._compute_loss(t.model, {"powerflow": [(rollout, i) for i in order[start : start + micro]]})
        loss.backward()
        total += loss.item()

    prompts, completions = rollout.prompt_ids, rollout.completion_ids
    assert len({len(p) for p in prompts}) == 2  # so TRL padded some on the left
    policy = fp64(t.model, arch)
    lengths = torch.tensor([len(c) for c in completions])
    assert lengths.unique().numel() > 1
    psi = torch.tensor([0.0] * 4 + [-0.5] * 4).double()
    logps = plain_sums(policy, prompts, completions, temperature)
    with torch.no_grad():
        target = alpha * (plain_sums(base, prompts, completions, temperature) / lengths + psi)
        weight = torch.ones(8).double()
        if stale:
            weight = (logps - plain_sums(sampler, prompts, completions, temperature)).exp().clamp(0.8, 1.2)
            assert weight.unique().numel() > 2
    if log_z == "group":
        gap = (weight * (target - logps.detach() / lengths)).view(2, 4).sum(1) / weight.view(2, 4).sum(1)
        values = gap.repeat_interleave(4)
    else:
        head = copy.deepcopy(t.log_z_head).double()
        head.zero_grad()
        hidden = [policy.base_model(torch.tensor([p])).last_hidden_state[0].mean(0) for p in prompts]
        values = head.layers(torch.stack(hidden).detach()).squeeze(-1)
    exact = (weight * (values + logps / lengths - target) ** 2).mean()
    exact.backward()
    assert total == pytest.approx(float(exact), rel=2e-5)
    pairs = list(zip(t.model.named_parameters(), policy.named_parameters(), strict=True))
    if log_z == "learned":
        pairs += zip(t.log_z_head.named_parameters(), head.named_parameters(), strict=True)
    for (name, ours), (_, theirs) in pairs:
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=0, atol=1e-4 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("log_z", ["learned", "group"])
def test_accumulation_changes_nothing(tmp_path, log_z):
    def weights(size, **more):
        t = trainer(tmp_path, log_z=log_z, per_device_train_batch_size=size, weight_decay=0.1, **SGD, **more)
        t.train()
        own = t.optimizer.param_groups[2:]
        assert [(g["lr"], g["weight_decay"]) for g in own] == ([(1e-2, 0.0)] if log_z == "learned" else [])
        return dict(t.model.named_parameters()), t.log_z_head, t.state.log_history[0]["loss"]

    whole, head, loss = weights(8)
    cut, cut_head, cut_loss = weights(2, gradient_accumulation_steps=4)
    assert any(not torch.equal(p, q) for p, q in zip(whole.values(), tiny_model().parameters(), strict=True))
    for name, value in cut.items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-6, msg=name)
    assert cut_loss == pytest.approx(loss, rel=1e-4)
    if head is not None:
        torch.testing.assert_close(cut_head.state_dict(), head.state_dict(), rtol=1e-4, atol=1e-6)
        assert float(head.layers[-1].weight.abs().max()) > 1e-4


def history(t, name):
    return [row[name] for row in t.state.log_history if name in row]


def mean_base_logp(t):
    """Mean log-prob per token under p_base of 64 fresh samples."""
    rollout = sampled(t, ROWS[:16])
    return float((rollout.base_logps / rollout.cu_seqlens.diff()).mean())


@pytest.mark.parametrize(("log_z", "use_lora"), [("learned", False), ("group", True)])
def test_alpha_moves_the_samples_to_where_the_base_model_is_likely_or_away(tmp_path, log_z, use_lora):
    after = {}
    for alpha in (4.0, 0.3):
        model = tiny_model()
        before = copy.deepcopy(model.state_dict())
        t = trainer(
            tmp_path / str(alpha),
            model,
            alpha=alpha,
            log_z=log_z,
            log_z_learning_rate=1e-2,
            peft_config=lora() if use_lora else None,
            learning_rate=8e-3 if use_lora else 2e-3,
            max_steps=20,
            per_device_train_batch_size=32,
            reward_funcs=[lambda completions, **_: [float(len(c)) for c in completions]],
        )
        at_start = mean_base_logp(t)
        t.train()
        after[alpha] = mean_base_logp(t)
        for name in ("delta_abs", "policy_logp", "log_z", "clip_fraction", "rewards/<lambda>/mean"):
            assert len(history(t, name)) == 20, name
        assert set(history(t, "importance_weight")) == {1.0}
        if use_lora:
            trained = [name for name, p in t.model.named_parameters() if p.requires_grad]
            assert trained and all("lora_" in name for name in trained)
            assert t._base.mode == "adapter_off"
        else:
            frozen = t._base.scorer.model.state_dict()
            assert all(torch.equal(frozen[name], value) for name, value in before.items())
    assert after[4.0] > after[0.3] + 0.5
    assert after[0.3] < at_start - 0.3
    assert use_lora or after[4.0] > at_start + 0.1


@pytest.mark.parametrize("use_lora", [False, True])
def test_bf16_and_checkpointing_which_are_trls_defaults(tmp_path, use_lora):
    defaults = {"bf16": None, "gradient_checkpointing": True, "per_device_train_batch_size": 4}
    peft_config = lora() if use_lora else None
    t = trainer(tmp_path, peft_config=peft_config, gradient_accumulation_steps=2, learning_rate=1e-2, **defaults)
    assert t.args.bf16 and t.accelerator.mixed_precision == "bf16"
    before = [p.detach().clone() for p in t.model.parameters()]
    t.train()
    # Policy and base are one model in the first step; rows of other widths round differently in bf16.
    assert history(t, "policy_logp")[0] == pytest.approx(history(t, "base_logp")[0], abs=5e-3)
    assert all(math.isfinite(x) for x in history(t, "loss"))
    moved_ones = [not torch.equal(p, q) for p, q in zip(t.model.parameters(), before, strict=True)]
    assert moved_ones == [p.requires_grad for p in t.model.parameters()]


def test_stale_updates_are_weighed_and_evaluation_leaves_the_rollout_alone(tmp_path):
    options = {"num_iterations": 3, "max_steps": 3, "learning_rate": 2e-3, "log_z": "group"}
    options |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    t = trainer(tmp_path / "a", **options)
    t.train()
    weights, clipped = history(t, "importance_weight"), history(t, "clip_fraction")
    assert weights[0] == pytest.approx(1, abs=1e-4) and clipped[0] == 0
    assert weights[-1] != pytest.approx(1, abs=1e-4)
    evaluated = {"eval_rows": ROWS[:2], "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    other = trainer(tmp_path / "b", **evaluated, **options)
    other.train()
    # The second evaluation lies within the rollout that the third step still trains on.
    assert len(history(other, "eval_delta_abs")) == 3 and all(map(math.isfinite, history(other, "eval_loss")))
    assert history(other, "loss") == pytest.approx(history(t, "loss"), rel=1e-5)


def test_vllms_own_log_probs_are_those_of_the_sampling_policy(tmp_path, monkeypatch):
    t = trainer(tmp_path)
    tokens = [[5, 6, 7], [8, 9], [10], [11, 12, 13]] * 2
    given = [[-1.0, None, -2.0], [-3.0, -1.0], [-2.5], [-1.0, -1.0, -1.0]] * 2
    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", lambda self, *a, **k: (tokens, given))
    t.use_vllm = True
    rollout = sampled(t)
    plain = fp64(t.model, "llama")
    for i in (0, 1):
        p, c = rollout.prompt_ids[i], tokens[i]
        log_softmax = plain(torch.tensor([p + c])).logits[0, len(p) - 1 : -1].log_softmax(-1)
        missing = [log_softmax[j, c[j]] for j, x in enumerate(given[i]) if x is None]
        expected = sum(x for x in given[i] if x is not None) + float(sum(missing))
        assert float(rollout.old_logps[i]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("log_z", "use_lora"), [("learned", False), ("group", True)])
def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(tmp_path, log_z, use_lora):
    options = {"log_z": log_z, "log_z_num_layers": 2, "learning_rate": 1e-2, "max_steps": 4, "save_strategy": "steps"}

    def make(**more):
        return trainer(tmp_path / "run", save_steps=2, peft_config=lora() if use_lora else None, **options, **more)

    whole = make()
    whole.train()
    resumed = make()
    at_start = copy.deepcopy(resumed.model.state_dict())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert any(not torch.equal(at_start[name], value) for name, value in ours.items())
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    head_file = tmp_path / "run" / "checkpoint-4" / integration.LOG_Z_FILE
    assert head_file.is_file() == (log_z == "learned")
    if log_z == "learned":
        assert all(torch.equal(whole.log_z_head.state_dict()[n], v) for n, v in load_file(head_file).items())
        assert all(torch.equal(resumed.log_z_head.state_dict()[n], v) for n, v in load_file(head_file).items())
        # Plain transformers reads the model, and finds nothing in it that it doesn't know.
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(head_file.parent, output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in theirs.items())
        with pytest.raises(CheckpointError, match=r"alpha=4\.0, this one has 2\.0"):
            make(alpha=2.0).train(resume_from_checkpoint=str(head_file.parent))
        with pytest.raises(CheckpointError, match=r"base_model=.*the model that training began with"):
            trainer(tmp_path, whole.model, **options).train(resume_from_checkpoint=str(head_file.parent))
        (head_file.parent / integration.STATE_FILE).unlink()
        with pytest.raises(CheckpointError, match=r"has no powerflow\.json"):
            make().train(resume_from_checkpoint=str(head_file.parent))


def test_the_best_model_comes_back_with_its_head(tmp_path):
    options = {
        "eval_rows": ROWS[:2],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    # Fewest tokens seen: the first checkpoint, which is not the last.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_num_tokens", "greater_is_better": False}
    t = trainer(tmp_path, log_z="learned", log_z_learning_rate=0.1, **options, **best)
    t.train()
    first, last = (load_file(tmp_path / f"checkpoint-{i}" / integration.LOG_Z_FILE) for i in (1, 2))
    assert all(torch.equal(t.log_z_head.state_dict()[name], value) for name, value in first.items())
    assert any(not torch.equal(value, last[name]) for name, value in first.items())


@pytest.mark.parametrize("use_lora", [False, True])
def test_vllm_is_sent_the_models_weights_and_nothing_else(tmp_path, use_lora):
    from trl.generation.vllm_generation import VLLMGeneration

    names = {name for name, _ in tiny_model().named_parameters()}
    t = trainer(tmp_path, log_z="learned", peft_config=lora() if use_lora else None)
    engine = VLLMGeneration.__new__(VLLMGeneration)
    engine.model, engine.mode, engine._dist = t.model, "colocate", t._dist
    assert {name for name, _ in engine._iter_named_params()} == names


def test_the_models_own_sampling_options_do_not_count(tmp_path):
    model = tiny_model()
    model.generation_config.min_p = 0.99  # would leave the likeliest token only
    model.generation_config.typical_p = 0.01
    t = trainer(tmp_path, model, num_generations=8)
    rollout = sampled(t, ROWS[:1], 8)
    assert len({tuple(ids) for ids in rollout.completion_ids}) > 1
    assert model.generation_config.min_p == 0.99


def test_format_fn_gets_the_prompt_as_given_and_the_completion_as_text(tmp_path):
    seen = []

    def format_fn(prompt, completion, **columns):
        seen.append((prompt, completion, columns))
        return len(seen) % 2 == 0

    t = trainer(tmp_path, format_fn=format_fn, format_penalty=-0.25)
    t.processing_class.chat_template = tiny_tokenizer(chat_template=True).chat_template
    prompt = [{"role": "user", "content": "hi"}]
    rollout = sampled(t, [{"prompt": prompt, "tag": 3}], 8)
    assert rollout.psi.tolist() == [-0.25, 0.0] * 4
    assert all(p == prompt and columns == {"tag": 3} for p, _, columns in seen)
    texts = t.processing_class.batch_decode(rollout.completion_ids, skip_special_tokens=True)
    assert [text for _, text, _ in seen] == texts


SAMPLING = {"top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1, "generation_kwargs": {"top_k": 5}}
ENGINES = {"use_transformers_continuous_batching": True, "vllm_structured_outputs_regex": "a*", "torch_compile": True}
MODEL = {"disable_dropout": False, "cast_lm_head_to_fp32": True, "use_liger_kernel": True, "router_aux_loss_coef": 0.1}
LOSS = {"beta": 0.04, "loss_type": "grpo", "epsilon": 0.3, "top_entropy_quantile": 0.2, "entropy_coef": 0.01}
RATIO = {"importance_sampling_level": "sequence", "off_policy_mask_threshold": 0.5, "mask_truncated_completions": True}
OURS = {"alpha": None, "log_z": "both", "format_penalty": 0.5, "importance_clip": [1.1, 1.2], "temperature": 0.0}
REFUSED = SAMPLING | ENGINES | MODEL | LOSS | RATIO | OURS | {"base": "ref", "vllm_importance_sampling_clip_max": 2.0}


@pytest.mark.parametrize("name", REFUSED)
def test_settings_that_break_the_target_are_refused_by_name(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        config(tmp_path, **{name: REFUSED[name]})


def test_the_options_are_read_from_a_command_line(tmp_path):
    words = [
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "--bf16",
        "False",
        "--alpha",
        "2",
        "--importance_clip",
        "0.9",
        "1.1",
    ]
    (args,) = transformers.HfArgumentParser(PowerFlowTRLConfig).parse_args_into_dataclasses(words)
    assert (args.alpha, args.importance_clip, args.log_z, args.beta) == (2.0, [0.9, 1.1], "learned", 0.0)


def test_groups_trainers_and_models_that_cannot_work_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="2 generations per prompt"):  # TRL's own
        config(tmp_path, num_generations=1, log_z="group")
    with monkeypatch.context() as two_processes:
        two_processes.setattr(PowerFlowTRLConfig, "world_size", property(lambda self: 2))
        config(tmp_path, per_device_train_batch_size=2, log_z="learned")
        with pytest.raises(ConfigError, match="must be a multiple of num_generations=4 with log_z='group'"):
            config(tmp_path, per_device_train_batch_size=2, log_z="group")

    def make(**options):
        data = {"train_dataset": Dataset.from_list(ROWS), "processing_class": tiny_tokenizer()}
        return PowerFlowTRLTrainer(**{"model": tiny_model(), "args": config(tmp_path), **data, **options})

    for name in ("tools", "rollout_func", "environment_factory"):
        with pytest.raises(ConfigError, match=name):
            make(**{name: [print]})
    with pytest.raises(TypeError, match="args must be a PowerFlowTRLConfig, got GRPOConfig"):
        make(args=trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"))
    with pytest.raises(ConfigError, match="optimizers must not bring a scheduler"):
        make(optimizers=(None, object()))
    with pytest.raises(ConfigError, match="format must be one of boxed"):
        make(format_fn="boxd")
    t = make(args=config(tmp_path, log_z="group", num_generations_eval=1))
    t.model.eval()
    with pytest.raises(ConfigError, match="num_generations_eval is 1"):
        t._generate_and_score_completions([dict(ROWS[0])])


@pytest.mark.parametrize(
    ("version", "message"), [("1.17.0", r"supports trl 1.16.\*, found 1.17.0"), (None, "needs trl")]
)
def test_other_versions_of_trl_are_named(monkeypatch, version, message):
    if version is None:
        monkeypatch.setitem(sys.modules, "trl", None)
    else:
        monkeypatch.setattr(trl, "__version__", version)
    monkeypatch.delitem(sys.modules, "powerflow_fast.integrations.trl")
    with pytest.raises(ImportError, match=message):
        importlib.import_module("powerflow_fast.integrations.trl")


def test_powerflow_fast_imports_without_trl():
    code = (
        "import sys; sys.modules['trl'] = None; import powerflow_fast, powerflow_fast.integrations, powerflow_fast.cli"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class FixedCompletions(PowerFlowTRLTrainer):
    """Ranks sample with seeds of their own: completions that depend on the prompt alone make runs comparable."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completions, count = [], Counter()
        for prompt in map(tuple, prompt_ids):
            count[prompt] += 1
            rng = random.Random(f"{prompt}/{count[prompt]}")
            completions.append([rng.randrange(4, 40) for _ in range(rng.randrange(1, 7))])
        return completions, None


def train_to_compare(folder, processes):
    folder.mkdir(exist_ok=True)
    for log_z in ("learned", "group"):
        options = {"log_z": log_z, "log_z_num_layers": 2, "peft_config": lora() if log_z == "group" else None, **SGD}
        options |= {"per_device_train_batch_size": 4 // processes, "gradient_accumulation_steps": 4}
        rows = [{"prompt": "ab" * (i % 5) + f"{i} "} for i in range(32)]
        t = trainer(folder, cls=FixedCompletions, rows=rows, num_iterations=2, **options)
        t.train()
        state = t.model.state_dict() | (t.log_z_head.state_dict() if t.log_z_head else {})
        torch.save((state, t.state.log_history), folder / f"{log_z}-{t.accelerator.process_index}.pt")


_SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../helpers"]
import test_trl
test_trl.train_to_compare(Path(sys.argv[2]), 2)
"""


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    train_to_compare(tmp_path / "1", 1)
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [*launcher, script, Path(__file__).parent, tmp_path / "2"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for log_z in ("learned", "group"):
        one, log = torch.load(tmp_path / "1" / f"{log_z}-0.pt", weights_only=False)
        for rank in (0, 1):
            two, log_of_two = torch.load(tmp_path / "2" / f"{log_z}-{rank}.pt", weights_only=False)
            assert two.keys() == one.keys()
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6, msg=f"{log_z} {name}")
        for name in ("loss", "delta_abs", "log_z", "base_logp", "importance_weight"):
            pairs = [(a[name], b[name]) for a, b in zip(log, log_of_two, strict=True) if name in a]
            assert len(pairs) == 2 and all(a == pytest.approx(b, rel=1e-4) for a, b in pairs), (name, pairs)
