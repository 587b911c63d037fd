"""What a verl configuration must say for PowerFlow, checked key by key. Nothing here imports verl.

A configuration is any tree of mappings: OmegaConf's ``DictConfig``, verl's own dataclasses, or dicts.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, suggest
from ..rewards.formats import FORMATS, FormatFn

__all__ = ["PowerFlowSettings", "actor_clip", "check_actor"]

NAME = "powerflow"
"""The name under which the trainer, the policy loss and the advantage estimator are registered with verl."""
FUSED_BACKEND = "powerflow_fast"
"""``actor_rollout_ref.model.fused_kernel_options.impl_backend`` of our log-prob kernels."""

_DEFAULTS = {"alpha": None, "format_fn": None, "format_penalty": -0.5}
_MISSING = object()


@dataclass(frozen=True)
class PowerFlowSettings:
    """The section ``powerflow`` of a verl configuration."""

    alpha: float
    """Exponent of the target ``p_base(y|q)^alpha``."""
    format_fn: FormatFn | None = None
    """``format_fn(prompt, completion) -> bool``; None: no format is asked for and ψ = 0."""
    format_penalty: float = -0.5
    """ψ of a completion for which ``format_fn`` returns False, nats per token, at most 0."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> PowerFlowSettings:
        """The settings of a whole verl configuration, after a check of every key that PowerFlow depends on.

        Raises ConfigError (a ValueError) that names the key, what was expected and what was found.
        """
        _check_run(config)
        check_actor(_get(config, "actor_rollout_ref.actor", {}))
        section = _get(config, NAME, None)
        if not isinstance(section, Mapping):
            raise _wrong(NAME, "a section with alpha (on the command line: +powerflow.alpha=4)", section)
        for key in section:
            if key not in _DEFAULTS:
                raise ConfigError(
                    f"{NAME}.{key} is unknown; expected {', '.join(_DEFAULTS)}{suggest(str(key), _DEFAULTS)}"
                )
        values = {key: section.get(key, default) for key, default in _DEFAULTS.items()}
        alpha = _number(f"{NAME}.alpha", values["alpha"], "a finite number > 0", lambda x: x > 0)
        penalty = _number(f"{NAME}.format_penalty", values["format_penalty"], "a finite number <= 0", lambda x: x <= 0)
        return cls(alpha=alpha, format_fn=_import_format(values["format_fn"]), format_penalty=penalty)


def check_actor(actor: Mapping[str, Any]) -> tuple[float, float]:
    """Check ``actor_rollout_ref.actor`` and return the bounds of the importance weight.

    The policy loss calls it in the worker, which sees no other part of the configuration: a reference policy whose KL
    has no weight is what only PowerFlow's trainer asks for, so another trainer's advantages are refused there.
    """
    prefix = "actor_rollout_ref.actor."
    reference = "the reference log-probs are p_base, and their KL is no part of the loss"
    _expect(actor, "policy_loss.loss_mode", NAME, "PowerFlow's loss", prefix)
    _expect(actor, "use_kl_loss", True, reference, prefix)
    _expect(actor, "kl_loss_coef", 0, reference, prefix)
    _expect(actor, "entropy_coeff", 0, "the entropy is no part of the loss", prefix)
    return actor_clip(actor)


def actor_clip(actor: Mapping[str, Any]) -> tuple[float, float]:
    """(low, high) of the importance weight from ``clip_ratio_low`` and ``clip_ratio_high``, else ``clip_ratio``."""
    bounds = []
    for key, sign in (("clip_ratio_low", -1), ("clip_ratio_high", 1)):
        if _get(actor, key, None) is None:
            key = "clip_ratio"
        most = 1.0 if sign < 0 else math.inf
        text = "a number in [0, 1]" if sign < 0 else "a finite number >= 0"
        value = _number(f"actor_rollout_ref.actor.{key}", _get(actor, key, None), text, lambda x, m=most: 0 <= x <= m)
        bounds.append(1 + sign * value)
    return bounds[0], bounds[1]


def _check_run(config: Mapping[str, Any]) -> None:
    """Everything outside ``actor_rollout_ref.actor`` and ``powerflow``."""
    _expect(config, "trainer.use_v1", True, "only verl's V1 trainers can be registered")
    _expect(config, "trainer.v1.trainer_mode", NAME, "PowerFlow's trainer")
    _expect(config, "algorithm.adv_estimator", NAME, "the targets stand in place of advantages")
    _expect(config, "algorithm.use_kl_in_reward", False, "PowerFlow has no reward")
    for key, why in (
        ("algorithm.use_pf_ppo", "PowerFlow has no reward to reweight by"),
        ("algorithm.filter_groups.enable", "PowerFlow has no reward to filter by"),
        (
            "algorithm.rollout_correction.bypass_mode",
            "the weight is taken against the actor's own log-probs",
        ),
        ("distillation.enabled", "its loss would take the place of PowerFlow's"),
        ("critic.enable", "PowerFlow has no critic"),
    ):
        if _get(config, key, False):  # None is "off" for some of them
            raise _wrong(key, "false", _get(config, key, None), why)
    for key in ("algorithm.rollout_correction.rollout_is", "algorithm.rollout_correction.rollout_rs"):
        value = _get(config, key, None)
        if value is not None:
            raise _wrong(key, "null", value, "it would reweight or mask tokens of a loss over whole completions")

    scored = "what is sampled must be what is scored, the full softmax at the sampling temperature"
    rollout = "actor_rollout_ref.rollout."
    for key, expected in (("top_p", 1), ("top_k", -1), ("do_sample", True)):
        _expect(config, rollout + key, expected, scored)
    if _get(config, rollout + "repetition_penalty", 1) != 1:
        raise _wrong(rollout + "repetition_penalty", "1", _get(config, rollout + "repetition_penalty", 1), scored)
    _number(
        rollout + "temperature", _get(config, rollout + "temperature", None), "a finite number > 0", lambda x: x > 0
    )
    n = _get(config, rollout + "n", None)
    if isinstance(n, bool) or not isinstance(n, int) or n < 2:
        raise _wrong(rollout + "n", "an int >= 2", n, "log Z' is a mean over the completions of a prompt")

    model = "actor_rollout_ref.model."
    if _get(config, model + "use_fused_kernels", False):
        backend = _get(config, model + "fused_kernel_options.impl_backend", None)
        strategy = _get(config, "actor_rollout_ref.actor.strategy", None)
        if backend == FUSED_BACKEND and strategy not in ("fsdp", "fsdp2"):
            why = f"the {FUSED_BACKEND} kernels are reached through verl's FSDP engine"
            raise _wrong("actor_rollout_ref.actor.strategy", "'fsdp' or 'fsdp2'", strategy, why)


def _import_format(name: Any) -> FormatFn | None:
    key = f"{NAME}.format_fn"
    if name is None:
        return None
    if not isinstance(name, str):
        raise _wrong(key, "null or a name", name)
    if name in FORMATS:
        return FORMATS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise _wrong(key, f"one of {', '.join(FORMATS)}, or module.function", name)
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise _wrong(key, "an importable module.function", name, str(error)) from error
    if not callable(function):
        raise _wrong(key, "a function", name, f"it is of type {type(function).__name__}")
    return function


def _get(config: Any, key: str, default: Any) -> Any:
    """The value at a dotted key, or ``default`` where a part of it is absent or null."""
    for part in key.split("."):
        if not isinstance(config, Mapping):
            return default
        config = config.get(part, default)
    return config


def _expect(config: Mapping[str, Any], key: str, expected: Any, why: str, prefix: str = "") -> None:
    value = _get(config, key, _MISSING)
    if value is _MISSING or isinstance(value, bool) != isinstance(expected, bool) or value != expected:
        raise _wrong(prefix + key, repr(expected), None if value is _MISSING else value, why)


def _number(key: str, value: Any, expected: str, accept: Callable[[float], bool]) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (math.isfinite(value) and accept(value)):
        raise _wrong(key, expected, value)
    return float(value)


def _wrong(key: str, expected: str, value: Any, why: str = "") -> ConfigError:
    return ConfigError(f"{key} must be {expected}, got {value!r}{f': {why}' if why else ''}")
