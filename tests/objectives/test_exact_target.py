"""An LM small enough to enumerate, trained through the public API, ends at the distribution the method promises.

One fixed length: exactly p_base^α, normalised. Several lengths: p_base^α · exp(−λ|y|), where λ is what normalises it
(METHOD: Z(q, y) = Z'(q)^|y| leaves one parameter, a tilt by length).
"""

from __future__ import annotations

import pytest
import torch
from distances import total_variation

import powerflow_fast
from powerflow_fast.config import PowerFlowConfig

pytest.importorskip("enumerable", reason="benchmarks/ isn't part of this copy")
from enumerable import enumerable_lm, log_probs, tilted


# Every pair of two settings, not every triple: each case trains for ten seconds.
@pytest.mark.parametrize("ends", [False, True], ids=["fixed-length", "variable-length"])
@pytest.mark.parametrize(("alpha", "log_z"), [(0.5, "learned"), (2.0, "group"), (4.0, "learned")])
def test_training_reaches_the_power_of_the_base(alpha, log_z, ends, tmp_path):
    if ends:
        log_z = "learned" if log_z == "group" else "group"
    model, tokenizer, completions = enumerable_lm(ends=ends)
    base = log_probs(model, completions)
    assert abs(float(base.exp().sum()) - 1) < 1e-5, "the completions are all there is"
    lengths = torch.tensor([len(c) for c in completions]).double()
    target = tilted(alpha * base, lengths)
    if not ends:
        torch.testing.assert_close(target, (alpha * base).softmax(0))
    config = PowerFlowConfig(
        output_dir=str(tmp_path / "run"),
        num_generations=192,
        per_device_train_batch_size=192,
        max_completion_length=4 if ends else 3,
        rollout_engine="hf",
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        log_z=log_z,
        log_z_learning_rate=1e-2,
        adam_beta2=0.99,
        rollout_batch_size=192,
        max_steps=250,
        logging_steps=250,
        num_sample_prompts=0,
    )
    result = powerflow_fast.train(model, ["a"], alpha=alpha, tokenizer=tokenizer, config=config)
    reached = log_probs(result.model, completions).exp()
    assert total_variation(base.exp(), target) > 0.1, "there was something to learn"
    assert total_variation(reached, target) <= 0.03
    if ends and alpha != 1:
        untilted = (alpha * base).softmax(0)
        assert total_variation(reached, target) < total_variation(reached, untilted)
