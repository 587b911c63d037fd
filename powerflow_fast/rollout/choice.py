"""Which engine samples: the one that was asked for, or for ``auto`` the fastest that is measured to be right."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..config.options import PowerFlowConfig
from ..errors import ConfigError
from ..models.adapters import unwrap_peft
from ..models.modes import evaluating
from .continuous import ContinuousBatchingEngine
from .engine import Rollout, RolloutEngine
from .generate import HFGenerateEngine
from .vllm import VLLMEngine

logger = logging.getLogger(__name__)


_PROBE_PROMPTS, _PROBE_TOKENS = 4, 8


def check_rollout_config(config: PowerFlowConfig) -> None:
    """ConfigError, with what to write instead, for options of sampling that contradict each other."""

    def refuse(message: str) -> None:
        raise ConfigError(f"PowerFlowConfig: {message}")

    if config.use_vllm and config.rollout_engine in ("hf", "continuous"):
        refuse(f"use_vllm=True contradicts rollout_engine={config.rollout_engine!r}; leave one of them out")
    vllm = config.use_vllm or config.rollout_engine == "vllm"
    longest = config.max_prompt_length + config.max_completion_length
    if not vllm and config.rollout_engine != "hf" and config.cache_tokens < longest:
        refuse(
            f"rollout_cache_tokens must hold the longest sequence, max_prompt_length + max_completion_length = "
            f"{longest}, got {config.cache_tokens}"
        )
    if not vllm:
        return
    if config.vllm_mode == "server" and not config.vllm_server_base_url:
        refuse("vllm_mode='server' needs vllm_server_base_url, such as http://host:8000")
    if config.vllm_mode == "colocate" and config.vllm_server_base_url:
        refuse("vllm_server_base_url is for vllm_mode='server', but vllm_mode is 'colocate'")
    if config.vllm_mode == "colocate" and config.vllm_tensor_parallel_size > 1:
        refuse(
            f"vllm_tensor_parallel_size must be 1 with vllm_mode='colocate', got {config.vllm_tensor_parallel_size}: "
            "every process samples with an engine of its own; for a model that needs more GPUs use vllm_mode='server' "
            "and vllm serve --tensor-parallel-size"
        )
    if config.vllm_max_model_length is not None and config.vllm_max_model_length < longest:
        refuse(
            f"vllm_max_model_length must hold max_prompt_length + max_completion_length = {longest}, got "
            f"{config.vllm_max_model_length}"
        )


def make_engine(
    model: nn.Module,
    tokenizer: Any,
    config: PowerFlowConfig,
    accelerator: Any,
    *,
    probe_prompts: Sequence[Sequence[int]],
) -> RolloutEngine:
    """The engine for ``config``, whose choice by ``auto`` is logged in one line.

    ``probe_prompts`` are token ids of a few real prompts; ``auto`` draws a few tokens after them, see
    :func:`probe_continuous`. Raises ConfigError and RolloutError where the engine that was asked for cannot work.
    """
    temperature = config.rollout_temperature or config.temperature
    options = {"temperature": temperature, "max_completion_length": config.max_completion_length}
    local = {**options, "batch_size": config.rollout_batch_size, "autocast": accelerator.autocast}
    bounds = {"cache_tokens": config.cache_tokens, "max_batch_tokens": config.rollout_max_batch_tokens}
    kind, reason = config.rollout_engine, None
    if kind == "auto":
        sequences = config.per_device_train_batch_size * config.micro_batches_per_generation
        places = config.rollout_batch_size
        pays = continuous_pays(accelerator.device, sequences, places)
        if config.use_vllm:
            kind, reason = "vllm", "use_vllm is set"
        elif not pays:
            kind = "hf"
            reason = f"continuous batching is no faster on a CPU with {sequences} sequences, {places} at once"
        else:
            # In the weights' own precision: autocast's rounding would hide a small error.
            plain = {**options, "batch_size": config.rollout_batch_size}
            refused = probe_continuous(
                ContinuousBatchingEngine(model, tokenizer, **plain, **bounds),
                HFGenerateEngine(model, tokenizer, **plain),
                probe_prompts,
            )
            kind = "hf" if refused else "continuous"
            reason = refused or "continuous batching draws from the model's own distribution"
        if accelerator.is_main_process:
            # The slow engine is worth a line that everybody sees.
            level = logging.WARNING if kind == "hf" and pays else logging.INFO
            logger.log(level, "rollout_engine='auto' chose %r: %s", kind, reason)
    if kind == "vllm":
        return VLLMEngine(model, tokenizer, config=config, accelerator=accelerator, **options)
    if kind == "continuous":
        return ContinuousBatchingEngine(model, tokenizer, **local, **bounds)
    return HFGenerateEngine(model, tokenizer, **local)


def continuous_pays(device: torch.device, sequences: int, places: int) -> bool:
    """On a CPU where enough wait for a place: in suite cpu-rollout of the benchmarks it draws 1.9 times the tokens per
    second of generate with 128 sequences for 32 places, and hardly more with 32 for 32 or 8."""
    return device.type != "cpu" or (places >= 32 and sequences >= 4 * places)


def probe_continuous(engine: RolloutEngine, reference: RolloutEngine, prompts: Sequence[Sequence[int]]) -> str | None:
    """Why ``engine`` must not be used for this model, or None: it is run, and no list of names is asked.

    A few tokens are drawn after ``prompts`` by both engines, and the model's own forward without a cache scores them.
    ``engine`` may be off by at most four times as much as ``reference`` is, or as fp32 rounds. What shows only beyond
    the length of these prompts, such as a sliding window, is not seen here but in the gap that every rollout logs.
    """
    prompts = [list(p) for p in prompts][:_PROBE_PROMPTS]
    try:
        drawn = engine.generate(prompts * 2, seed=0, max_completion_length=_PROBE_TOKENS, return_logps=True)
    except Exception as error:  # whatever a model or an attention kernel that it does not support raises
        return f"continuous batching cannot run this model ({type(error).__name__}: {error})"
    known = reference.generate(prompts * 2, seed=0, max_completion_length=_PROBE_TOKENS, return_logps=True)
    gap, size = _own_gap(engine, drawn)
    usual, _ = _own_gap(reference, known)
    allowed = 4 * max(usual, 16 * torch.finfo(torch.float32).eps * max(size, 1.0))
    if gap <= allowed:
        return None
    return (
        f"continuous batching does not draw from this model's distribution (a token's log-prob is off by {gap:.2g}, "
        f"generate's by {usual:.2g})"
    )


@torch.no_grad()
def _own_gap(engine: Any, rollout: Rollout) -> tuple[float, float]:
    """Largest difference per token between the rollout's log-probs and the model's own; and the largest logit."""
    lm = unwrap_peft(engine.model)
    device = lm.get_input_embeddings().weight.device
    gap = size = 0.0
    with evaluating(engine.model):
        for prompt, ids, logps in zip(rollout.prompt_ids, rollout.completion_ids, rollout.logps or [], strict=True):
            row = torch.tensor([prompt + ids], device=device)
            logits = lm(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0]
            logits = logits[len(prompt) - 1 : -1].float() / engine.temperature
            own = logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]
            gap = max(gap, float((own - torch.tensor(logps, device=device)).abs().nan_to_num(torch.inf).max()))
            size = max(size, float(logits.abs().max()))
    return gap, size


def logp_gap(drawn: Sequence[Sequence[float]], scored: Tensor, accelerator: Any) -> dict[str, float]:
    """Mean and largest |difference| per token, over all devices, of an engine's log-probs and ours (N,), packed."""
    flat = torch.tensor([x for row in drawn for x in row], dtype=torch.float32, device=scored.device)
    gap = (flat - scored.float()).abs().double()
    largest = gap.max() if len(gap) else gap.new_zeros(())
    rows = accelerator.gather(torch.stack([gap.sum(), gap.new_tensor(len(gap)), largest])[None])
    total, count = rows[:, :2].sum(0).tolist()
    return {
        "rollout_logp_gap_mean": total / max(count, 1),
        "rollout_logp_gap_max": float(rows[:, 2].max()),
    }
