"""Updater: neither packing nor the cut into micro-batches shows in the loss, the gradient or the order of results."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from accelerate import Accelerator
from tiny import PAD, one_thread, ragged_ids, tiny_model  # noqa: F401

from powerflow_fast import PowerFlowConfig
from powerflow_fast.models import CausalLMScorer, disable_dropout, make_base
from powerflow_fast.objectives import LogZHead
from powerflow_fast.ops import torch_backend
from powerflow_fast.training.policy import Policy
from powerflow_fast.training.samples import Samples
from powerflow_fast.training.update import Updater

K = 3
PROMPTS = [ids for ids in ragged_ids([2, 7, 4, 1], seed=1) for _ in range(K)]
COMPLETIONS = ragged_ids([5, 1, 9, 0, 12, 3, 2, 7, 20, 4, 4, 6], seed=2)  # lengths spread, one of them empty
LENGTHS = [len(p) + len(c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


def updater(arch, *, packing=None, objective="la_tb", **options):
    options = {"alpha": 2.0, "num_generations": K, "per_device_train_batch_size": 12, "temperature": 0.8, **options}
    config = PowerFlowConfig(**options)
    base = make_base(disable_dropout(tiny_model(arch, seed=1)))
    scorer = CausalLMScorer(disable_dropout(tiny_model(arch, spread=0.4)).train())
    head = None
    if config.log_z == "learned":
        torch.manual_seed(0)
        head = LogZHead(scorer.head.weight.shape[1], num_layers=2)
        for p in head.parameters():
            torch.nn.init.normal_(p, std=0.3)
    policy = Policy(scorer, head)
    return Updater(
        policy, base, Accelerator(cpu=True), config, alpha=2.0, pad_id=PAD, packing=packing, objective=objective
    )


def samples_for(made):
    psi = torch.where(torch.arange(12) % 4 == 1, -0.5, 0.0)
    groups = torch.arange(4).repeat_interleave(K)
    samples = Samples(PROMPTS, COMPLETIONS, [len(c) % 2 == 0 for c in COMPLETIONS], groups, psi)
    samples.base_logps = made.score_base(samples)
    lengths = torch.tensor(samples.lengths)
    shift = torch.linspace(-0.5, 0.5, 12) / lengths.clamp(min=1)  # of whole sequences
    samples.old_logps = made.score_policy(samples).logps + shift.repeat_interleave(lengths)
    return samples


@functools.cache
def padded_in_one(arch, log_z, on_policy):
    return everything(updater(arch, log_z=log_z), on_policy)


def everything(made, on_policy):
    samples = samples_for(made)
    sums = made.gradient(samples, on_policy=on_policy, need_entropy=True)
    found = {f"d {name}": p.grad for name, p in made.policy.named_parameters() if p.grad is not None}
    found |= {"base": samples.base_logps, "old": samples.old_logps, "policy": made.score_policy(samples).logps}
    return found | {name: value for name, value in sums._asdict().items() if value is not None}


CUTS = {
    "packed in one": {"packing": "sdpa"},
    "packed, 2 sequences": {"packing": "sdpa", "per_device_train_batch_size": 2},
    "packed, 45 tokens": {"packing": "sdpa", "max_tokens_per_batch": 45},  # a group of K fits
    "packed, 29 tokens": {"packing": "sdpa", "max_tokens_per_batch": 29},  # the longest group does not
    "packed, 10 tokens": {"packing": "eager", "max_tokens_per_batch": 10},  # two sequences do not
    "padded, 75 tokens": {"max_tokens_per_batch": 75},
    "padded, 30 tokens": {"max_tokens_per_batch": 30},
}


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("log_z", ["learned", "group"])
@pytest.mark.parametrize("cut", CUTS)
def test_no_cut_shows(cut, log_z, on_policy):
    want = padded_in_one("llama", log_z, on_policy)
    made = updater("llama", log_z=log_z, **CUTS[cut])
    got = everything(made, on_policy)
    assert got.keys() == want.keys() and float(want["loss"]) > 0.1
    assert any("log_z_head" in name for name in got) is (log_z == "learned")
    for name, value in want.items():
        scale = max(1.0, float(value.abs().max()))
        assert got[name].shape == value.shape
        assert float((got[name] - value).abs().max()) <= 1e-5 * scale, name
    assert made.policy.scorer.model.config._attn_implementation == "sdpa", "decoding keeps the model's own attention"


def test_a_sliding_window_and_a_softcap_are_packed():
    padded = updater("gemma2")
    for model in (padded.policy.scorer.model, padded.base.scorer.model):
        model.set_attn_implementation("eager")  # sdpa has no softcap, and is the default of some releases
    want = everything(padded, True)
    got = everything(updater("gemma2", packing="eager", max_tokens_per_batch=45), True)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("log_z", ["learned", "group"])
@pytest.mark.parametrize("packing", [None, "sdpa"])
def test_every_forward_stays_within_the_budget(packing, log_z, caplog):
    seen = []
    made = updater("llama", packing=packing, log_z=log_z, max_tokens_per_batch=20)
    for model in (made.policy.scorer.model, made.base.scorer.model):
        model.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
    samples = samples_for(made)
    made.gradient(samples, on_policy=True, need_entropy=False)
    too_long = [n for n in LENGTHS if n > 20]
    assert len(too_long) == 1
    assert all(rows * length <= 20 or (rows == 1 and length in too_long) for rows, length in seen)
    if packing:
        fewest = 1 + -(-(sum(LENGTHS) - too_long[0]) // 20)
        passes = 4 if log_z == "group" else 3  # base, old policy, gradient; group: scores first, no group fits
        assert len(seen) <= passes * (fewest + 1)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "max_tokens" in r.msg]
    assert warnings == [
        f"a sequence of {too_long[0]} tokens, prompt and completion, exceeds max_tokens_per_batch=20; such a sequence "
        "gets a micro-batch of its own"
    ]


@pytest.mark.parametrize(("trained", "passes"), [(True, ["fwd", "bwd"]), (False, ["fwd_d_hidden"])])
def test_an_entropy_costs_no_pass_of_its_own(monkeypatch, trained, passes):
    """A step that is logged runs the head's passes of one that isn't, and has the bits of its gradient."""
    calls = []
    for name in ("fwd", "bwd", "fwd_d_hidden"):
        run = getattr(torch_backend, f"linear_logprob_{name}")
        spy = lambda *args, name=name, run=run, **options: (calls.append(name), run(*args, **options))[1]  # noqa: E731
        monkeypatch.setattr(torch_backend, f"linear_logprob_{name}", spy)
    grads = []
    for need_entropy in (False, True):
        made = updater("llama", packing="sdpa")
        made.policy.scorer.head.weight.requires_grad_(trained)
        samples = samples_for(made)
        calls.clear()
        sums = made.gradient(samples, on_policy=True, need_entropy=need_entropy)
        assert calls == passes and (sums.entropy is not None) is need_entropy
        grads.append({name: p.grad for name, p in made.policy.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grad) for name, grad in grads[1].items())


def test_groups_that_fit_are_scored_once():
    """With whole groups in each micro-batch, log Z' comes from the forward that is trained on."""
    counts = {}
    for budget in (29, 45):
        made = updater("llama", packing="sdpa", log_z="group", max_tokens_per_batch=budget)
        samples, seen = samples_for(made), []
        made.policy.scorer.model.register_forward_pre_hook(
            lambda m, args, seen=seen: seen.append(torch.is_grad_enabled())
        )
        made.gradient(samples, on_policy=True, need_entropy=False)
        counts[budget] = seen.count(False)
    assert counts[45] == 0 and counts[29] > 0
