"""What :func:`powerflow_fast.train` needs before its first step: argument checks, devices, the model made trainable."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..config.options import PowerFlowConfig
from ..data import PromptDataset, check_lengths
from ..errors import ConfigError, ModelError, SelfCheckError
from ..models.adapters import add_lora, is_peft, unwrap_peft
from ..models.loading import max_positions
from ..models.logprob_model import BaseScorer, CausalLMScorer
from ..models.modes import disable_dropout
from ..models.packed_attention import attending, packed_attention
from ..objectives.registry import Objective, resolve_objective
from ..objectives.trajectories import ObjectiveFunction
from ..ops.torch_products import bf16_is_fast
from ..rewards.registry import REWARDS, resolve_reward
from ..rewards.reward import RewardSum
from ..tools.random_state import seeded
from .self_check import check_packing

logger = logging.getLogger(__name__)


def check_arguments(config: Any, eval_fn: Any, callbacks: Any, tokenizer: Any) -> list[Any]:
    """The callbacks as a list; TypeError naming the argument of ``train`` that is of the wrong type."""
    if config is not None and not isinstance(config, PowerFlowConfig):
        raise TypeError(
            f"train: config must be a PowerFlowConfig, got {type(config).__name__}; pass a dict as **config"
        )
    callbacks = [callbacks] if callable(callbacks) else list(callbacks)
    for name, function in [("eval_fn", eval_fn), *(("callbacks", c) for c in callbacks)]:
        if function is not None and not callable(function):
            raise TypeError(f"train: {name} must be callable, got {type(function).__name__}")
    if tokenizer is not None and not callable(tokenizer):
        raise TypeError(f"train: tokenizer must be a tokenizer object, got {type(tokenizer).__name__}")
    return callbacks


def choose_objective(
    config: PowerFlowConfig, objective_fn: ObjectiveFunction | None, reward_fn: Any
) -> tuple[Objective, RewardSum | None]:
    """The loss and the reward of a run; :class:`ConfigError` where they don't exist or don't go together."""
    try:
        objective = resolve_objective(objective_fn or config.objective, config.objective_options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"PowerFlowConfig: {str(error).removeprefix('resolve_objective: ')}") from error
    if reward_fn is not None and config.reward is not None:
        raise ConfigError(
            f"PowerFlowConfig: reward={config.reward!r} and reward_fn are both given; put names and functions into one "
            "list, reward_fn=[...]"
        )
    chosen = config.reward if reward_fn is None else reward_fn
    reward = None
    if chosen is not None:
        options = {"weights": config.reward_weights, "answer_equivalence": config.answer_equivalence}
        reward = resolve_reward(chosen, **options)
        if objective_fn is None and not objective.needs_rewards:
            logger.warning("objective %r takes no reward: it is computed and logged only", objective.name)
    elif objective.needs_rewards:
        raise ConfigError(
            f"PowerFlowConfig: objective={objective.name!r} needs rewards: pass reward_fn, or reward as one of "
            f"{', '.join(REWARDS)}"
        )
    if reward is not None and reward.needs_groups and config.num_generations < 2:
        raise ConfigError(
            f"PowerFlowConfig: reward {', '.join(reward.names)} compares the completions of a prompt: num_generations "
            f"must be >= 2, got {config.num_generations}"
        )
    if config.log_z == "table" and objective.partition is None:
        raise ConfigError(f"PowerFlowConfig: log_z='table' needs a log-partition, which {objective.name!r} has not")
    if config.replay_prioritized and config.replay_steps and reward is None:
        raise ConfigError("PowerFlowConfig: replay_prioritized=True needs rewards: pass reward_fn or reward")
    return objective, reward


def check_prompts(
    dataset: PromptDataset, tokenizer: Any, model: nn.Module, config: PowerFlowConfig, encode_options: dict[str, Any]
) -> None:
    """DataError or ConfigError where a prompt is too long for the config, or for the model with its completion."""
    longest = check_lengths(dataset, tokenizer, max_prompt_length=config.max_prompt_length, **encode_options)
    limit = max_positions(model)
    if limit is not None and longest + config.max_completion_length > limit:
        raise ConfigError(
            f"PowerFlowConfig: the longest prompt has {longest} tokens; with max_completion_length="
            f"{config.max_completion_length} that exceeds the model's {limit} positions; set max_completion_length "
            f"to at most {limit - longest}"
        )


def prepare_model(model: nn.Module, config: PowerFlowConfig) -> nn.Module:
    """Adapter, dropout, precision of the trained weights and checkpointing, as the config has them."""
    with seeded(config.seed, torch.device("cpu")):  # a LoRA adapter starts from random numbers
        if config.use_peft and not is_peft(model):
            model = add_lora(
                model,
                r=config.lora_r,
                alpha=config.lora_alpha,
                target_modules=config.lora_target_modules,
            )
    disable_dropout(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ModelError("train: no parameter of the model requires a gradient")
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if torch.float64 in trained:
        raise ModelError("train: the model's weights are float64; load it with dtype=torch.float32")
    if trained != {torch.float32} and config.dtype != "bfloat16":
        # A loaded model is the caller's, but a run that changes nothing is not what the caller wants.
        logger.warning(
            "the model is converted to float32: steps of %g are lost in half-precision weights; bf16=True "
            "computes in bfloat16, dtype='bfloat16' trains the weights as they are",
            config.learning_rate,
        )
        model.float()
    generation_config = getattr(unwrap_peft(model), "generation_config", None)
    try:
        if generation_config is not None:
            generation_config.validate(strict=True)
    except ValueError as error:
        raise ModelError(f"train: the model's generation_config could not be saved with it: {error}") from error
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def choose_packing(
    config: PowerFlowConfig,
    scorer: CausalLMScorer,
    base: BaseScorer,
    *,
    accelerator: Any,
    sample_prompts_ids: Sequence[Sequence[int]],
) -> str | None:
    """The attention that packed rows go through, or None where rows are padded; says so in the log.

    Raises SelfCheckError where ``packing="on"`` and this model, or p_base where it runs elsewhere, cannot be packed.
    """
    if config.packing == "off":
        return None
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    own = unwrap_peft(scorer.model).config._attn_implementation
    options = {"temperature": config.temperature, "sample_prompts_ids": sample_prompts_ids}
    for attention in dict.fromkeys([packed_attention(scorer.model, autocast=half), own]):
        try:
            with attending(base.alike(scorer), attention):
                check_packing(scorer, autocast=accelerator.autocast, **options)
                if base.scorer.model is not scorer.model:
                    check_packing(base.scorer, autocast=accelerator.autocast, **options)
        except SelfCheckError as error:
            if attention == own and config.packing == "on":
                raise
            otherwise = "rows are padded instead of packed" if attention == own else f"packed rows go through {own}"
            logger.warning("%s: %s", otherwise, error)
        else:
            logger.info("rows are packed, with %s attention", attention)
            return attention
    return None


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt)


def make_accelerator(config: PowerFlowConfig) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.trackers:
        if tracker != "all" and tracker not in available:
            raise ConfigError(f"report_to={tracker!r} needs a package that is not installed: pip install {tracker}")
    # The state is shared by a process: a second train() in it may want another precision.
    AcceleratorState._reset_state()
    # Without being told so, accelerate takes the processes of a torchrun on CPUs for one process each.
    cpu = not torch.accelerator.is_available()
    device_type = PartialState(cpu=cpu).device.type
    bf16 = bf16_is_fast(device_type) if config.bf16 == "auto" else config.bf16
    return Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if bf16 else "no",
        log_with=config.trackers or None,
        project_dir=config.output_dir,
    )


def digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(str(text).encode()).hexdigest()[:16]
