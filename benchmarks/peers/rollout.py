"""Who samples: the engines of the trainer, on one model and one list of prompts; a step gives ``(lengths, tokens)``."""

from __future__ import annotations

import importlib
import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch
from cases.rollout import RolloutCase, RolloutInputs, rollout_inputs
from measure import Outputs
from providers import Provider

from powerflow_fast.rollout import ContinuousBatchingEngine, HFGenerateEngine, RolloutEngine

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


def _serve_vllm(connection: Connection, case: RolloutCase, device: str) -> None:
    """The other end of `OtherProcess`: the trainer's vLLM engine on the case's model."""
    from accelerate import Accelerator
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from powerflow_fast.config import PowerFlowConfig
    from powerflow_fast.rollout import VLLMEngine

    inputs = rollout_inputs(case, torch.device(device))
    with tempfile.TemporaryDirectory() as folder:  # vLLM starts from one
        inputs.model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
        config = PowerFlowConfig(
            use_vllm=True,
            max_prompt_length=case.prompt,
            max_completion_length=case.completion,
            rollout_batch_size=case.places,
            vllm_gpu_memory_utilization=0.3,
        )
        accelerator = Accelerator(cpu=device == "cpu", mixed_precision=case.dtype if case.dtype == "bf16" else "no")
        limit = {"temperature": 1.0, "max_completion_length": case.completion}
        engine = VLLMEngine(model, _TOKENIZER, config=config, accelerator=accelerator, **limit)
    engine.eos_ids = inputs.eos_ids
    connection.send("ready")
    while True:
        try:
            prompts, options, version = connection.recv()
        except EOFError:  # the step is gone
            return
        engine.sync(version)
        connection.send(engine.generate(prompts, **options).completion_ids)


class OtherProcess:
    """vLLM binds threads to cores and takes memory for good: its engine must not share a process with the others.

    A step sends it the weights as well, as a trainer does before each rollout; the other engines read them in place.
    """

    def __init__(self, inputs: RolloutInputs):
        context = multiprocessing.get_context("spawn")
        self._connection, other = context.Pipe()
        job = (other, inputs.case, inputs.device.type)
        self._process = context.Process(target=_serve_vllm, args=job, daemon=True)
        self._process.start()
        other.close()
        self._version = 0
        self._receive()

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise RuntimeError("the process of the vLLM engine ended") from None

    def sync(self, version: int) -> None:
        """Each step does."""

    def generate(self, prompts: list[list[int]], **options: Any) -> SimpleNamespace:
        self._version += 1
        self._connection.send((prompts, options, self._version))
        return SimpleNamespace(completion_ids=self._receive())


def load_vllm(device: torch.device) -> type[OtherProcess]:
    importlib.import_module("vllm")
    return OtherProcess


ROLLOUT_PROVIDERS = [
    Provider("powerflow_fast continuous", "powerflow_fast", lambda device: continuous, backend="torch"),
    Provider("generate", "transformers", lambda device: generate),
    Provider("powerflow_fast vllm", "powerflow_fast", load_vllm, None, "torch", warm_whole=True, own_memory=False),
]


def rollout_step(provider: Provider, case: RolloutCase, inputs: RolloutInputs) -> Callable[[], Outputs]:
    engine = provider.load(inputs.device)(inputs)
    engine.sync(0)

    def step() -> Outputs:
        completions = engine.generate(inputs.prompts, seed=0).completion_ids
        return torch.tensor([len(ids) for ids in completions]), torch.tensor([i for ids in completions for i in ids])

    return step
