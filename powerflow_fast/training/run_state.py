"""What a checkpoint of a run holds, and when it may be continued."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.folder import latest_checkpoint, load_checkpoint, rotate, save_checkpoint
from ..checkpoints.optimizer_state import optimizer_from_tensors, optimizer_to_tensors
from ..config.options import PowerFlowConfig
from ..errors import CheckpointError
from ..models.sharding import laid_out_as, whole
from ..tools.random_state import get_rng_state, set_rng_state
from .policy import Policy
from .samples import Samples

logger = logging.getLogger(__name__)


def find_checkpoint(config: PowerFlowConfig) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` asks for, or None to start at step 0.

    ``True`` means the newest complete one in ``output_dir``; a run that was killed before its first checkpoint starts
    anew, which repeats the same numbers. A folder that is named must hold one.
    """
    wanted = config.resume_from_checkpoint
    if wanted is None or wanted is False:
        return None
    if wanted is True:
        if not Path(config.output_dir).is_dir():
            raise CheckpointError(
                f"resume_from_checkpoint=True, but output_dir {config.output_dir} does not exist: there is no run to "
                "continue; leave resume_from_checkpoint out to start one"
            )
        return latest_checkpoint(config.output_dir)
    path = Path(wanted)
    if path.is_dir() and not (path / "state.json").exists() and latest_checkpoint(path) is not None:
        return latest_checkpoint(path)  # the folder of a run instead of one of its checkpoints
    return path


class RunState:
    """Saves and restores trained weights, optimiser, schedule, random state and an unfinished rollout.

    Args:
        identity: what makes this run this run besides its config (prompts, base weights, number of processes): any
            JSON value. A checkpoint with another identity is refused.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        config: PowerFlowConfig,
        identity: dict[str, Any],
    ):
        self.policy, self.optimizer, self.scheduler = policy, optimizer, scheduler
        self.config, self.identity = config, identity
        self.counters: dict[str, Any] = {}
        """JSON that the trainer counts with: saved and restored as it is."""
        self.attached: dict[str, Any] = {}
        """Each process's objects by name, whose ``state_dict() -> (tensors, JSON)`` goes into checkpoints."""

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    def save(self, output_dir: Path, step: int, samples: Samples | None, accelerator: Any) -> None:
        """Write ``checkpoint-<step>``; ``samples`` are each process's, of a rollout that later steps still train on."""
        from accelerate.utils import gather_object

        rollouts = gather_object([None if samples is None else samples.to(torch.device("cpu"))])
        attached = gather_object([{name: thing.state_dict() for name, thing in self.attached.items()}])
        weights = self._trained()
        moments, optimizer_meta = optimizer_to_tensors(self.optimizer, weights)
        weights, moments = whole(weights), whole(moments)
        if accelerator.is_main_process:
            tensors = {"weights": weights, "optimizer": moments, "rng": get_rng_state()}
            state = {
                "step": step,
                "config": self.config.fingerprint_fields(),
                "identity": self.identity,
                "optimizer": optimizer_meta,
                "scheduler": self.scheduler.state_dict(),
                "counters": self.counters,
                "rollouts": [],
                "attached": [{name: meta for name, (_, meta) in part.items()} for part in attached],
            }
            for name in self.attached:
                parts = [part[name][0] for part in attached]
                tensors[name] = {f"{rank}.{k}": v for rank, part in enumerate(parts) for k, v in part.items()}
            if samples is not None:
                tensors["rollouts"] = {}
                for rank, part in enumerate(rollouts):
                    state["rollouts"].append([part.prompt_ids, part.completion_ids, part.finished])
                    tensors["rollouts"] |= {f"{rank}.{k}": v for k, v in part.tensors().items() if v is not None}
            save_checkpoint(output_dir / f"checkpoint-{step}", tensors=tensors, state=state)
            rotate(output_dir, self.config.save_total_limit)
        accelerator.wait_for_everyone()

    def load(self, path: Path, rank: int) -> tuple[int, Samples | None]:
        """Restore everything in place; return the step and this process's unfinished rollout, if there was one."""
        tensors, state = load_checkpoint(path)
        self._check(path, state)
        trained = self._trained()
        if trained.keys() != tensors["weights"].keys():
            odd = sorted(trained.keys() ^ tensors["weights"].keys())[0]
            raise CheckpointError(f"{path}: its trained weights are not this model's: {odd} is only in one of the two")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(laid_out_as(tensors["weights"][name], parameter))
        optimizer_from_tensors(self.optimizer, trained, tensors["optimizer"], state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        set_rng_state(tensors["rng"])
        self.counters = state.get("counters", {})
        self._load_attached(path, tensors, state.get("attached", []), rank)
        if not state["rollouts"]:
            return state["step"], None
        prefix = f"{rank}."
        fixed = {k.removeprefix(prefix): v for k, v in tensors["rollouts"].items() if k.startswith(prefix)}
        device = next(iter(trained.values())).device
        return state["step"], Samples(*state["rollouts"][rank], **fixed).to(device)

    def _load_attached(self, path: Path, tensors: dict[str, Any], states: list[dict[str, Any]], rank: int) -> None:
        if not self.attached:
            return
        if rank >= len(states) or len(states) != self.identity.get("num_processes", len(states)):
            raise CheckpointError(
                f"{path}: holds {', '.join(self.attached)} of {len(states)} processes, this run has "
                f"{self.identity.get('num_processes')}; resume with as many"
            )
        for name, thing in self.attached.items():
            prefix = f"{rank}."
            own = {k.removeprefix(prefix): v for k, v in tensors[name].items() if k.startswith(prefix)}
            thing.load_state_dict(own, states[rank][name])

    def _check(self, path: Path, state: dict[str, Any]) -> None:
        saved, identity = state["config"], dict(self.identity)
        before, now = state["identity"].get("num_processes"), identity.get("num_processes")
        if before != now and before and now and not state["rollouts"]:
            del identity["num_processes"]
            here = self.config.fingerprint_fields()
            sizes = ("per_device_train_batch_size", "gradient_accumulation_steps")
            if before * math.prod(saved[name] for name in sizes) == now * math.prod(here[name] for name in sizes):
                saved = saved | {name: here[name] for name in sizes}  # as many sequences per step as before
            logger.warning(
                "%s was written by %s processes, this run has %s: it continues with their share of prompts and seeds, "
                "not with the numbers that the first run would have had",
                *(path, before, now),
            )
        differences = self.config.diff_for_resume(saved)
        for name, here in identity.items():
            if state["identity"].get(name) != here:
                differences.append(f"{name}: checkpoint has {state['identity'].get(name)!r}, this run has {here!r}")
        if differences:
            raise CheckpointError(
                f"{path}: belongs to a run with other settings, which would not continue but change it:\n  "
                + "\n  ".join(differences)
                + "\nRepeat that run's settings, or start a new run in another output_dir"
            )
