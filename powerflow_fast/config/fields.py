"""What :class:`PowerFlowConfig` needs to know about its fields: types, their check and description, and old names."""

from __future__ import annotations

import dataclasses
import math
import types
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from ..errors import ConfigError

# Names people bring from other trainers, with what to write here.
RENAMED = {
    "beta": "there is no KL weight here; the strength of the change is alpha",
    "epsilon": "write importance_clip=(1 - epsilon, 1 + epsilon)",
    "epsilon_high": "write importance_clip=(1 - epsilon, 1 + epsilon_high)",
    "loss_type": "write objective",
    "max_new_tokens": "write max_completion_length",
    "gradient_checkpointing": "write activation_checkpointing",
    "lora_dropout": "there is none: the policy is scored as it was sampled, without dropout",
    "lr": "write learning_rate",
}


def matches(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``; an int is a float, a bool is no number, a list may stand for a tuple."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, a) for a in args)
    if origin is Literal:
        return any(type(value) is type(a) and value == a for a in args)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and len(value) == len(args) and all(map(matches, value, args))
    if origin is list:
        return isinstance(value, list) and all(matches(v, args[0]) for v in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe(hint: Any) -> str:
    """``hint`` in words, for error messages."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(a) for a in args)
    if origin is Literal:
        return " or ".join(repr(a) for a in args)
    if origin is tuple:
        return f"{len(args)} numbers"
    if origin is list:
        return f"a list of {args[0].__name__}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "None"}
    return "a mapping" if hint is dict else names[hint]


class AlphaRequest(NamedTuple):
    """What ``alpha="auto:..."`` asks for: a quantity of the trained policy, measured on its own completions."""

    quantity: Literal["entropy", "logp"]
    """The mean token entropy, or the mean over completions of their log-prob per token under the base model."""
    value: float
    """Nats: > 0 for the entropy, < 0 for the log-prob."""


def alpha_request(alpha: float | str | None) -> AlphaRequest | None:
    """What a field ``alpha`` of text asks for, None for a number; :class:`ConfigError` where it asks for nothing."""
    if not isinstance(alpha, str):
        return None
    quantity, _, number = alpha.removeprefix("auto:").partition("=")
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    signs = {"entropy": 1, "logp": -1}
    if alpha.startswith("auto:") and math.isfinite(value) and value * signs.get(quantity, 0) > 0:
        return AlphaRequest(quantity, value)
    raise config_error(
        "alpha must be a number, 'auto:entropy=NATS' with the mean token entropy to reach, > 0, or 'auto:logp=NATS' "
        f"with the mean log-prob per token under the base model, < 0, got {alpha!r}"
    )


def config_error(message: str) -> ConfigError:
    return ConfigError(f"PowerFlowConfig: {message}")


def checked(f: dataclasses.Field, hint: Any, value: Any) -> Any:
    """``value`` of field ``f``, its type and bounds checked; an int becomes a float, a list a tuple, as declared."""
    if isinstance(value, Path):
        value = str(value)
    if not matches(value, hint):
        raise config_error(f"{f.name} must be {describe(hint)}, got {value!r} ({type(value).__name__})")
    if get_origin(hint) is tuple:
        value = tuple(float(v) for v in value)
    elif isinstance(value, int) and not isinstance(value, bool) and float in (hint, *get_args(hint)):
        value = float(value)
    numbers = value if isinstance(value, (list, tuple)) else (value,)
    for number in numbers:
        if isinstance(number, (int, float)) and not math.isfinite(number):
            raise config_error(f"{f.name} must be finite, got {value}")
    if value is None or isinstance(value, (str, bool, dict, list)):
        return value
    for key, symbol, holds in (
        ("ge", ">=", lambda v, b: v >= b),
        ("gt", ">", lambda v, b: v > b),
        ("le", "<=", lambda v, b: v <= b),
        ("lt", "<", lambda v, b: v < b),
    ):
        if key in f.metadata and not holds(value, f.metadata[key]):
            raise config_error(f"{f.name} must be {symbol} {f.metadata[key]}, got {value}")
    return value
