"""Policy and log Z head under one root module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..models.batches import Batch
from ..models.logprob_model import CausalLMScorer
from ..objectives.log_z import LogZHead
from ..ops.logprobs import LogprobStats


class PolicyOutput(NamedTuple):
    logps: Tensor
    stats: LogprobStats | None
    log_z: Tensor | None


class Policy(nn.Module):
    """The trained modules under one root, so that wrappers for several devices see every parameter in one forward."""

    def __init__(self, scorer: CausalLMScorer, log_z_head: LogZHead | None):
        super().__init__()
        self.scorer = scorer
        self.log_z_head = log_z_head

    def forward(self, batch: Batch, *, temperature: float, need_stats: bool = False) -> PolicyOutput:
        learned = self.log_z_head is not None
        out = self.scorer(batch, temperature=temperature, need_stats=need_stats, pool_prompt=learned)
        # Not a view: FSDP2 warns of those among the outputs of what it wraps.
        log_z = self.log_z_head(out.pooled_prompt).clone() if learned else None
        return PolicyOutput(out.logps, out.stats, log_z)
