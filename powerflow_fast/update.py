"""One optimiser step: scores of a rollout, log Z', and the LA-TB gradient summed over micro-batches.

Nothing here depends on how sequences are cut into micro-batches: the divisor of the mean is the number of sequences in
the whole step on all devices, and a group's log Z' always comes from all of its completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .config import PowerFlowConfig
from .models import BaseScorer, CausalLMScorer
from .objectives import la_tb_loss
from .packing import PaddedBatch, pad_batch, segment_sum
from .partition import LogZHead, group_log_z


@dataclass
class Samples:
    """Completions of one rollout on this device, and what stays fixed while they are trained on."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    finished: list[bool]
    group_ids: Tensor
    """(B,) int64: completions with the same number answer the same prompt."""
    psi: Tensor
    """(B,) fp32 format penalty, 0 or negative."""
    base_logps: Tensor = field(default_factory=lambda: torch.empty(0))
    """(B,) fp32 sums of log-probs under p_base."""
    old_logps: Tensor | None = None
    """(B,) fp32 sums under the policy that drew them; None when the rollout serves a single update."""

    def __len__(self) -> int:
        return len(self.completion_ids)

    def __getitem__(self, index: slice) -> Samples:
        old = None if self.old_logps is None else self.old_logps[index]
        return Samples(
            self.prompt_ids[index],
            self.completion_ids[index],
            self.finished[index],
            self.group_ids[index],
            self.psi[index],
            self.base_logps[index],
            old,
        )

    def split(self, size: int) -> Iterator[Samples]:
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def to(self, device: torch.device) -> Samples:
        moved = {name: None if value is None else value.to(device) for name, value in self.tensors().items()}
        return Samples(self.prompt_ids, self.completion_ids, self.finished, **moved)

    def tensors(self) -> dict[str, Tensor | None]:
        names = ("group_ids", "psi", "base_logps", "old_logps")
        return {name: getattr(self, name) for name in names}

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completion_ids]


class PolicyOutput(NamedTuple):
    logps: Tensor
    entropy: Tensor | None
    log_z: Tensor | None


class Policy(nn.Module):
    """The trained modules under one root, so that wrappers for several devices see every parameter in one forward."""

    def __init__(self, scorer: CausalLMScorer, log_z_head: LogZHead | None):
        super().__init__()
        self.scorer = scorer
        self.log_z_head = log_z_head

    def forward(self, batch: PaddedBatch, *, temperature: float, need_entropy: bool = False) -> PolicyOutput:
        learned = self.log_z_head is not None
        out = self.scorer(batch, temperature=temperature, need_entropy=need_entropy, pool_prompt=learned)
        log_z = self.log_z_head(out.pooled_prompt) if learned else None
        return PolicyOutput(out.logps, out.entropy, log_z)


class StepSums(NamedTuple):
    """Per-sequence results of a step, concatenated over its micro-batches; (B,) each, detached."""

    loss: Tensor
    delta: Tensor
    weight: Tensor
    logp_mean: Tensor
    log_z: Tensor
    token_logps: Tensor
    """(N,) log-prob of each completion token under the policy before this step."""
    entropy: Tensor | None
    """(N,) per token."""


class Updater:
    """Scores rollouts and computes the gradient of one step; owns no optimiser and no data.

    Args:
        policy: the module that ``accelerator.prepare`` returned for a :class:`Policy`.
        accelerator: for autocast, backward and gradient synchronisation.
        pad_id: any token id; padding is masked.
    """

    def __init__(
        self,
        policy: nn.Module,
        base: BaseScorer,
        accelerator: Any,
        config: PowerFlowConfig,
        *,
        alpha: float,
        pad_id: int,
    ):
        self.policy, self.base, self.accelerator = policy, base, accelerator
        self.config, self.alpha, self.pad_id = config, alpha, pad_id
        self.micro_batch_size = config.per_device_train_batch_size
        # Whole groups in each micro-batch give their own log Z'; otherwise each step scores its sequences first.
        self.groups_fit = self.micro_batch_size % config.num_generations == 0
        self._ratio = {"clip": config.importance_clip, "importance_level": config.importance_level}

    def _batch(self, samples: Samples) -> PaddedBatch:
        return pad_batch(samples.prompt_ids, samples.completion_ids, self.pad_id).to(self.accelerator.device)

    def score_base(self, samples: Samples) -> Tensor:
        """(B,) sums of log-probs under p_base."""
        with self.accelerator.autocast():
            parts = [
                self.base.score(self._batch(part), temperature=self.config.temperature)
                for part in samples.split(self.micro_batch_size)
            ]
        return torch.cat(parts)

    @torch.no_grad()
    def score_policy(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """(N,) packed log-probs under the policy as it is now, and their (B + 1,) int32 boundaries."""
        logps = []
        for part in samples.split(self.micro_batch_size):
            logps.append(self.policy(self._batch(part), temperature=self.config.temperature).logps.float())
        lengths = torch.tensor([0, *samples.lengths]).cumsum(0)
        return torch.cat(logps), lengths.int().to(self.accelerator.device)

    def policy_sums(self, samples: Samples) -> Tensor:
        """(B,) sums of :meth:`score_policy`."""
        return segment_sum(*self.score_policy(samples))

    def mean_target(self, samples: Samples) -> float:
        """Mean over the sequences of all devices of α (r + ψ) − s: the log Z' that a constant would fit best."""
        lengths = torch.tensor(samples.lengths, device=self.accelerator.device)
        kept = lengths > 0
        per_token = self.alpha * (samples.base_logps / lengths + samples.psi) - self.policy_sums(samples) / lengths
        total = torch.stack([per_token[kept].sum(), kept.sum().to(per_token.dtype)])
        total = self.accelerator.reduce(total, reduction="sum")
        return float(total[0] / total[1].clamp_min(1))

    def gradient(self, samples: Samples, *, on_policy: bool, need_entropy: bool) -> StepSums:
        """Add the step's gradient to ``.grad``; ``samples`` are this device's share of the step, w = 1 if on-policy."""
        config, accelerator = self.config, self.accelerator
        with_tokens = torch.tensor(sum(length > 0 for length in samples.lengths), device=accelerator.device)
        total = int(accelerator.reduce(with_tokens, reduction="sum"))
        log_z_of_step = None
        if config.log_z == "group" and not self.groups_fit:
            log_z_of_step = self._group_log_z(samples, *self.score_policy(samples), on_policy)
        parts = list(samples.split(self.micro_batch_size))
        results = []
        for number, part in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(self.policy):
                batch = self._batch(part)
                out = self.policy(batch, temperature=config.temperature, need_entropy=need_entropy)
                logps = out.logps.float()
                if config.log_z == "learned":
                    log_z = out.log_z.float()
                elif log_z_of_step is None:
                    log_z = self._group_log_z(part, logps.detach(), batch.cu_seqlens, on_policy)
                else:
                    start = number * self.micro_batch_size
                    log_z = log_z_of_step[start : start + len(part)]
                result = la_tb_loss(
                    logps,
                    part.base_logps,
                    log_z,
                    batch.cu_seqlens,
                    alpha=self.alpha,
                    psi=part.psi,
                    old_logps=None if on_policy else part.old_logps,
                    num_sequences=max(total, 1),
                    **self._ratio,
                )
                # Data-parallel wrappers average gradients over devices; the loss is a share of one global mean.
                accelerator.backward(result.loss * accelerator.num_processes)
            row = (result.loss.detach(), result.delta, result.weight, result.logp_mean, log_z.detach(), logps.detach())
            results.append((*row, out.entropy))
        loss, delta, weight, logp_mean, log_z, token_logps, entropy = zip(*results, strict=True)
        return StepSums(
            torch.stack(loss).sum(),
            torch.cat(delta),
            torch.cat(weight),
            torch.cat(logp_mean),
            torch.cat(log_z),
            torch.cat(token_logps),
            torch.cat(entropy) if need_entropy else None,
        )

    def _group_log_z(self, samples: Samples, logps: Tensor, cu_seqlens: Tensor, on_policy: bool) -> Tensor:
        return group_log_z(
            logps,
            samples.base_logps,
            samples.group_ids,
            cu_seqlens,
            alpha=self.alpha,
            psi=samples.psi,
            old_logps=None if on_policy else samples.old_logps,
            **self._ratio,
        )

    def metrics(self, samples: Samples, sums: StepSums) -> dict[str, float]:
        """Means over the sequences (entropy: tokens) of all devices; names as in ``report.METRICS``."""
        device = self.accelerator.device
        lengths = torch.tensor(samples.lengths, device=device)
        kept = lengths > 0
        low, high = self.config.importance_clip
        per_sequence = {
            "delta_abs": sums.delta.abs(),
            "log_z": sums.log_z,
            "policy_logp": sums.logp_mean,
            "base_logp": samples.base_logps / lengths.clamp_min(1),
            "length": lengths.float(),
            "finished": torch.tensor(samples.finished, device=device).float(),
            "format_ok": (samples.psi == 0).float(),
            "importance_weight": sums.weight,
            "clip_fraction": ((sums.weight <= low) | (sums.weight >= high)).float(),
        }
        totals = [value[kept].double().sum() for value in per_sequence.values()]
        totals += [kept.sum().double(), sums.entropy.double().sum(), lengths.sum().double()]
        *means, count, entropy, tokens = self.accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        metrics = {name: total / max(count, 1) for name, total in zip(per_sequence, means, strict=True)}
        return metrics | {"entropy": entropy / max(tokens, 1)}
