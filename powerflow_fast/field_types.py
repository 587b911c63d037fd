"""What :class:`PowerFlowConfig` needs to know about its fields: types, their check and description, and old names."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["RENAMED", "describe", "matches"]

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
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "None"}[hint]
