"""The log-partition per token, log Z'(q): learned by a small head, or estimated from a prompt's completions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .dispatch import require_tensor
from .logprobs import segment_sum
from .objectives import ImportanceLevel, la_tb

__all__ = ["LogZHead", "group_log_z"]


@torch.no_grad()
def group_log_z(
    logps: Tensor,
    base_logps: Tensor,
    group_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    alpha: float,
    psi: Tensor | None = None,
    old_logps: Tensor | None = None,
    clip: tuple[float, float] = (0.8, 1.2),
    importance_level: ImportanceLevel = "sequence",
) -> Tensor:
    """log Z' of each completion's prompt, estimated from the completions of that prompt. In plain torch, for group g:

        members = (group_ids == g) & (length > 0)
        log_z[group_ids == g] = (w * (alpha * (r + psi) - s))[members].sum() / w[members].sum()

    with s, r and w as in ``la_tb_loss``. It is the value that minimises the group's loss, which makes
    ``la_tb_loss(..., log_z=group_log_z(...))`` the log-variance form of LA-TB: no head to train.

    Args:
        group_ids: (B,) int64, equal for the completions of one prompt; any values, in any order.
        others: as in ``la_tb_loss``. No input gets a gradient.

    Returns:
        (B,) detached, logps' dtype, nats per token; 0 for a group without a token. A group must be in one call: the
        mean over a part of it is another number. The sums have a fixed order: same input, same bits, on CUDA too.

    Raises:
        TypeError, ValueError: as ``la_tb_loss``.

    Source: the log-variance (VarGrad) form of trajectory balance, Richter et al. 2020 (arXiv 2010.10436).
    """
    op = "group_log_z"
    zero = torch.zeros_like(base_logps) if isinstance(base_logps, Tensor) else base_logps
    # with log_z = 0 the residual is the negative of what the mean is taken of
    out = la_tb(
        op,
        logps,
        base_logps,
        zero,
        cu_seqlens,
        alpha=alpha,
        psi=psi,
        old_logps=old_logps,
        clip=clip,
        importance_level=importance_level,
        num_sequences=1,
    )
    shape = tuple(base_logps.shape)
    require_tensor(op, "group_ids", group_ids, shape=shape, symbols="(B,)", dtypes=(torch.int64, torch.int32))
    if group_ids.device != logps.device:
        raise ValueError(f"{op}: group_ids must be on logps' device {logps.device}, got {group_ids.device}")

    # Groups become segments of a stable order: fixed sums on any device, and no wait for the number of groups.
    order = torch.argsort(group_ids, stable=True)
    ids = group_ids[order]
    rank = torch.zeros_like(order)
    rank[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    batch = torch.arange(len(order) + 1, device=order.device)
    offsets = torch.searchsorted(rank, batch, out_int32=True)
    weight = out.weight[order].double()
    weighted = segment_sum(weight * -out.delta[order], offsets)
    total = segment_sum(weight, offsets)
    # a total of zero: no member with tokens, or every weight clipped to zero
    log_z = (weighted / total).where(total != 0, 0.0)
    return log_z[rank][torch.argsort(order)].to(logps.dtype)


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
