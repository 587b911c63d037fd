"""PowerFlow's trainer for verl: its synchronous PPO trainer with LA-TB targets in the place of advantages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transfer_queue as tq
from omegaconf import DictConfig
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.utils.padding import response_to_nested

from ..rewards.formats import format_penalties
from .verl_loss import PowerFlowTargets, powerflow_targets
from .verl_settings import PowerFlowSettings

__all__ = ["PowerFlowTrainer"]


class PowerFlowTrainer(PPOTrainerSync):
    """``trainer.v1.trainer_mode=powerflow``: rollouts, log-probs of actor and reference, and updates are verl's own.

    The only step that differs is the one that makes advantages: it has the log-probs of whole groups under the actor
    (s) and under the reference at the sampling temperature (r), and writes ``α (r + ψ) − log Z'``, which the policy
    loss ``powerflow`` subtracts from the s of the moment. The configuration is checked before anything is started.
    """

    def __init__(self, config: DictConfig):
        self.powerflow = PowerFlowSettings.from_config(config)
        # The base classes ask for the mode by name: any other than "sync" gets the replay buffer, the checkpoints and
        # the settings of the asynchronous trainers.
        config.trainer.v1.trainer_mode = "sync"
        super().__init__(config=config)

    def _compute_advantage(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        """Write the targets of the batch as its advantages (and returns, which verl logs)."""
        fields = ["uid", "response_mask", "old_log_probs", "ref_log_prob"]
        if self.powerflow.format_fn is not None:
            fields += ["raw_prompt", "responses"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        nested_mask = data["response_mask"]
        mask = nested_mask.to_padded_tensor(0).bool()
        old, ref = (data[name].to_padded_tensor(0.0) for name in ("old_log_probs", "ref_log_prob"))
        _, group_ids = np.unique(np.array(_to_list(data["uid"]), dtype=str), return_inverse=True)
        psi = self._format_penalties(data, mask)
        targets = powerflow_targets(old, ref, mask, torch.from_numpy(group_ids), alpha=self.powerflow.alpha, psi=psi)
        metrics.update(_metrics(targets, psi, mask.any(-1)))
        advantages = response_to_nested(targets.target[:, None] * mask, nested_mask)
        written = TensorDict({"advantages": advantages, "returns": advantages.clone()}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=written)

    def _format_penalties(self, data: TensorDict, mask: Tensor) -> Tensor:
        """(B,) ψ of the responses as text; rows without response tokens are verl's padding."""
        psi = torch.zeros(len(mask))
        if self.powerflow.format_fn is None:
            return psi
        rows = mask.any(-1).nonzero()[:, 0].tolist()
        prompts, responses = _to_list(data["raw_prompt"]), data["responses"].unbind()
        penalties = format_penalties(
            self.powerflow.format_fn,
            [prompts[row] for row in rows],
            [self.tokenizer.decode(responses[row], skip_special_tokens=True) for row in rows],
            [{}] * len(rows),
            penalty=self.powerflow.format_penalty,
        )
        psi[rows] = torch.tensor(penalties)
        return psi


def _to_list(values: Any) -> Sequence[Any]:
    """A non-tensor field of a batch as a list: the TransferQueue returns an array, a stack, or a list of its own."""
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _metrics(targets: PowerFlowTargets, psi: Tensor, has_tokens: Tensor) -> dict[str, float]:
    """Means over the completions of a step, at its start. ``residual_abs`` is |δ|, ``residual_squared`` the loss."""
    delta = targets.logp_mean - targets.target
    values = {
        "log_z": targets.log_z,
        "logp_mean": targets.logp_mean,
        "base_logp_mean": targets.base_mean,
        "psi": psi,
        "residual_abs": delta.abs(),
        "residual_squared": delta.square(),
    }
    return {f"powerflow/{name}": float(value[has_tokens].mean()) for name, value in values.items()}
