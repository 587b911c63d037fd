"""The end-to-end benchmark: every provider makes the update that its row claims, on the same tokens."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
if not (BENCHMARKS / "run.py").is_file():
    pytest.skip("benchmarks/ isn't part of this copy", allow_module_level=True)
sys.path.append(str(BENCHMARKS))

from cases import update as update_case  # noqa: E402
from cases.rollout import rollout_errors, rollout_inputs  # noqa: E402
from cases.update import UpdateCase, update_errors, update_inputs, update_reference  # noqa: E402
from peers import head as head_peers  # noqa: E402
from peers import update as update_peers  # noqa: E402
from peers.rollout import ROLLOUT_PROVIDERS, rollout_step  # noqa: E402
from suites import SUITES  # noqa: E402

CPU = torch.device("cpu")
OURS_AND_NAIVE = [p for p in update_peers.UPDATE_PROVIDERS if p.kind in ("ours", "baseline")]


def tiny(dtype: str) -> UpdateCase:
    return UpdateCase("SmolLM2-135M", dtype, 16, 32, 128).tiny()


@pytest.mark.parametrize("provider", OURS_AND_NAIVE, ids=lambda p: p.name)
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 1e-4), ("bf16", 5e-2)])
def test_loss_and_gradients_are_right(provider, dtype, limit):
    inputs = update_inputs(tiny(dtype), CPU)
    before = [p.clone() for p in inputs.policy.parameters()]
    step = update_peers.update_step(provider, tiny(dtype), inputs)
    first, second = step(), step()
    errors = update_errors(first, inputs, update_reference(inputs))
    assert set(errors) == {"loss_rel_err", "grad_rel_err"} and max(errors.values()) < limit, errors
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.policy.parameters(), strict=True))
    state = inputs.optimizer.state[inputs.policy.lm_head.weight]
    assert state["step"] == 2 and state["exp_avg"].any()  # the optimiser did work


def test_the_reference_is_the_batch_loss():
    """One sequence at a time against one autograd graph over all of them."""
    inputs = update_inputs(tiny("fp32"), CPU)
    policy, base = inputs.policy.double(), inputs.base.double()
    exact = update_reference(inputs)

    def mean(model, prompt, completion):
        logp = model(torch.tensor([prompt + completion]), use_cache=False).logits[0].log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        return logp[rows, torch.tensor(completion)].mean()

    pairs = list(zip(inputs.prompt_ids, inputs.completion_ids, strict=True))
    s = torch.stack([mean(policy, *pair) for pair in pairs]).view(-1, update_case.GROUP)
    r = torch.stack([mean(base, *pair) for pair in pairs]).view(-1, update_case.GROUP)
    log_z = (update_case.ALPHA * r - s).detach().mean(1, keepdim=True)
    loss = (log_z + s - update_case.ALPHA * r).square().mean()
    loss.backward()
    assert max(update_errors((loss.detach(), *inputs.sampled_gradients()), inputs, exact).values()) < 1e-10


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_trl_scores_the_same_tokens(dtype, tmp_path):
    try:
        head_peers.load_trl(CPU)  # as in a run that measured its kernel before: only parts of the package are there
    except ImportError:
        pytest.skip("TRL isn't installed here")
    inputs = update_inputs(tiny(dtype), CPU)
    trainer = update_peers.trl_trainer(inputs, str(tmp_path))
    batch = update_peers.trl_batch(inputs)
    logps = update_peers.trl_reference_logps(trainer, trainer.ref_model, batch)
    sums = (logps * batch["completion_mask"]).sum(1)
    expected = []
    for prompt, completion in zip(inputs.prompt_ids, inputs.completion_ids, strict=True):
        with torch.no_grad():
            logits = inputs.base(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
        expected.append(logits[rows, torch.tensor(completion)].sum())
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-5 if dtype == "fp32" else 2e-2, atol=1e-4)

    step = update_peers.trl_grpo(inputs)
    (loss,), (again,) = step(), step()
    assert torch.isfinite(loss) and torch.equal(loss, again)
    state = inputs.optimizer.state[inputs.policy.lm_head.weight]
    assert state["step"] == 2 and state["exp_avg"].any()  # its gradient reaches the policy that all share


@pytest.mark.parametrize("provider", ROLLOUT_PROVIDERS, ids=lambda provider: provider.name)
def test_engines_sample_every_request(provider):
    case = SUITES["cpu-rollout"][0].tiny()
    if provider.name == "powerflow_fast vllm":
        pytest.importorskip("vllm")
        # it has no kernel for heads of 16
        case = dataclasses.replace(case, model="SmolLM2-135M")
    inputs = rollout_inputs(case, CPU)
    step = rollout_step(provider, case, inputs)
    lengths, tokens = step()
    assert len(lengths) == case.requests and lengths.min() >= 1 and lengths.max() <= case.completion
    ends = tokens[lengths.cumsum(0) - 1]
    assert all(length == case.completion or end in inputs.eos_ids for length, end in zip(lengths, ends, strict=True))
    assert rollout_errors((lengths, tokens), inputs, None) == {"tokens": len(tokens), "longest": lengths.max()}
    assert all(torch.equal(a, b) for a, b in zip(step(), (lengths, tokens), strict=True))


def test_sizes():
    """The models have the sizes of their namesakes, the completions are uneven and as many tokens as the case says."""
    for name, parameters in (("SmolLM2-135M", 134_515_008), ("Qwen2.5-1.5B", 1_543_714_304)):
        shape = dict(update_case.MODELS[name])
        config = transformers.AutoConfig.for_model(shape.pop("model_type"), **update_case._COMMON, **shape)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert sum(p.numel() for p in model.parameters()) == parameters, name
    case = UpdateCase("SmolLM2-135M", "fp32", 16, 32, 128)
    lengths = case.lengths()
    assert max(lengths) == 128 and min(lengths) >= 32 and len(set(lengths)) > 8
    inputs = update_inputs(tiny("fp32"), CPU)
    assert tiny("fp32").n == sum(map(len, inputs.prompt_ids)) + sum(map(len, inputs.completion_ids))
    assert inputs.group_ids == [0] * 8 + [1] * 8 and inputs.prompt_ids[0] != inputs.prompt_ids[8]
