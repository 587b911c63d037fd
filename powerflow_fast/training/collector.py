"""Making the samples that steps train on: prompts, completions, penalties, rewards, and the scores that stay fixed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config.options import PowerFlowConfig
from ..data import PromptDataset, prompt_indices
from ..errors import RolloutError
from ..models.sharding import gathered
from ..ops.logprobs import LogprobStats
from ..rewards.formats import FormatFn, format_penalties
from ..rewards.reward import RewardInputs, RewardSum
from ..rollout.engine import Rollout, RolloutEngine
from ..tools.random_state import seed_of
from .policy import Policy
from .replay import ReplayBatch, ReplayBuffer
from .samples import Samples
from .update import Updater


class Collected(NamedTuple):
    samples: Samples
    engine_logps: list[list[float]] | None
    """Of each token, by the engine, where the engine is the policy and gave them."""
    indices: list[int]
    """Of the prompts in the dataset, once for each group."""
    texts: list[str]


class Collector:
    """Samples from the policy, and from what it drew earlier.

    Args:
        encode: token ids of the prompt with this index.
        engine: what samples.
        external: the engine is the caller's and need not sample the policy: its own log-probs make the ratio.
        buffer: keeps what was drawn, for :meth:`replay`.
    """

    def __init__(
        self,
        config: PowerFlowConfig,
        accelerator: Any,
        *,
        dataset: PromptDataset,
        encode: Callable[[int], list[int]],
        tokenizer: Any,
        engine: RolloutEngine,
        external: bool,
        policy: Policy,
        updater: Updater,
        format_fn: FormatFn | None,
        reward: RewardSum | None,
        buffer: ReplayBuffer | None,
    ):
        self.config, self.accelerator, self.dataset, self.encode = config, accelerator, dataset, encode
        self.tokenizer, self.engine, self.external = tokenizer, engine, external
        self.policy, self.updater, self.buffer = policy, updater, buffer
        self.format_fn, self.reward = format_fn, reward
        self.world, self.rank = accelerator.num_processes, accelerator.process_index

    @property
    def samples_policy(self) -> bool:
        """The first step on a rollout is on-policy: it is of the policy as it is, at the temperature of the scores."""
        return not (self.external or self.config.use_rollout_logps or self.config.rollout_temperature)

    def collect(self, number: int, step: int, timings: dict[str, float]) -> Collected:
        """This device's share of rollout ``number``, drawn from the weights after ``step`` steps, with its scores."""
        config, k = self.config, self.config.num_generations
        started = time.perf_counter()
        count = config.prompts_per_generation(self.world)
        indices = prompt_indices(number, count, len(self.dataset), config.seed)
        share = len(indices) // self.world
        indices = indices[self.rank * share : (self.rank + 1) * share] if self.world > 1 else indices
        prompts = [ids for i in indices for ids in [self.encode(i)] * k]
        with gathered(self.policy):
            rollout = self.draw(prompts, number, self.rank, step)
        timings["rollout"] = time.perf_counter() - started
        started = time.perf_counter()
        texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        samples = Samples(
            rollout.prompt_ids,
            rollout.completion_ids,
            rollout.finished,
            group_ids=torch.arange(len(indices)).repeat_interleave(k),
            psi=self._format_penalties(indices, texts),
        ).to(self.accelerator.device)
        samples.base_logps = self.updater.score_base(samples)
        stats = self._behaviour(samples, rollout)
        if self.reward is not None:
            samples.rewards = self._rewards(samples, indices, texts, stats)
        if self.buffer is not None:
            self.buffer.add(_to_buffer(samples), step=step)
        timings["score"] = time.perf_counter() - started
        return Collected(samples, rollout.logps if not self.external else None, indices, texts)

    def replay(self, num_groups: int) -> Samples:
        """Groups of this and earlier rollouts, with the log-probs that they were drawn with."""
        batch = self.buffer.sample(num_groups)
        tensors = {name: getattr(batch, name) for name in ("group_ids", "psi", "base_logps", "old_logps", "rewards")}
        return Samples(batch.prompt_ids, batch.completion_ids, batch.finished, **tensors).to(self.accelerator.device)

    def draw(self, prompts: list[list[int]], number: int, rank: int, step: int) -> Rollout:
        """Completions from the weights as they are after ``step`` steps, and from no older ones."""
        self.engine.sync(step)
        needed = self.external or self.config.use_rollout_logps
        seed = seed_of(self.config.seed, number, rank)
        rollout = self.engine.generate(prompts, seed=seed, return_logps=needed or self.engine.logps_are_free)
        if rollout.weight_version != step:
            raise RolloutError(
                f"train: the {self.engine.name} engine sampled from the weights of step {rollout.weight_version}, "
                f"not of step {step}"
            )
        if needed and rollout.logps is None:
            raise RolloutError(
                f"train: the {self.engine.name} engine gave no log-probs of its tokens; the importance ratio needs them"
            )
        return rollout

    def _behaviour(self, samples: Samples, rollout: Rollout) -> LogprobStats | None:
        """Set ``old_logps`` where steps need them; statistics of the policy's distributions where the reward does."""
        config = self.config
        need_stats = self.reward is not None and self.reward.needs_stats
        need_old = config.updates_per_generation > 1 or self.updater.objective.needs_old_logps
        scores = None
        if need_stats or (need_old and self.samples_policy):
            scores = self.updater.score_policy(samples, need_stats=need_stats)
        if self.external or config.use_rollout_logps:
            logps = [logp for row in rollout.logps for logp in row]
            if [len(row) for row in rollout.logps] != samples.lengths:
                raise RolloutError(
                    f"train: the {self.engine.name} engine must give a log-prob for each token, {sum(samples.lengths)} "
                    f"in all, got {len(logps)}"
                )
            samples.old_logps = torch.tensor(logps, dtype=torch.float32, device=samples.psi.device)
        elif config.rollout_temperature:
            samples.old_logps = self.updater.score_policy(samples, temperature=config.rollout_temperature).logps
        elif need_old:
            samples.old_logps = scores.logps
        return scores.stats if need_stats else None

    def _rows(self, indices: list[int]) -> list[Any]:
        return [self.dataset[i] for i in indices for _ in range(self.config.num_generations)]

    def _format_penalties(self, indices: list[int], texts: list[str]) -> Tensor:
        rows = self._rows(indices)
        prompts, columns = [row.prompt for row in rows], [row.extra for row in rows]
        psi = format_penalties(self.format_fn, prompts, texts, columns, penalty=self.config.format_penalty)
        return torch.tensor(psi, dtype=torch.float32)

    def _rewards(self, samples: Samples, indices: list[int], texts: list[str], stats: LogprobStats | None) -> Tensor:
        rows = self._rows(indices)
        names = ("entropy", "lse", "mean_logit")
        of_tokens = {} if stats is None else {name: getattr(stats, name).cpu() for name in names}
        inputs = RewardInputs(
            prompts=[row.prompt for row in rows],
            completions=texts,
            columns=[row.extra for row in rows],
            group_ids=samples.group_ids.cpu(),
            cu_seqlens=samples.cu_seqlens.cpu(),
            finished=samples.finished,
            completion_ids=samples.completion_ids,
            **of_tokens,
        )
        return self.reward(inputs).to(samples.psi.device)


def _to_buffer(samples: Samples) -> ReplayBatch:
    lists = (samples.prompt_ids, samples.completion_ids, samples.finished)
    return ReplayBatch(*lists, **samples.tensors()).to("cpu")
