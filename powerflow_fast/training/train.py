"""``train``, the one call that does everything; :mod:`powerflow_fast.training.run` does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..config.options import PowerFlowConfig
from ..rewards.formats import FormatFn
from ..rollout.engine import RolloutEngine
from .prepare import check_arguments
from .result import StepReport, TrainResult
from .run import EvalFn, Run


def train(
    model: str | Path | nn.Module,
    prompts: Any,
    *,
    alpha: float | str | None = None,
    config: PowerFlowConfig | None = None,
    format_fn: FormatFn | str | None = None,
    eval_fn: EvalFn | None = None,
    callbacks: Sequence[Callable[[StepReport], bool | None]] = (),
    tokenizer: Any = None,
    reward_fn: Any = None,
    engine: RolloutEngine | None = None,
    **overrides: Any,
) -> TrainResult:
    """Train ``model`` to sample from ``p_base(y|q) ** alpha``, where p_base is the model as it is given.

    (Of a PEFT model p_base is the model with its adapter off, unless ``base="copy"``.)

    Args:
        model: hub name, local folder, or a loaded ``PreTrainedModel`` or ``PeftModel`` (trained in place).
        prompts: list of strings or of chat message lists, a ``datasets.Dataset``, or a path to .jsonl/.json/.parquet/
            .txt. Other columns of a row reach ``format_fn`` as keywords.
        alpha: > 1 sharpens (4 for a base model, 2 for an instruct model), < 1 flattens (0.5). ``"auto:entropy=0.8"``
            finds the exponent with which the trained policy has that entropy, in nats, the mean over the tokens that it
            samples; ``"auto:logp=-0.5"`` the one with that log-prob per token under p_base, log p_base(y|q) / |y|, the
            mean over completions. ``TrainResult.alpha`` is what was found; a warning says so where the run ends more
            than 5 % away.
        config: all other options; ``overrides`` are fields of it and win.
        format_fn: ``format_fn(prompt, completion, **columns) -> bool``; a completion for which it is False is scored
            with ``config.format_penalty`` nats per token added to its base log-prob. ``"boxed"`` is ready-made.
        eval_fn: ``eval_fn(model, tokenizer, step) -> {name: number}``, called before, every ``eval_steps``, and after.
        callbacks: called with a :class:`StepReport` after each optimiser step; a true result ends the training.
        tokenizer: used instead of the one beside the model.
        reward_fn: for objectives that take rewards: ``reward_fn(prompt, completion, **columns) -> number``, a batch
            function in TRL's form, a name, or a list of these (``config.reward_weights``); see docs/rewards.md.
        engine: samples instead of the policy, a :class:`~powerflow_fast.rollout.RolloutEngine`. Its log-probs of its
            own tokens make the importance ratio, so it may be another model.
        overrides: ``objective`` may also be a function of :class:`~powerflow_fast.objectives.Trajectories`.

    Returns:
        :class:`TrainResult`. ``output_dir`` then holds ``model/`` (plain safetensors, with a model card),
        ``history.jsonl``, ``history.png``, ``samples.md``, ``run.json`` and ``checkpoint-<step>/``.

    ``torchrun`` runs it on several devices, see docs/scaling.md. On one machine the numbers are a function of the
    config, the prompts and the weights: a run that was killed and resumed ends with the same bits on a CPU.

    Raises:
        ConfigError, DataError, ModelError, SelfCheckError, OutputDirError, CheckpointError: before the first step.
        RunStopped, KeyboardInterrupt: SIGTERM or SIGINT came; the state after the last whole step is saved.
        NonFiniteLossError: the loss or its gradient was NaN or infinite, with ``on_nonfinite="stop"`` or too many times
            in a row; the last checkpoint is kept (the state before that step is saved if there is none).

    Source: LA-TB, PowerFlow (arXiv 2603.18363).
    """
    callbacks = check_arguments(config, eval_fn, callbacks, tokenizer)
    config = config or PowerFlowConfig()
    objective_fn = None
    if callable(objective := overrides.get("objective")):
        objective_fn = objective
        name = getattr(objective, "__qualname__", type(objective).__qualname__)
        overrides["objective"] = f"{objective.__module__}.{name}"
    config = config.merge(**overrides, **({} if alpha is None else {"alpha": alpha}))
    config.require_alpha()
    return Run(
        model,
        prompts,
        config,
        format_fn=format_fn,
        eval_fn=eval_fn,
        callbacks=callbacks,
        tokenizer=tokenizer,
        reward_fn=reward_fn,
        objective_fn=objective_fn,
        engine=engine,
    ).train()
