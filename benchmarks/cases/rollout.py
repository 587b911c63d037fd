"""One rollout: requests of uneven length, sampled from a model with random weights of a known shape.

Every thirty-second token of the vocabulary ends a completion and the logits of a random model are nearly equal, so the
lengths are geometric with a mean of about 32 tokens, cut at the longest that is allowed. Engines use up random numbers
in their own order and draw other completions: what is compared is generated tokens per second.
"""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager
from typing import Any

import torch
from cases.update import random_model
from measure import Outputs
from torch import Tensor

MEAN_LENGTH = 32
VOCAB_START = 3


@dataclasses.dataclass(frozen=True)
class RolloutCase:
    """``requests`` prompts of ``prompt`` tokens, at most ``places`` decoded at once, ``completion`` tokens at most."""

    model: str
    dtype: str
    """Weights are fp32; ``bf16`` is autocast."""
    requests: int
    places: int
    prompt: int
    completion: int

    op = "rollout"
    mode = "no_grad"
    l2 = "hot"

    @property
    def n(self) -> int:
        """Prompt tokens; the generated ones are in the rows, as ``tokens``."""
        return self.requests * self.prompt

    def useful_flop(self) -> None:
        return None

    def executed_flop(self, passes: object) -> None:
        return None

    def title(self) -> str:
        dtype = "bf16 autocast" if self.dtype == "bf16" else self.dtype
        return (
            f"rollout of a {self.model}-shaped model, {self.requests} prompts of {self.prompt} tokens, {self.places} "
            f"at once, completions of {MEAN_LENGTH} tokens on average and {self.completion} at most, {dtype}"
        )

    def tiny(self) -> RolloutCase:
        return dataclasses.replace(self, model="tiny", requests=6, places=4, prompt=4, completion=9)


@dataclasses.dataclass(frozen=True)
class RolloutInputs:
    model: Any
    prompts: list[list[int]]
    eos_ids: list[int]
    case: RolloutCase
    device: torch.device

    def first(self, rows: int) -> RolloutInputs:
        """A few prompts and tokens: loads code, starts threads."""
        return dataclasses.replace(
            self, prompts=self.prompts[:rows], case=dataclasses.replace(self.case, completion=min(rows, 4))
        )

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.dtype == "bf16")


def rollout_inputs(case: RolloutCase, device: torch.device, *, seed: int = 0) -> RolloutInputs:
    model = random_model(case.model, device, seed=seed).eval()
    vocabulary = model.config.vocab_size
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB_START, vocabulary, (case.requests, case.prompt), generator=g)
    return RolloutInputs(model, ids.tolist(), list(range(1, 1 + vocabulary // MEAN_LENGTH)), case, device)


def rollout_reference(inputs: RolloutInputs) -> None:
    return None


def rollout_errors(outputs: Outputs, inputs: RolloutInputs, exact: None) -> dict[str, float]:
    """No errors: how many tokens were drawn, and how many of them by the longest completion."""
    lengths: Tensor = outputs[0]
    return {"tokens": int(lengths.sum()), "longest": int(lengths.max())}
