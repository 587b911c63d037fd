"""Two gloo processes on a CPU train like one, replicated (DDP) and sharded (FSDP2): losses, weights, resumed runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from tiny import one_thread, tiny_model, tiny_tokenizer  # noqa: F401

import powerflow_fast
from powerflow_fast import PowerFlowConfig
from powerflow_fast.errors import ConfigError
from powerflow_fast.models import CausalLMScorer
from powerflow_fast.models.sharding import shard
from powerflow_fast.training.policy import Policy

_SCRIPT = """
import random, sys
sys.path.insert(0, sys.argv[1])
import accelerate, torch
torch.set_num_threads(1)
import powerflow_fast
from powerflow_fast import rollout
from powerflow_fast.rollout import choice
from powerflow_fast.models import sharding
from tiny import tiny_model, tiny_tokenizer

# Ranks draw with seeds of their own, so a fair comparison needs completions that depend on nothing but the prompt.
class Fixed(rollout.HFGenerateEngine):
    def generate(self, prompts, *, seed, return_logps=False, **options):
        if return_logps:  # the self-check wants the real one
            return super().generate(prompts, seed=seed, return_logps=True, **options)
        completions, count = [], {}
        for prompt in map(tuple, prompts):
            count[prompt] = count.get(prompt, 0) + 1
            rng = random.Random(f"{prompt}/{count[prompt]}")
            completions.append([rng.randrange(4, 40) for _ in range(rng.randrange(1, 7))])
        ids = [list(p) for p in prompts]
        return rollout.Rollout(ids, completions, [False] * len(ids), None, self.weight_version)

choice.HFGenerateEngine = Fixed

def run(log_z, name, max_steps, resume=None):
    result = powerflow_fast.train(
        tiny_model(), ["one ", "two and ", "three ", "four "], alpha=2.0, tokenizer=tiny_tokenizer(),
        output_dir=f"{folder}/{log_z}-{name}", log_z=log_z, num_generations=4, gradient_accumulation_steps=2,
        per_device_train_batch_size=8 // processes, max_completion_length=6, max_prompt_length=16,
        max_steps=max_steps, num_iterations=2, resume_from_checkpoint=resume, rollout_engine="hf", **options,
        lr_scheduler_type="constant", bf16=False,  # "auto" rounds gradients to bf16 on CPUs that multiply it fast
        max_tokens_per_batch=24 if processes > 1 and log_z == "group" else None,  # ranks have other lengths
        adam_epsilon=1e-2,  # else Adam turns rounding of tiny gradients into whole steps
    )
    rank = accelerate.PartialState().process_index
    weights = sharding.whole(dict(result.model.named_parameters()))
    torch.save({n: p.detach() for n, p in weights.items()}, f"{folder}/{log_z}-{name}-rank{rank}")

folder, processes, kind, plan = sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5].split(",")
options = {"num_sample_prompts": 0, "self_check": False, "learning_rate": 1e-3}
if "fsdp" in kind:  # with what runs past the policy's forward: a self-check, samples, an evaluation on one rank
    options |= {"fsdp": True, "self_check": True, "num_sample_prompts": 2, "eval_steps": 2}
    options["eval_fn"] = lambda model, tokenizer, step: {"norm": model.lm_head.weight.norm()}
if "lora" in kind:  # three rows don't divide by two processes; large steps, for an adapter starts from nothing
    options |= {"use_peft": True, "lora_r": 3, "learning_rate": 5e-3}
for log_z in ("learned", "group"):
    for name in plan:
        if name == "cut":
            run(log_z, name, 1)  # ends within a rollout
        # "even" ends with its rollout; "taken" is one that other processes began so.
        run(log_z, name, 2 if name == "even" else 3, resume=name in ("cut", "taken"))
"""


def launch(folder, processes, kind="ddp", plan="whole,cut,even"):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(_SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    arguments = [folder / "script.py", Path(__file__).parents[1] / "helpers", folder, processes, kind, plan]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def history(folder):
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def weights(folder, name, rank=0):
    return torch.load(folder / f"{name}-rank{rank}", weights_only=True)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed") / "one"
    launch(folder, 1, plan="whole")
    return folder


def check_like_one(one, two, rel=1e-5):
    for log_z in ("learned", "group"):
        whole = f"{log_z}-whole"
        steps = [row for row in history(two / whole) if "loss" in row]
        for a, b in zip(history(one / whole), steps, strict=True):
            for name in ("loss", "delta_abs", "log_z", "policy_logp", "base_logp", "length", "entropy", "grad_norm"):
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=rel), (log_z, a["step"], name)
        expected = weights(two, whole)
        for name, weight in weights(one, whole).items():
            torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-5)
        for other in (weights(two, whole, rank=1), weights(two, f"{log_z}-cut"), weights(two, f"{log_z}-cut", rank=1)):
            assert all(torch.equal(other[name], expected[name]) for name in expected), "ranks and resumes agree"


def test_two_processes_train_like_one(one, tmp_path):
    launch(tmp_path / "two", 2, plan="whole,cut")
    check_like_one(one, tmp_path / "two")
    for log_z in ("learned", "group"):
        assert len(history(tmp_path / "two" / f"{log_z}-cut")) == 3


def test_two_shards_train_like_one_process(one, tmp_path):
    two = tmp_path / "two"
    launch(two, 2, "fsdp")
    check_like_one(one, two)
    model = transformers.AutoModelForCausalLM.from_pretrained(two / "learned-whole" / "model")
    expected = weights(two, "learned-whole")
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters()), "saved whole"
    norms = [row["eval/norm"] for row in history(two / "learned-whole") if "eval/norm" in row]
    assert len(norms) == 3 and norms[-1] == pytest.approx(float(model.lm_head.weight.detach().norm()))

    # A sharded checkpoint holds whole tensors: one process takes it up, where a rollout ended.
    result = powerflow_fast.train(
        tiny_model(),
        ["one ", "two and ", "three ", "four "],
        tokenizer=tiny_tokenizer(),
        config=PowerFlowConfig.from_dict(
            json.loads((two / "group-even" / "run.json").read_text())["config"]
            | {"fsdp": False, "per_device_train_batch_size": 8, "max_steps": 4, "resume_from_checkpoint": True}
        ),
    )
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4]


def test_sharding_needs_processes_and_weights_that_can_be_cut(tmp_path):
    sizes = {"num_generations": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 1}
    options = {"alpha": 2.0, "fsdp": True, "output_dir": str(tmp_path), "tokenizer": tiny_tokenizer(), **sizes}
    with pytest.raises(ConfigError, match="fsdp=True shards over several processes, and this is one"):
        powerflow_fast.train(tiny_model(), ["one "], **options)
    policy = Policy(CausalLMScorer(tiny_model().bfloat16()), None)
    norm = policy.scorer.model.model.norm.float()  # as models do that keep some modules in fp32
    with pytest.raises(
        ConfigError, match=r"fsdp=True: expected trained weights of one dtype, got bfloat16 and float32"
    ):
        shard(policy, policy.scorer.model, torch.device("cpu"))
    norm.bfloat16()
    layer = policy.scorer.model.model.layers[1].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)  # as bitsandbytes has
    expected = r"fsdp=True: expected floating-point weights, got torch.int8 in scorer.*layers\.1\.mlp\.up_proj\.weight"
    with pytest.raises(ConfigError, match=expected):
        shard(policy, policy.scorer.model, torch.device("cpu"))
