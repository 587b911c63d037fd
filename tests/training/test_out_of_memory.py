"""A micro-batch that does not fit is made smaller, and the step comes out as if it had been small from the start."""

from __future__ import annotations

import pytest
import torch
from runs import run, same, weights

from powerflow_fast.errors import DeviceMemoryError
from powerflow_fast.training import policy, update


def small_memory(monkeypatch, most, *, in_backward=False):
    """Policy scores of more than ``most`` sequences run out of memory; returns the sizes that were tried."""
    original, tried = policy.Policy.forward, []

    def forward(self, batch, **options):
        if in_backward and not torch.is_grad_enabled():
            return original(self, batch, **options)
        tried.append(len(batch))
        out = original(self, batch, **options)
        if len(batch) > most:
            if not in_backward:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            out.logps.register_hook(fail)
        return out

    def fail(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(policy.Policy, "forward", forward)
    return tried


OPTIONS = {
    "max_steps": 2,
    "bf16": False,
    "num_generations": 4,
    "prompts": ["one ", "two and ", "three ", "four and more "],
}


@pytest.mark.parametrize("log_z", ["learned", "group"])
@pytest.mark.parametrize("in_backward", [False, True])
def test_same_weights_as_with_small_batches_from_the_start(tmp_path, monkeypatch, caplog, log_z, in_backward):
    options = {**OPTIONS, "log_z": log_z, "num_iterations": 2}
    with monkeypatch.context() as patch:
        # Scores without gradients use the same sizes as in the run that starts small.
        original = update.Updater.score_base

        def in_fours(self, samples):
            size, self.micro_batch_size = self.micro_batch_size, 4
            scores = original(self, samples)
            self.micro_batch_size = size
            return scores

        patch.setattr(update.Updater, "score_base", in_fours)
        small = run(tmp_path, name="small", per_device_train_batch_size=4, gradient_accumulation_steps=4, **options)
        tried = small_memory(patch, 4, in_backward=in_backward)
        shrunk = run(tmp_path, name="shrunk", per_device_train_batch_size=16, **options)
    if not in_backward:
        assert same(weights(small.model), weights(shrunk.model))
        assert tried[:3] == [16, 8, 4]
    for name, weight in weights(small.model).items():
        torch.testing.assert_close(weight, weights(shrunk.model)[name], rtol=1e-3, atol=1e-5)
    assert caplog.text.count("out of memory with micro-batches of") == 2 and "2 GiB" in caplog.text
    assert "of 16 sequences" in caplog.text and "of 8 sequences" in caplog.text


def test_groups_that_are_torn_by_a_smaller_batch_keep_their_log_z(tmp_path, monkeypatch):
    """Micro-batches of two sequences out of groups of four: log Z' must still come from all four."""
    options = {**OPTIONS, "max_steps": 1}
    whole = run(tmp_path, name="whole", log_z="group", per_device_train_batch_size=8, **options)
    small_memory(monkeypatch, 2)
    torn = run(tmp_path, name="torn", log_z="group", per_device_train_batch_size=8, **options)
    for a, b in zip(whole.history, torn.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["log_z"] == pytest.approx(b["log_z"], rel=1e-4) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-3
        )


def test_nothing_of_a_failed_attempt_is_counted(tmp_path, monkeypatch):
    """The second micro-batch fails after the first has added its gradient."""
    options = {**OPTIONS, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = run(tmp_path, name="whole", **options)
    original, calls = policy.Policy.forward, []

    def forward(self, batch, **keywords):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch, **keywords)

    monkeypatch.setattr(policy.Policy, "forward", forward)
    again = run(tmp_path, name="again", **options)
    assert sum(calls) == 2 + 4
    assert whole.history[0]["grad_norm"] == pytest.approx(again.history[0]["grad_norm"], rel=1e-3)


def test_a_single_sequence_that_does_not_fit_is_named(tmp_path, monkeypatch, caplog):
    small_memory(monkeypatch, 0)
    with pytest.raises(DeviceMemoryError, match=r"single sequence of \d+ prompt and \d+ completion tokens .*2 GiB"):
        run(tmp_path, **OPTIONS)
    assert caplog.text.count("out of memory with") == 2, "from four over two to one"
