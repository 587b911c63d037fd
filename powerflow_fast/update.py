"""One optimiser step: scores of a rollout, log Z', and the LA-TB gradient summed over micro-batches.

Nothing here depends on how sequences are cut into micro-batches: the divisor of the mean is the number of sequences in
the whole step on all devices, and a group's log Z' always comes from all of its completions.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .alarms import repeated_ngrams
from .attention import attending, break_even
from .config import PowerFlowConfig
from .errors import DeviceMemoryError
from .models import BaseScorer, CausalLMScorer
from .objectives import la_tb_loss
from .packing import Batch, pack_batch, pad_batch, segment_sum, token_batches
from .partition import LogZHead, group_log_z

logger = logging.getLogger(__name__)


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

    def take(self, indices: Sequence[int]) -> Samples:
        """The sequences with these numbers, in this order; ``base_logps`` must be there."""
        at = torch.tensor(list(indices), device=self.psi.device)
        lists = [[values[i] for i in indices] for values in (self.prompt_ids, self.completion_ids, self.finished)]
        return Samples(*lists, **{name: None if v is None else v[at] for name, v in self.tensors().items()})

    def split(self, size: int) -> Iterator[Samples]:
        for indices in _runs(len(self), size):
            yield self.take(indices)

    def to(self, device: torch.device) -> Samples:
        moved = {name: None if value is None else value.to(device) for name, value in self.tensors().items()}
        return Samples(self.prompt_ids, self.completion_ids, self.finished, **moved)

    def tensors(self) -> dict[str, Tensor | None]:
        names = ("group_ids", "psi", "base_logps", "old_logps")
        return {name: getattr(self, name) for name in names}

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.completion_ids]


def _runs(count: int, size: int) -> list[Sequence[int]]:
    """0, 1, ... count - 1 in runs of ``size``."""
    return [range(count)[start : start + size] for start in range(0, count, size)]


def _in_order(values: Sequence[Tensor], parts: Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> Tensor:
    """Results of micro-batches ``parts`` in the order of the sequences; (B,), or (N,) with ``lengths`` (B,) tokens."""
    joined, sequences = torch.cat(list(values)), [i for part in parts for i in part]
    pieces = joined.split([1 if lengths is None else lengths[i] for i in sequences])
    return torch.cat([piece for _, piece in sorted(zip(sequences, pieces, strict=True), key=lambda pair: pair[0])])


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

    def forward(self, batch: Batch, *, temperature: float, need_entropy: bool = False) -> PolicyOutput:
        learned = self.log_z_head is not None
        out = self.scorer(batch, temperature=temperature, need_entropy=need_entropy, pool_prompt=learned)
        # Not a view: FSDP2 warns of those among the outputs of what it wraps.
        log_z = self.log_z_head(out.pooled_prompt).clone() if learned else None
        return PolicyOutput(out.logps, out.entropy, log_z)


class StepSums(NamedTuple):
    """Results of a step, the loss summed and the others in the order of its sequences; (B,) each, detached."""

    loss: Tensor
    delta: Tensor
    weight: Tensor
    logp_mean: Tensor
    log_z: Tensor
    token_logps: Tensor
    """(N,) log-prob of each completion token under the policy before this step."""
    entropy: Tensor | None
    """(N,) per token."""


def fitting_memory(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of :class:`Updater` that starts afresh, with micro-batches half as large, where they do not fit.

    They stay small for the rest of the run. What the failed attempt added to ``.grad`` is dropped, so that nothing is
    counted twice; ``.grad`` must be empty when the method is called.
    """

    @functools.wraps(method)
    def repeated(self: Updater, samples: Samples, **options: Any) -> Any:
        while True:
            try:
                return method(self, samples, **options)
            except torch.OutOfMemoryError as error:
                cause = str(error).partition("\n")[0]
            # Out here, where the exception no longer holds the tensors of its frames.
            self.shrink(cause)

    return repeated


class Updater:
    """Scores rollouts and computes the gradient of one step; owns no optimiser and no data.

    Args:
        policy: the module that ``accelerator.prepare`` returned for a :class:`Policy`.
        accelerator: for autocast, backward and gradient synchronisation.
        pad_id: any token id; padding is masked.
        packing: the attention of packed rows, from :func:`choose_packing`; None: rows are padded.
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
        packing: str | None = None,
    ):
        self.policy, self.base, self.accelerator = policy, base, accelerator
        self.config, self.alpha, self.pad_id, self.packing = config, alpha, pad_id, packing
        self._break_even = break_even(base.scorer.model, packing) if packing else None
        self.micro_batch_size, self.max_tokens = config.per_device_train_batch_size, config.max_tokens_per_batch
        self._ratio = {"clip": config.importance_clip, "importance_level": config.importance_level}
        self._warned = False

    # Micro-batches

    def _micro_batches(self, samples: Samples, *, whole_groups: bool = False) -> list[Sequence[int]]:
        """Numbers of the sequences of each micro-batch; equally many micro-batches on all devices.

        A sharded model gathers its weights in each forward, on all devices at once.
        """
        if self.max_tokens is None:
            return _runs(len(samples), self.micro_batch_size)
        units = _runs(len(samples), self.config.num_generations if whole_groups else 1)
        sizes = self._tokens(samples, units)
        if not self._warned and not whole_groups and max(sizes) > self.max_tokens:
            self._warned = True
            logger.warning(
                "a sequence of %d tokens, prompt and completion, exceeds max_tokens_per_batch=%d; such a sequence "
                "gets a micro-batch of its own",
                max(sizes),
                self.max_tokens,
            )
        batches = token_batches(sizes, self.max_tokens, padded=not self.packing)
        if (most := self._most(len(batches))) > len(batches):
            batches = token_batches(sizes, self.max_tokens, padded=not self.packing, at_least=most)
        return [sorted(i for unit in batch for i in units[unit]) for batch in batches]

    def _tokens(self, samples: Samples, units: Sequence[Sequence[int]]) -> list[int]:
        """Tokens that the model runs on for each of ``units``, padding included where rows are padded."""
        lengths = [len(p) + len(c) for p, c in zip(samples.prompt_ids, samples.completion_ids, strict=True)]
        if self.packing:
            return [sum(lengths[i] for i in unit) for unit in units]
        return [len(unit) * max(lengths[i] for i in unit) for unit in units]

    def _groups_fit(self, samples: Samples) -> bool:
        """Whether micro-batches can hold whole groups, which give their own log Z'; the same on all devices."""
        k = self.config.num_generations
        if self.max_tokens is None:
            return self.micro_batch_size % k == 0
        return self._most(max(self._tokens(samples, _runs(len(samples), k)))) <= self.max_tokens

    def _most(self, number: int) -> int:
        """The largest ``number`` of all devices."""
        if self.accelerator.num_processes == 1:
            return number
        return int(self.accelerator.gather(torch.tensor([number], device=self.accelerator.device)).max())

    def _batch(self, samples: Samples, part: Sequence[int]) -> Batch:
        ids = [samples.prompt_ids[i] for i in part], [samples.completion_ids[i] for i in part]
        if self.packing:
            batch = pack_batch(*ids, break_even=self._break_even, max_tokens=self.max_tokens)
        else:
            batch = pad_batch(*ids, self.pad_id)
        self._tried = len(part), batch.input_ids.numel(), [len(rows[-1]) for rows in ids]
        return batch.to(self.accelerator.device)

    def shrink(self, cause: str) -> None:
        """Halve the micro-batches and empty ``.grad``; :class:`DeviceMemoryError` where that cannot help."""
        count, tokens, (prompt, completion) = self._tried
        where = f"does not fit into the memory of {self.accelerator.device}: {cause}."
        if count == 1:
            raise DeviceMemoryError(
                f"a single sequence of {prompt} prompt and {completion} completion tokens {where} Lower "
                "max_completion_length or max_prompt_length, set activation_checkpointing=True or base='cpu', or "
                "use_peft=True"
            )
        if self.max_tokens is None:
            self.micro_batch_size = count // 2
            accumulation = -(-self.config.gradient_accumulation_steps * count // self.micro_batch_size)
            remedy = f"per_device_train_batch_size={self.micro_batch_size}, gradient_accumulation_steps={accumulation}"
        else:
            self.max_tokens = min(self.max_tokens, tokens) // 2
            remedy = f"max_tokens_per_batch={self.max_tokens}"
        if self.accelerator.num_processes > 1:
            # The others are in the middle of this step and would wait for a part of it that never comes.
            raise DeviceMemoryError(f"a micro-batch of {count} sequences, {tokens} tokens, {where} Set {remedy}")
        self.policy.zero_grad(set_to_none=True)
        if self.accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory with micro-batches of %d sequences, %d tokens (%s): the step starts afresh with %s, as will "
            "all later ones",
            count,
            tokens,
            cause,
            remedy,
        )

    def _attention(self) -> AbstractContextManager[None]:
        """Around forward and backward passes: a checkpointed layer is run again in the latter."""
        if not self.packing:
            return nullcontext()
        return attending(self.base.alike(self.accelerator.unwrap_model(self.policy).scorer), self.packing)

    # Scores and the gradient

    @fitting_memory
    def score_base(self, samples: Samples) -> Tensor:
        """(B,) sums of log-probs under p_base."""
        parts = self._micro_batches(samples)
        with self.accelerator.autocast(), self._attention():
            sums = [self.base.score(self._batch(samples, p), temperature=self.config.temperature) for p in parts]
        return _in_order(sums, parts)

    @fitting_memory
    @torch.no_grad()
    def score_policy(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """(N,) packed log-probs under the policy as it is now, and their (B + 1,) int32 boundaries."""
        parts = self._micro_batches(samples)
        with self._attention(), self.accelerator.autocast():
            out = [self.policy(self._batch(samples, p), temperature=self.config.temperature) for p in parts]
        lengths = torch.tensor([0, *samples.lengths]).cumsum(0)
        logps = _in_order([o.logps.float() for o in out], parts, samples.lengths)
        return logps, lengths.int().to(self.accelerator.device)

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

    @fitting_memory
    def gradient(self, samples: Samples, *, on_policy: bool, need_entropy: bool) -> StepSums:
        """Add the step's gradient to ``.grad``; ``samples`` are this device's share of the step, w = 1 if on-policy."""
        config, accelerator = self.config, self.accelerator
        with_tokens = torch.tensor(sum(length > 0 for length in samples.lengths), device=accelerator.device)
        total = int(accelerator.reduce(with_tokens, reduction="sum"))
        log_z_of_step = None
        # Whole groups in each micro-batch give their own log Z'; otherwise the step scores its sequences first.
        whole_groups = config.log_z == "group" and self._groups_fit(samples)
        if config.log_z == "group" and not whole_groups:
            log_z_of_step = self._group_log_z(samples, *self.score_policy(samples), on_policy)
        parts = self._micro_batches(samples, whole_groups=whole_groups)
        results = []
        for number, indices in enumerate(parts):
            last = number == len(parts) - 1
            part = samples.take(indices)
            with nullcontext() if last else accelerator.no_sync(self.policy), self._attention():
                batch = self._batch(samples, indices)
                with accelerator.autocast():
                    out = self.policy(batch, temperature=config.temperature, need_entropy=need_entropy)
                logps = out.logps.float()
                if config.log_z == "learned":
                    log_z = out.log_z.float()
                elif log_z_of_step is None:
                    log_z = self._group_log_z(part, logps.detach(), batch.cu_seqlens, on_policy)
                else:
                    log_z = log_z_of_step[torch.tensor(list(indices), device=log_z_of_step.device)]
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
            per_sequence = (result.loss.detach(), result.delta, result.weight, result.logp_mean, log_z.detach())
            results.append((*per_sequence, logps.detach(), out.entropy))
        loss, *per_sequence, token_logps, entropy = zip(*results, strict=True)
        return StepSums(
            torch.stack(loss).sum(),
            *(_in_order(values, parts) for values in per_sequence),
            _in_order(token_logps, parts, samples.lengths),
            _in_order(entropy, parts, samples.lengths) if need_entropy else None,
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
        totals += [lengths.new_tensor(n, dtype=torch.float64) for n in repeated_ngrams(samples.completion_ids)]
        totals = self.accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        *means, count, entropy, tokens, repeated, grams = totals
        metrics = {name: total / max(count, 1) for name, total in zip(per_sequence, means, strict=True)}
        return metrics | {"entropy": entropy / max(tokens, 1), "repetition": repeated / max(grams, 1)}
