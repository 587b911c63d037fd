"""The log-partition per token, log Z'(q): learned by a small head, or estimated from a prompt's completions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
