"""One optimiser step: scores of a rollout, and the gradient of an objective summed over micro-batches.

Nothing here depends on how sequences are cut into micro-batches: means are over the sequences or tokens of the whole
step on all devices, and statistics of a group always come from all of its completions.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config.options import PowerFlowConfig
from ..errors import DeviceMemoryError
from ..models.batches import Batch, pack_batch, pad_batch, runs, token_batches
from ..models.logprob_model import BaseScorer
from ..models.packed_attention import attending, break_even
from ..objectives.log_z import LogZTable
from ..objectives.registry import Objective, resolve_objective
from ..objectives.trajectories import ObjectiveOutput, Trajectories
from ..ops.logprobs import LogprobStats
from ..ops.segments import segment_sum
from ..tools.ngrams import repeated_ngrams
from .policy import PolicyOutput
from .samples import Samples

logger = logging.getLogger(__name__)


def _in_order(values: Sequence[Tensor], parts: Sequence[Sequence[int]], lengths: Sequence[int] | None = None) -> Tensor:
    """Results of micro-batches ``parts`` in the order of the sequences; (B,), or (N,) with ``lengths`` (B,) tokens."""
    joined, sequences = torch.cat(list(values)), [i for part in parts for i in part]
    pieces = joined.split([1 if lengths is None else lengths[i] for i in sequences])
    return torch.cat([piece for _, piece in sorted(zip(sequences, pieces, strict=True), key=lambda pair: pair[0])])


class StepSums(NamedTuple):
    """Results of a step, the loss summed and the others in the order of its sequences; (B,) each, detached."""

    loss: Tensor
    weight: Tensor
    logp_mean: Tensor
    token_logps: Tensor
    """(N,) log-prob of each completion token under the policy before this step."""
    delta: Tensor | None
    """As the next two: what the objective has of it, see :class:`ObjectiveOutput`."""
    log_z: Tensor | None
    advantage: Tensor | None
    entropy: Tensor | None
    """(N,) per token."""


class _Step(NamedTuple):
    """A step's loss as a function of its log-probs and log Z, of all sequences at once."""

    output: ObjectiveOutput
    d_logps: Tensor
    """(N,)"""
    d_log_z: Tensor | None
    """(B,)"""


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
        objective: the loss, a name or the result of :func:`resolve_objective`.
        log_z_table: running estimates that stand in for the objective's own, by prompt; see :meth:`commit`.
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
        objective: str | Objective = "la_tb",
        log_z_table: LogZTable | None = None,
    ):
        self.policy, self.base, self.accelerator = policy, base, accelerator
        self.objective, self.log_z_table = resolve_objective(objective), log_z_table
        learned = accelerator.unwrap_model(policy).log_z_head is not None
        self._grouped = self.objective.needs_groups or (self.objective.partition is not None and not learned)
        self._estimates: dict[str, float] = {}
        self.config, self.alpha, self.pad_id, self.packing = config, alpha, pad_id, packing
        self._break_even = break_even(base.scorer.model, packing) if packing else None
        self.micro_batch_size, self.max_tokens = config.per_device_train_batch_size, config.max_tokens_per_batch
        self.steps_made: int | None = None
        """For objectives with a schedule; the trainer counts."""
        self._warned = False

    # Micro-batches

    def _micro_batches(self, samples: Samples, *, whole_groups: bool = False) -> list[Sequence[int]]:
        """Numbers of the sequences of each micro-batch; equally many micro-batches on all devices.

        A sharded model gathers its weights in each forward, on all devices at once.
        """
        if self.max_tokens is None:
            return runs(len(samples), self.micro_batch_size)
        units = runs(len(samples), self.config.num_generations if whole_groups else 1)
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
        return self._most(max(self._tokens(samples, runs(len(samples), k)))) <= self.max_tokens

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
        """(N,) log-probs under p_base."""
        parts = self._micro_batches(samples)
        with self.accelerator.autocast(), self._attention():
            logps = [self.base.score(self._batch(samples, p), temperature=self.config.temperature) for p in parts]
        return _in_order(logps, parts, samples.lengths)

    @fitting_memory
    @torch.no_grad()
    def score_policy(
        self, samples: Samples, *, temperature: float | None = None, need_stats: bool = False
    ) -> PolicyOutput:
        """Of the policy as it is now, in the order of the sequences; at ``config.temperature`` if none is given."""
        parts = self._micro_batches(samples)
        options = {"temperature": temperature or self.config.temperature, "need_stats": need_stats}
        with self._attention(), self.accelerator.autocast():
            out = [self.policy(self._batch(samples, p), **options) for p in parts]
        logps = _in_order([o.logps.float() for o in out], parts, samples.lengths)
        stats = log_z = None
        if need_stats:
            stats = LogprobStats(
                *(_in_order(v, parts, samples.lengths) for v in zip(*(o.stats for o in out), strict=True))
            )
        if out[0].log_z is not None:
            log_z = _in_order([o.log_z.float() for o in out], parts)
        return PolicyOutput(logps, stats, log_z)

    def mean_target(self, samples: Samples) -> float:
        """The log Z that a constant would fit best: the mean over the sequences of all devices of log R − log π, per
        token where the objective's log Z is; with log R = α (log p_base + ψ |y|)."""
        logps = self.score_policy(samples).logps
        return self._mean_log_z(samples, logps, self.alpha)

    def change_alpha(self, alpha: float, samples: Samples) -> None:
        """Go on with another exponent. A learned or tabled log Z moves with it, as its best constant does for
        completions like ``samples``: by the change of alpha times their mean of log p_base + ψ |y|."""
        estimates = [self.accelerator.unwrap_model(self.policy).log_z_head, self.log_z_table]
        if any(estimate is not None for estimate in estimates):
            change = self._mean_log_z(samples, torch.zeros_like(samples.base_logps), alpha - self.alpha)
            for estimate in estimates:
                if estimate is not None and math.isfinite(change):
                    estimate.shift(change)
        self.alpha = alpha

    def _mean_log_z(self, samples: Samples, logps: Tensor, alpha: float) -> float:
        lengths = torch.tensor(samples.lengths, device=self.accelerator.device)
        excess = segment_sum(alpha * samples.base_logps.double() - logps.double(), samples.cu_seqlens)
        target = excess + alpha * samples.psi * lengths
        if self.objective.partition == "per_token":
            target = target / lengths.clamp(min=1)
        kept = lengths > 0
        total = torch.stack([target[kept].sum(), kept.sum().to(target.dtype)]).float()
        total = self.accelerator.reduce(total, reduction="sum")
        return float(total[0] / total[1].clamp_min(1))

    @fitting_memory
    def gradient(self, samples: Samples, *, on_policy: bool, need_entropy: bool) -> StepSums:
        """Add the step's gradient to ``.grad``; ``samples`` are this device's share of the step, w = 1 if on-policy."""
        accelerator = self.accelerator
        counts = torch.tensor([sum(n > 0 for n in samples.lengths), sum(samples.lengths)], device=accelerator.device)
        sequences, tokens = accelerator.reduce(counts, reduction="sum").tolist()
        terms = {"on_policy": on_policy, "num_sequences": max(sequences, 1), "num_tokens": max(tokens, 1)}
        terms["step"] = self.steps_made
        self._estimates.clear()
        # Whole groups in each micro-batch give their own statistics; otherwise the step scores its sequences first.
        whole_groups = self._grouped and self._groups_fit(samples)
        step = self._whole_step(samples, **terms) if self._grouped and not whole_groups else None
        parts = self._micro_batches(samples, whole_groups=whole_groups)
        results, token_logps, entropy = [], [], []
        for number, indices in enumerate(parts):
            last = number == len(parts) - 1
            part = samples.take(indices)
            with nullcontext() if last else accelerator.no_sync(self.policy), self._attention():
                batch = self._batch(samples, indices)
                with accelerator.autocast():
                    out = self.policy(batch, temperature=self.config.temperature, need_stats=need_entropy)
                logps = out.logps.float()
                log_z = None if out.log_z is None else out.log_z.float()
                if step is None:
                    results.append(self._objective(part, batch.cu_seqlens, logps, log_z, **terms))
                    loss = results[-1].loss
                else:
                    loss = _surrogate(step, samples, indices, logps, log_z)
                # Data-parallel wrappers average gradients over devices; the loss is a share of one global mean.
                accelerator.backward(loss * accelerator.num_processes)
            token_logps.append(logps.detach())
            entropy.append(out.stats.entropy if need_entropy else None)
        if step is None:
            columns = {name: [getattr(r, name) for r in results] for name in ObjectiveOutput._fields}
            loss = torch.stack([value.detach() for value in columns.pop("loss")]).sum()
            output = {k: None if v[0] is None else _in_order(v, parts) for k, v in columns.items()}
        else:
            output = step.output._asdict()
            loss = output.pop("loss").detach()
        return StepSums(
            loss=loss,
            token_logps=_in_order(token_logps, parts, samples.lengths),
            entropy=_in_order(entropy, parts, samples.lengths) if need_entropy else None,
            **output,
        )

    def _objective(
        self,
        samples: Samples,
        cu_seqlens: Tensor,
        logps: Tensor,
        log_z: Tensor | None,
        *,
        on_policy: bool,
        **numbers: int | None,
    ) -> ObjectiveOutput:
        trajectories = Trajectories(
            logps=logps,
            base_logps=samples.base_logps,
            cu_seqlens=cu_seqlens,
            alpha=self.alpha,
            log_z=log_z if self.objective.partition is not None else None,
            group_ids=samples.group_ids,
            psi=samples.psi,
            rewards=samples.rewards,
            old_logps=None if on_policy else samples.old_logps,
            clip=self.config.importance_clip,
            importance_level=self.config.importance_level,
            **numbers,
        )
        if self.log_z_table is not None:
            # Read before it is updated: the estimate is then independent of these very completions.
            own = self.objective(replace(trajectories, logps=logps.detach())).log_z
            keys = [_key(ids) for ids in samples.prompt_ids]
            self._estimates |= {k: v for k, v, n in zip(keys, own.tolist(), samples.lengths, strict=True) if n}
            trajectories = replace(trajectories, log_z=self.log_z_table.get(keys, own))
        return self.objective(trajectories)

    def _whole_step(self, samples: Samples, **terms: Any) -> _Step:
        """The derivatives of the step's loss by its log-probs, which the micro-batches then pass on to the weights."""
        scores = self.score_policy(samples)
        leaves = [t.requires_grad_() for t in (scores.logps, scores.log_z) if t is not None]
        with torch.enable_grad():
            output = self._objective(samples, samples.cu_seqlens, scores.logps, scores.log_z, **terms)
            gradients = torch.autograd.grad(output.loss, leaves, allow_unused=True, materialize_grads=True)
        return _Step(output, gradients[0], gradients[1] if len(leaves) > 1 else None)

    def commit(self) -> None:
        """Let the step's estimates of log Z into the table, those of all devices."""
        if self.log_z_table is None:
            return
        from accelerate.utils import gather_object

        estimates = [pair for part in gather_object([list(self._estimates.items())]) for pair in part]
        self.log_z_table.update([key for key, _ in estimates], torch.tensor([value for _, value in estimates]))

    def metrics(self, samples: Samples, sums: StepSums) -> dict[str, float]:
        """Means over the sequences (entropy: tokens) of all devices; names as in ``report.METRICS``."""
        device = self.accelerator.device
        lengths = torch.tensor(samples.lengths, device=device)
        kept = lengths > 0
        low, high = self.config.importance_clip
        per_sequence = {
            "policy_logp": sums.logp_mean,
            "base_logp": segment_sum(samples.base_logps.double(), samples.cu_seqlens) / lengths.clamp_min(1),
            "length": lengths.float(),
            "finished": torch.tensor(samples.finished, device=device).float(),
            "format_ok": (samples.psi == 0).float(),
            "importance_weight": sums.weight,
            "clip_fraction": ((sums.weight <= low) | (sums.weight >= high)).float(),
        }
        own = {"delta_abs": sums.delta, "log_z": sums.log_z, "advantage_abs": sums.advantage, "reward": samples.rewards}
        per_sequence |= {k: v.abs() if k.endswith("_abs") else v for k, v in own.items() if v is not None}
        totals = [value[kept].double().sum() for value in per_sequence.values()]
        totals += [kept.sum().double(), sums.entropy.double().sum(), lengths.sum().double()]
        totals += [lengths.new_tensor(n, dtype=torch.float64) for n in repeated_ngrams(samples.completion_ids)]
        totals = self.accelerator.reduce(torch.stack(totals), reduction="sum").tolist()
        *means, count, entropy, tokens, repeated, grams = totals
        metrics = {name: total / max(count, 1) for name, total in zip(per_sequence, means, strict=True)}
        return metrics | {"entropy": entropy / max(tokens, 1), "repetition": repeated / max(grams, 1)}


def _surrogate(step: _Step, samples: Samples, indices: Sequence[int], logps: Tensor, log_z: Tensor | None) -> Tensor:
    """A number whose gradient by the weights is that of the step's loss through these sequences."""
    pieces = step.d_logps.split(samples.lengths)
    loss = (logps * torch.cat([pieces[i] for i in indices])).sum()
    if step.d_log_z is not None:
        loss = loss + (log_z * step.d_log_z[torch.tensor(list(indices), device=logps.device)]).sum()
    return loss


def _key(prompt_ids: Sequence[int]) -> str:
    """The same for the same prompt, in this run and the next."""
    return hashlib.blake2b(" ".join(map(str, prompt_ids)).encode(), digest_size=12).hexdigest()
