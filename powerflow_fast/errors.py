"""Typed errors. Each also is the builtin that callers already catch (``ValueError``, ``RuntimeError``, ``OSError``).

A message names the argument or file, what was expected, what was found, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class PowerFlowError(Exception):
    """Base of every error that powerflow_fast raises on purpose."""


class ConfigError(PowerFlowError, ValueError):
    """A configuration field is unknown, of the wrong type, out of range, or contradicts another field."""


class DataError(PowerFlowError, ValueError):
    """Prompts cannot be read or used: missing or empty file, a bad row (its line is named), over-long prompts."""


class ModelError(PowerFlowError, ValueError):
    """The model cannot be loaded, or its head cannot be expressed as ``linear_logprobs``."""


class SelfCheckError(ModelError):
    """Our log-probs differ from the model's own logits, or rollouts are not drawn from the scored distribution."""


class BackendUnavailableError(PowerFlowError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message carries the reason."""


class RolloutError(PowerFlowError, RuntimeError):
    """A sampling engine failed, is missing, or samples from other weights than it was told to; the cause is named."""


class JudgeError(PowerFlowError, RuntimeError):
    """A judge's endpoint is down, refuses, or does not speak its format; what it has answered is kept.

    ``done`` of ``total`` prompts of the failed call have a reply; the same call again asks only for the others.
    ``completions`` holds what :func:`evaluate` had sampled, to be passed to it again with ``completions=``.
    """

    def __init__(self, message: str, *, done: int = 0, total: int = 0, completions: list[dict[str, Any]] | None = None):
        super().__init__(message)
        self.done = done
        self.total = total
        self.completions = completions or []


class CheckpointError(PowerFlowError, RuntimeError):
    """A checkpoint is unreadable, incomplete, or belongs to a run with another configuration."""


class ScorerError(PowerFlowError, RuntimeError):
    """A scorer or an encoder raised, or returned no numbers; the message names it, a scorer's the completion too.

    ``completions`` holds what :func:`evaluate` had sampled, to be passed to it again with ``completions=``.
    """

    def __init__(self, message: str, *, completions: list[dict[str, Any]] | None = None):
        super().__init__(message)
        self.completions = completions or []


class DeviceMemoryError(PowerFlowError, RuntimeError):
    """The device's memory does not hold even one sequence, or a micro-batch that cannot be repeated."""


class OutputDirError(PowerFlowError, OSError):
    """``output_dir`` cannot be written, or already holds another run."""


class NonFiniteLossError(PowerFlowError, RuntimeError):
    """The loss, its gradient or the weights are NaN or infinite.

    ``step`` is the optimiser step, ``metric`` the first of "loss", "grad_norm", "weights" that is not finite, and
    ``checkpoint`` the last good one.
    """

    def __init__(self, message: str, *, step: int, metric: str, checkpoint: str | None):
        super().__init__(message)
        self.step = step
        self.metric = metric
        self.checkpoint = checkpoint


class RunStopped(SystemExit):
    """SIGTERM ended :func:`train` after its state was saved; ``checkpoint`` is that folder, or None before step 1.

    As a ``SystemExit`` with code 0 it ends a script the way that schedulers expect; catch it to do more.
    """

    def __init__(self, checkpoint: str | None):
        super().__init__(0)
        self.checkpoint = checkpoint


def suggest(name: str, names: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the nearest of ``names``, or an empty string."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
