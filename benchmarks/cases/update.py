"""One PowerFlow update, end to end: score the base, policy forward, LA-TB loss with group log Z', backward, AdamW step.

On fixed tokens, so that sampling isn't part of it, and with random weights of a known model's shape. The learning rate
is zero: the optimiser does all of its work and leaves the weights where they are, so that every step can be compared
with the one before, bit by bit, and all providers share one policy, one base and one optimiser.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from cases.head import relative_error
from torch import Tensor, nn

from powerflow_fast.models import pad_batch

GROUP = 8  # completions per prompt, and sequences in a micro-batch
ALPHA = 4.0

_COMMON = {"tie_word_embeddings": True, "attention_dropout": 0.0, "use_cache": False}
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "vocab_size": 49152,
    },
    "Qwen2.5-1.5B": {
        "model_type": "qwen2",
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
    },
    "tiny": {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 307,
    },
}


@dataclasses.dataclass(frozen=True)
class UpdateCase:
    """``sequences`` completions of at most ``completion`` tokens, eight for each prompt of ``prompt`` tokens."""

    model: str
    dtype: str
    """Weights are fp32; ``bf16`` is autocast."""
    sequences: int
    prompt: int
    completion: int

    op = "update"
    mode = "full"
    l2 = "hot"

    def lengths(self) -> list[int]:
        """Between a quarter of the longest completion and all of it, their logarithm uniform; one is the longest."""
        share = torch.rand(self.sequences, generator=torch.Generator().manual_seed(0))
        share[-1] = 1.0
        return [max(1, round(self.completion * 4 ** (s - 1))) for s in share.tolist()]

    @property
    def n(self) -> int:
        """Prompt and completion tokens, without padding."""
        return self.sequences * self.prompt + sum(self.lengths())

    def useful_flop(self) -> None:
        return None

    def executed_flop(self, passes: object) -> None:
        return None

    def title(self) -> str:
        dtype = "bf16 autocast" if self.dtype == "bf16" else self.dtype
        tokens = f"{self.prompt} prompt and up to {self.completion} completion tokens, {self.n} in all"
        return f"one update of a {self.model}-shaped model, {self.sequences} sequences of {tokens}, {dtype}"

    def tiny(self) -> UpdateCase:
        return dataclasses.replace(self, model="tiny", sequences=2 * GROUP, prompt=4, completion=9)


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    policy: Any
    base: Any
    optimizer: torch.optim.Optimizer
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    device: torch.device
    bf16: bool

    @property
    def group_ids(self) -> list[int]:
        return [i // GROUP for i in range(len(self.prompt_ids))]

    def first(self, rows: int) -> UpdateInputs:
        """One group with short completions: loads code, starts threads, and gives the optimiser its state."""
        short = [ids[:rows] for ids in self.completion_ids[:GROUP]]
        return dataclasses.replace(self, prompt_ids=self.prompt_ids[:GROUP], completion_ids=short)

    def sampled_gradients(self) -> tuple[Tensor, ...]:
        return tuple(p.grad[rows].clone() for p, rows in sampled(self.policy, self.completion_ids))


def sampled(model: Any, completion_ids: list[list[int]]) -> list[tuple[nn.Parameter, Any]]:
    """(parameter, rows) from the head, which is the embedding too, the first layer, and the last norm."""
    tokens = sorted({ids[0] for ids in completion_ids})
    first = model.model.layers[0].self_attn.k_proj.weight
    return [(model.lm_head.weight, tokens), (first, slice(0, 32)), (model.model.norm.weight, slice(None))]


def sharing(model: Any) -> Any:
    """Another module with the same parameters and buffers: what a trainer patches there stays there."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(t): t for t in tensors})


def random_model(name: str, device: torch.device, *, seed: int) -> Any:
    """Random fp32 weights in the shape of one of ``MODELS``."""
    import transformers  # here, so that the other suites run without it

    shape = dict(MODELS[name])
    config = transformers.AutoConfig.for_model(shape.pop("model_type"), **_COMMON, **shape)
    torch.manual_seed(seed)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def update_inputs(case: UpdateCase, device: torch.device, *, seed: int = 0) -> UpdateInputs:
    policy = random_model(case.model, device, seed=seed)
    config = policy.config
    base = copy.deepcopy(policy).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in base.parameters():  # as after some training: a base that equals the policy hides mistakes
            parameter.add_(torch.randn_like(parameter), alpha=0.002)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, fused=device.type == "cuda")
    g = torch.Generator().manual_seed(seed)

    def tokens(n: int) -> list[int]:
        return torch.randint(3, config.vocab_size, (n,), generator=g).tolist()

    prompts = [tokens(case.prompt) for _ in range(case.sequences // GROUP)]
    prompt_ids = [prompts[i // GROUP] for i in range(case.sequences)]
    completion_ids = [tokens(n) for n in case.lengths()]
    return UpdateInputs(policy.train(), base, optimizer, prompt_ids, completion_ids, device, case.dtype == "bf16")


def update_reference(inputs: UpdateInputs) -> tuple[Tensor, ...]:
    """Loss and sampled gradients in fp64 through the model's own logits, one sequence at a time."""

    def mean_logp(model: Any, i: int) -> Tensor:
        batch = pad_batch([inputs.prompt_ids[i]], [inputs.completion_ids[i]], 0).to(inputs.device)
        logp = model(batch.input_ids, use_cache=False).logits[0].log_softmax(-1)
        return logp[batch.positions].gather(1, batch.labels[:, None]).mean()

    def mean_logps(model: Any) -> Tensor:
        with torch.no_grad():
            return torch.stack([mean_logp(model, i) for i in range(count)])

    count = len(inputs.prompt_ids)
    r = mean_logps(copy.deepcopy(inputs.base).double())
    policy = copy.deepcopy(inputs.policy).double()
    s = mean_logps(policy)
    groups = torch.tensor(inputs.group_ids, device=s.device)
    target = ALPHA * r - s
    log_z = torch.stack([target[groups == g].mean() for g in groups])
    delta = log_z + s - ALPHA * r
    for i in range(count):  # d loss / d s_i = 2 δ_i / count
        (mean_logp(policy, i) * (2 * delta[i] / count)).backward()
    gradients = [p.grad[rows] for p, rows in sampled(policy, inputs.completion_ids)]
    return (delta.square().mean(), *gradients)


def update_errors(outputs: tuple[Tensor, ...], inputs: UpdateInputs, exact: tuple[Tensor, ...]) -> dict[str, float]:
    """Relative errors of the loss and, at most, of a sampled gradient; none of who trains on another loss."""
    if len(outputs) == 1:
        return {}
    gradients = [relative_error(a, b) for a, b in zip(outputs[1:], exact[1:], strict=True)]
    return {"loss_rel_err": relative_error(outputs[0], exact[0]), "grad_rel_err": max(gradients)}
