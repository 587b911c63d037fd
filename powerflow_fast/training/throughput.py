"""Where the time of a run goes, and how much of the device's peak the update uses."""

from __future__ import annotations

import time

from torch import nn

from ..models.adapters import unwrap_peft
from ..models.logprob_model import CausalLMScorer

# Dense bf16 tensor-core peaks of the makers' data sheets, TFLOP/s, by a part of the device's name; the first hit wins.
PEAK_BF16_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name, or None where no figure is known."""
    for part, tera in PEAK_BF16_TFLOPS.items():
        if part.lower() in device_name.lower() and f"G{part}".lower() not in device_name.lower():
            return tera * 1e12
    return None


def training_flops_per_token(scorer: CausalLMScorer) -> tuple[float, float] | None:
    """FLOP of one forward and backward pass: per token of the body, and per completion token of the head.

    A weight costs 2 FLOP forward, 2 for the gradient of its input, and 2 more where it is trained. Embedding look-ups,
    attention scores and whatever is computed twice are not counted: a lower bound. None for mixtures of experts, of
    whose weights each token meets a part that no config names uniformly.
    """
    model, head = unwrap_peft(scorer.model), scorer.head.weight
    if any(getattr(model.config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    embedding = model.get_input_embeddings().weight
    body = sum(_flops(p) for p in model.parameters() if p is not head and p is not embedding and p.ndim == 2)
    return float(body), float(_flops(head))


def _flops(weight: nn.Parameter) -> int:
    return weight.numel() * (6 if weight.requires_grad else 4)


class Throughput:
    """Adds up timings between recorded steps.

    Args:
        scorer: the policy, for the FLOP of its update.
        device_name: as CUDA gives it; another device's has no known peak, and then there is no ``mfu``.
        world: processes that train on equal shares.
    """

    def __init__(self, scorer: CausalLMScorer, device_name: str, world: int):
        self._peak, self._cost, self._world = peak_flops(device_name), training_flops_per_token(scorer), world
        self.restart()

    def restart(self) -> None:
        self._since, self._tokens, self._flop = time.perf_counter(), 0, 0.0
        self._seconds = {"rollout": 0.0, "score": 0.0, "update": 0.0}

    def add(self, timings: dict[str, float], prompt_tokens: int, completion_tokens: int) -> None:
        """One step of this process: seconds per phase, and the tokens that it trained on."""
        for name in self._seconds:
            self._seconds[name] += timings.get(name, 0.0)
        self._tokens += prompt_tokens + completion_tokens
        if self._cost is not None:
            body, head = self._cost
            self._flop += body * (prompt_tokens + completion_tokens) + head * completion_tokens

    def metrics(self) -> dict[str, float]:
        """Means since the last call: tokens/s of all processes, shares of the wall clock, MFU of the update.

        What the shares lack to 1 went into evaluation, checkpoints and callbacks.
        """
        wall = time.perf_counter() - self._since
        result = {"tokens_per_second": self._tokens * self._world / wall}
        result |= {f"share/{name}": seconds / wall for name, seconds in self._seconds.items()}
        if self._peak is not None and self._cost is not None:
            result["mfu"] = self._flop / self._seconds["update"] / self._peak
        self.restart()
        return result
