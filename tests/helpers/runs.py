"""Short runs of ``train`` on a tiny model, and what they leave."""

from __future__ import annotations

import torch
from tiny import tiny_model, tiny_tokenizer

import powerflow_fast

PROMPTS = ["one ", "two and ", "three "]
FAST = {
    "alpha": 2.0,
    "num_generations": 4,
    "per_device_train_batch_size": 4,
    "max_completion_length": 6,
    "max_prompt_length": 16,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "num_sample_prompts": 2,
    "rollout_engine": "hf",  # "auto" probes, and its choice has a fixed cost that matters on models this small
}


def run(tmp_path, model=None, prompts=PROMPTS, name="run", **options):
    options = {**FAST, "output_dir": str(tmp_path / name), **options}
    keywords = {k: options.pop(k) for k in ("format_fn", "eval_fn", "callbacks", "tokenizer", "config") if k in options}
    keywords.setdefault("tokenizer", tiny_tokenizer())
    return powerflow_fast.train(model or tiny_model(), prompts, **keywords, **options)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception):
    pass


def kill_after(step):
    def callback(report):
        if report.step == step:
            raise Killed

    return callback
