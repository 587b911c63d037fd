"""Who samples: the engines of the trainer, on one model and one list of prompts; a step gives ``(lengths, tokens)``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from measure import Outputs
from providers import Provider
from rollout_case import RolloutCase, RolloutInputs

from powerflow_fast.rollout import HFGenerateEngine, RolloutEngine
from powerflow_fast.rollout_continuous import ContinuousBatchingEngine

_TOKENIZER = SimpleNamespace(pad_token_id=0, eos_token_id=None)


def _options(inputs: RolloutInputs) -> dict:
    case = inputs.case
    return {
        "temperature": 1.0,
        "max_completion_length": case.completion,
        "batch_size": case.places,
        "eos_ids": inputs.eos_ids,
        "autocast": inputs.autocast,
    }


def generate(inputs: RolloutInputs) -> RolloutEngine:
    return HFGenerateEngine(inputs.model, _TOKENIZER, **_options(inputs))


def continuous(inputs: RolloutInputs) -> RolloutEngine:
    case = inputs.case
    room = {"cache_tokens": case.places * (case.prompt + case.completion), "max_batch_tokens": 512}
    return ContinuousBatchingEngine(inputs.model, _TOKENIZER, **_options(inputs), **room)


ROLLOUT_PROVIDERS = [
    Provider("powerflow_fast continuous", "powerflow_fast", lambda device: continuous, backend="torch"),
    Provider("generate", "transformers", lambda device: generate),
]


def rollout_step(provider: Provider, case: RolloutCase, inputs: RolloutInputs) -> Callable[[], Outputs]:
    engine = provider.load(inputs.device)(inputs)
    engine.sync(0)

    def step() -> Outputs:
        completions = engine.generate(inputs.prompts, seed=0).completion_ids
        return torch.tensor([len(ids) for ids in completions]), torch.tensor([i for ids in completions for i in ids])

    return step
