"""Estimates of log Z': by a small head that is learned, or a running one for each prompt, for groups that are too small
to give a good one by themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

Key = int | str


class LogZTable:
    """log Z' of each prompt as an exponential moving average of its groups' estimates. In plain Python:

        value[key] = estimate                                              the first time
        value[key] += (1 - momentum) * (estimate - value[key])             later

    What it estimates: E[alpha (r + psi) - s] over completions of the policy, per token, in nats. ``group_log_z`` takes
    that mean over the K completions at hand; with a variance σ² of single completions its error has variance σ²/K, and
    that of the table (1 - momentum) / (1 + momentum) as much once a prompt has been seen often, for a policy at rest.
    Read before it is updated, it is also independent of the completions that it is subtracted from, while a group's own
    mean shrinks their residuals by (K - 1)/K on average. Both count for small K, and the table is the only way with
    K = 1; with K of 8 or more, or prompts that are seen once or twice, take the group's mean.

    Its bias: the first value is the estimate itself, unbiased, but an average over past policies trails behind one that
    moves: by 1 / (1 - momentum) times the change of log Z' between two visits of the prompt when it is read before an
    update, by one change less after it. A value that is too high by c adds ``2 c ∇E[1 / length]`` to the gradient of
    the LA-TB loss and so makes completions longer, one that is too low makes them shorter.

    Args:
        momentum: 0 <= momentum < 1; 0 keeps the last estimate only.

    Raises:
        TypeError, ValueError: a momentum out of range; keys or values of another kind, shape or number.
    """

    def __init__(self, momentum: float = 0.9):
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
            raise TypeError(f"LogZTable: momentum must be a number, got {type(momentum).__name__}")
        if not 0 <= momentum < 1:
            raise ValueError(f"LogZTable: momentum must satisfy 0 <= momentum < 1, got {momentum}")
        self.momentum = float(momentum)
        self._values: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def update(self, keys: Sequence[Key], group_estimates: Tensor) -> None:
        """Take in one estimate for each of ``keys``, as ``group_log_z`` gives them.

        A key that occurs several times counts once, with the mean of its estimates: (B,) values, equal within a group,
        do the same as one per group. Leave out groups without a token, whose estimate is a placeholder of 0.

        Args:
            keys: the prompts' numbers or hashes, ints or strings.
            group_estimates: (len(keys),) fp32 or fp64, finite; on a GPU the host waits for it.
        """
        estimates: dict[Key, list[float]] = {}
        for key, value in zip(keys, _checked("update", keys, "group_estimates", group_estimates), strict=True):
            estimates.setdefault(key, []).append(value)
        for key, values in estimates.items():
            if not all(map(math.isfinite, values)):
                raise ValueError(f"LogZTable.update: group_estimates must be finite, got {values} for key {key!r}")
        for key, values in estimates.items():
            estimate = math.fsum(values) / len(values)
            before = self._values.get(key, estimate)
            self._values[key] = before + (1 - self.momentum) * (estimate - before)

    def shift(self, change: float) -> None:
        """Add ``change`` to every value: what a new alpha does to all of them."""
        self._values = {key: value + change for key, value in self._values.items()}

    def get(self, keys: Sequence[Key], default: Tensor) -> Tensor:
        """The values of ``keys`` and, where a key was never updated, its entry of ``default``.

        Args:
            default: (len(keys),) fp32 or fp64, finite or not: the batch's own estimates, from ``group_log_z``.

        Returns:
            (len(keys),) of default's dtype and device, without gradient.
        """
        values = zip(keys, _checked("get", keys, "default", default), strict=True)
        return torch.tensor([self._values.get(k, v) for k, v in values], dtype=default.dtype, device=default.device)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON for ``save_checkpoint``; :meth:`load_state_dict` restores them bit for bit."""
        values = torch.tensor(list(self._values.values()), dtype=torch.float64)
        return {"values": values}, {"momentum": self.momentum, "keys": list(self._values)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Replace the contents by those saved; :class:`CheckpointError` if they are of another momentum or damaged."""
        if meta["momentum"] != self.momentum:
            raise CheckpointError(
                f"LogZTable: the checkpoint has momentum={meta['momentum']}, this run has {self.momentum}"
            )
        if len(meta["keys"]) != len(tensors["values"]):
            raise CheckpointError(
                f"LogZTable: the checkpoint has {len(meta['keys'])} keys and {len(tensors['values'])} values"
            )
        self._values = dict(zip(meta["keys"], tensors["values"].tolist(), strict=True))


def _checked(method: str, keys: Sequence[Key], name: str, values: Tensor) -> list[float]:
    """``values`` as floats, after checks of both."""
    op = f"LogZTable.{method}"
    for key in keys:
        if isinstance(key, bool) or not isinstance(key, (int, str)):
            raise TypeError(f"{op}: keys must be ints or strings, got {key!r} ({type(key).__name__})")
    if not isinstance(values, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(values).__name__}")
    if values.shape != (len(keys),):
        raise ValueError(f"{op}: {name} must have shape (len(keys),)=({len(keys)},), got {tuple(values.shape)}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: {name} must be torch.float32 or torch.float64, got {values.dtype}")
    return values.tolist()


class LogZHead(nn.Module):
    """log Z'(q) as an MLP on the pooled hidden state of a prompt: (layers-1) x [Linear, GELU, LayerNorm], Linear to 1.

    The last layer starts at zero, so that the first value is its bias: see :meth:`warm_start`. The parameters are fp32
    and so is the computation, under autocast too. The input is detached: the head never trains the model that feeds it.

    Args:
        hidden_size: H, the size of the pooled hidden states.
        num_layers: 1 (a single linear layer) or more.
        hidden_dim: width between the layers; None takes ``hidden_size``.

    Source: the architecture is FlowRL's (arXiv 2509.15207) without dropout.
    """

    def __init__(self, hidden_size: int, *, num_layers: int = 1, hidden_dim: int | None = None):
        super().__init__()
        hidden_dim = hidden_size if hidden_dim is None else hidden_dim
        for name, value in (("hidden_size", hidden_size), ("num_layers", num_layers), ("hidden_dim", hidden_dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"LogZHead: {name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"LogZHead: {name} must be >= 1, got {value}")
        layers: list[nn.Module] = []
        width = hidden_size
        for _ in range(num_layers - 1):
            layers += [nn.Linear(width, hidden_dim), nn.GELU(), nn.LayerNorm(hidden_dim)]
            width = hidden_dim
        last = nn.Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(*layers, last).float()

    def forward(self, pooled: Tensor) -> Tensor:
        """(P, H) pooled prompt states of any floating dtype -> (P,) fp32 log Z', nats per token."""
        hidden_size = self.layers[0].in_features
        if pooled.dim() != 2 or pooled.shape[1] != hidden_size:
            raise ValueError(f"LogZHead: pooled must have shape (P, H)=(P, {hidden_size}), got {tuple(pooled.shape)}")
        with torch.autocast(pooled.device.type, enabled=False):
            return self.layers(pooled.detach().float()).squeeze(-1)

    @torch.no_grad()
    def warm_start(self, value: float) -> None:
        """Set the last bias: with its zero weight the head then gives ``value`` for every prompt."""
        if not math.isfinite(value):
            raise ValueError(f"LogZHead: the warm start must be finite, got {value}")
        self.layers[-1].bias.fill_(value)

    @torch.no_grad()
    def shift(self, change: float) -> None:
        """Add ``change`` to what the head gives for every prompt."""
        self.layers[-1].bias.add_(change)
