"""PowerFlow inside TRL: ``PowerFlowTRLTrainer`` is TRL's ``GRPOTrainer`` with the LA-TB loss in place of its own.

TRL keeps what it does: data, sampling (generate or vLLM), rewards and tables for the log, accumulation, checkpoints.
What changes: completions are scored with ``linear_logprobs`` under the policy and under the frozen base model, and
``la_tb_loss`` is what is minimised. The methods overridden are those of trl 1.16, the only version accepted.
"""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SUPPORTED = "1.16"

try:
    import trl
except ImportError as error:
    raise ImportError(
        f"powerflow_fast.integrations.trl needs trl {SUPPORTED}.*, which is not installed; run: "
        "pip install 'powerflow_fast[trl]' (trl needs Python >= 3.11)"
    ) from error
if trl.__version__.split(".")[:2] != SUPPORTED.split("."):
    raise ImportError(
        f"powerflow_fast.integrations.trl supports trl {SUPPORTED}.*, found {trl.__version__}: it overrides methods "
        f"that other versions may not have; run: pip install 'trl=={SUPPORTED}.*'"
    )

from safetensors.torch import load_file, save_file  # noqa: E402  (the version is checked first)
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from ..config.options import PowerFlowConfig  # noqa: E402
from ..errors import CheckpointError, ConfigError  # noqa: E402
from ..models.adapters import unwrap_peft  # noqa: E402
from ..models.batches import Batch, pad_batch  # noqa: E402
from ..models.loading import pad_token_id, weights_fingerprint  # noqa: E402
from ..models.logprob_model import CausalLMScorer, make_base  # noqa: E402
from ..models.modes import disable_dropout, evaluating  # noqa: E402
from ..objectives.log_z import LogZHead  # noqa: E402
from ..ops.la_tb import group_log_z, la_tb_loss  # noqa: E402
from ..ops.segments import segment_sum  # noqa: E402
from ..rewards.formats import format_penalties, resolve_format  # noqa: E402
from ..rollout.generate import own_generation_config_aside  # noqa: E402
from ..tools.random_state import seeded  # noqa: E402

__all__ = ["PowerFlowTRLConfig", "PowerFlowTRLTrainer"]

LOG_Z_FILE = "log_z_head.safetensors"
STATE_FILE = "powerflow.json"

_OWN = (
    "alpha",
    "log_z",
    "log_z_learning_rate",
    "log_z_num_layers",
    "format_penalty",
    "importance_level",
    "importance_clip",
    "base",
)
_SAMPLING = "completions must come from the full softmax that is scored; use temperature"
_LOSS = "it belongs to losses that LA-TB replaces"
_RATIO = "importance_clip and importance_level say how stale samples are weighed"
_FIXED: dict[str, tuple[Any, str]] = {
    "top_p": (1.0, _SAMPLING),
    "top_k": (0, _SAMPLING),
    "min_p": (None, _SAMPLING),
    "repetition_penalty": (1.0, _SAMPLING),
    "generation_kwargs": (None, "it overrides the sampling options above"),
    "vllm_structured_outputs_regex": (None, _SAMPLING),
    "use_transformers_continuous_batching": (False, "TRL casts the trained weights to half precision for it"),
    "use_transformers_paged": (False, "TRL casts the trained weights to half precision for it"),
    "disable_dropout": (True, "completions are scored with the distribution they were drawn from, which has none"),
    "beta": (0.0, "the base model enters through alpha, and there is no KL term"),
    "sync_ref_model": (False, "p_base stays the model as it was given"),
    "mask_truncated_completions": (False, "the target covers completions that were cut, too"),
    "top_entropy_quantile": (1.0, "the loss is of whole sequences"),
    "entropy_coef": (0.0, "LA-TB has no entropy term; alpha < 1 is what flattens"),
    "use_adaptive_entropy": (False, "LA-TB has no entropy term; alpha < 1 is what flattens"),
    "router_aux_loss_coef": (0.0, "the loss is LA-TB alone"),
    "loss_type": ("dapo", _LOSS),
    "epsilon": (0.2, _RATIO),
    "epsilon_high": (None, _RATIO),
    "delta": (None, _RATIO),
    "importance_sampling_level": ("token", _RATIO),
    "off_policy_mask_threshold": (None, _RATIO),
    "vllm_importance_sampling_mode": ("sequence_mask", _RATIO),
    "vllm_importance_sampling_clip_max": (3.0, _RATIO),
    "vllm_importance_sampling_clip_min": (None, _RATIO),
    "vllm_importance_sampling_cap": (None, _RATIO),
    "cast_lm_head_to_fp32": (False, "the log-probs are made from fp32 logits anyway"),
    "use_liger_kernel": (False, "TRL applies it after p_base was copied, and base and policy would differ"),
    "torch_compile": (False, "the head's input is taken from inside the model's forward"),
}


def _opt(name: str) -> Any:
    """A field with the default and the help text that :class:`PowerFlowConfig` has for ``name``."""
    own = PowerFlowConfig.__dataclass_fields__[name]
    metadata = {"help": own.metadata["help"]}
    if isinstance(own.default, tuple):  # the command line of transformers knows lists only
        return field(default_factory=lambda: list(own.default), metadata=metadata)
    return field(default=own.default, metadata=metadata)


@dataclass
class PowerFlowTRLConfig(GRPOConfig):
    """``GRPOConfig`` with the options of PowerFlow; ``alpha`` is required.

    The new fields mean what they mean in :class:`powerflow_fast.PowerFlowConfig`. Settings of GRPO that would change
    what is sampled, or that LA-TB would ignore, raise :class:`ConfigError` with the reason (see docs/trl.md).
    """

    alpha: float | None = _opt("alpha")
    log_z: str = _opt("log_z")
    log_z_learning_rate: float = _opt("log_z_learning_rate")
    log_z_num_layers: int = _opt("log_z_num_layers")
    format_penalty: float = _opt("format_penalty")
    importance_level: str = _opt("importance_level")
    importance_clip: list[float] = _opt("importance_clip")  # noqa: RUF009  (a new list for each)
    base: str = _opt("base")
    disable_dropout: bool = field(default=True, metadata={"help": "must stay True"})
    router_aux_loss_coef: float | None = field(default=0.0, metadata={"help": "must stay 0.0"})

    def __post_init__(self) -> None:
        # Before TRL's own checks, which fill in some of these.
        for name, (required, why) in _FIXED.items():
            if getattr(self, name) != required:
                raise _error(f"{name} must be {required!r}, got {getattr(self, name)!r}: {why}")
        own = {name: getattr(self, name) for name in _OWN}
        own["importance_clip"] = tuple(own["importance_clip"])
        PowerFlowConfig(**own, temperature=self.temperature).require_alpha(auto=False)
        super().__post_init__()
        per_process = self.per_device_train_batch_size * self.steps_per_generation
        if self.log_z == "group" and per_process % self.num_generations:
            raise _error(
                f"per_device_train_batch_size x steps_per_generation = {per_process} must be a multiple of "
                f"num_generations={self.num_generations} with log_z='group', so that a process has whole groups"
            )


def _error(message: str) -> ConfigError:
    return ConfigError(f"PowerFlowTRLConfig: {message}")


@dataclass
class _Rollout:
    """What one process sampled in one go, and what stays fixed while it is trained on; B completions of N tokens."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    group_ids: Tensor
    psi: Tensor
    base_logps: Tensor
    """(B,) sums under p_base."""
    old_logps: Tensor | None
    """(B,) sums under what sampled them; None where every update is the first on fresh samples, and w = 1."""
    token_logps: Tensor | None
    """(N,) under the policy of optimiser step ``scored_at``, where they were needed."""
    scored_at: int

    @functools.cached_property
    def cu_seqlens(self) -> Tensor:
        lengths = torch.tensor([0, *map(len, self.completion_ids)])
        return lengths.cumsum(0).int().to(self.psi.device)


class PowerFlowTRLTrainer(GRPOTrainer):
    """Trains a causal LM to sample from p_base(y|q)^alpha, with TRL around it.

    The loss of an optimiser step is the mean of ``la_tb_loss`` over all its sequences, on all processes and in all
    accumulated micro-batches. p_base is the model as it is given here: with its adapter off for a PEFT model, else a
    frozen copy (``args.base``). log Z' is a head with its own learning rate, or the mean over *all* completions of a
    prompt under the policy as it is at that step; TRL deals completions out to micro-batches at random, so for that
    the generation batch is scored once more, unless it is a single micro-batch.

    Args:
        model: as in ``GRPOTrainer``: a name or folder, a ``PreTrainedModel``, or a ``PeftModel``.
        args: a :class:`PowerFlowTRLConfig`.
        format_fn: ``format_fn(prompt, completion, **columns) -> bool``, or the name of a ready-made one; completions
            for which it is False get ``args.format_penalty``. ``prompt`` is as in the data set, ``completion`` text.
        reward_funcs: only logged. Where none is given a constant zero stands in, for TRL insists on one.
        others: as in ``GRPOTrainer``; ``tools``, ``rollout_func`` and ``environment_factory`` are refused.

    Raises:
        ConfigError: a setting that would break the target, named. ModelError: a head that ``linear_logprobs`` cannot
            express.
    """

    _tag_names = ("trl", "powerflow")
    _name = "PowerFlow"
    _paper: dict[str, str] = {}  # noqa: RUF012  (TRL's attribute)

    def __init__(
        self,
        model: str | nn.Module,
        *,
        args: PowerFlowTRLConfig,
        format_fn: str | Callable[..., bool] | None = None,
        reward_funcs: Any = None,
        optimizers: tuple[Any, Any] = (None, None),
        **grpo: Any,
    ):
        op = type(self).__name__
        if not isinstance(args, PowerFlowTRLConfig):
            raise TypeError(f"{op}: args must be a PowerFlowTRLConfig, got {type(args).__name__}")
        for name in ("tools", "rollout_func", "environment_factory"):
            if grpo.get(name) is not None:
                raise ConfigError(f"{op}: {name} is not supported: every completion token must be the policy's own")
        if args.log_z == "learned" and optimizers[1] is not None:
            raise ConfigError(
                f"{op}: optimizers must not bring a scheduler with log_z='learned': it has no learning rate for the "
                "log Z' head; set lr_scheduler_type, or log_z='group'"
            )
        self.format_fn = resolve_format(format_fn)
        self.log_z_head: LogZHead | None = None
        self._psi: list[float] = []
        super().__init__(
            model,
            reward_funcs=[no_reward] if reward_funcs in (None, []) else reward_funcs,
            args=args,
            optimizers=optimizers,
            **grpo,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(f"{op}: FSDP and DeepSpeed are not supported; powerflow_fast.train has fsdp=True")
        if self._is_vlm:
            raise ConfigError(f"{op}: processing_class must be a tokenizer, got {type(self.processing_class).__name__}")
        self._set_up_scoring(args)

    def _set_up_scoring(self, args: PowerFlowTRLConfig) -> None:
        lm = unwrap_peft(self.model)
        disable_dropout(self.model)
        # TRL's forward is bound to the model that is trained; a copy that kept it would be no frozen base.
        patched = vars(lm).pop("forward")
        self._base = make_base(self.model, args.base)
        lm.forward = patched
        self._identity = {
            "alpha": float(args.alpha),
            "temperature": float(args.temperature),
            "log_z": args.log_z,
            "base_model": weights_fingerprint(self._base.scorer.model),
        }
        self._scorer = CausalLMScorer(self.model)
        self._pad_id = pad_token_id(self.processing_class, self.model)
        if args.log_z == "learned":
            with seeded(args.seed, torch.device("cpu")):  # the same head on every process
                self.log_z_head = LogZHead(self._scorer.head.weight.shape[1], num_layers=args.log_z_num_layers)
            self.log_z_head.to(self.accelerator.device)
        self._log_z_started = False
        self._accumulation_starts = True

        # Scoring runs inside the model's own forward: DDP then sees every use of its parameters.
        @functools.wraps(type(lm).forward)
        def forward(_, *inputs: Any, powerflow_batch: Batch | None = None, **options: Any) -> Any:
            if powerflow_batch is None:
                return patched(*inputs, **options)
            pool = self.log_z_head is not None
            return self._scorer(powerflow_batch, temperature=self.temperature, pool_prompt=pool)

        lm.forward = types.MethodType(forward, lm)

    # Sampling and scoring, once per generation batch

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with own_generation_config_aside(unwrap_peft(self.model)):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, inputs: list[dict], prompts: list, completions: list, completion_ids: list) -> Tensor:
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        self._psi = format_penalties(self.format_fn, prompts, texts, inputs, penalty=self.args.format_penalty)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids)

    def _get_per_token_logps_and_entropies(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, **_: Any
    ) -> tuple[Tensor, None, None]:
        """For TRL's old log-probs: (B, C) fp32, 0 on padding. With the loss's own kernel, a ratio of 1 is 1."""
        prompts = _unpadded(input_ids[:, :-logits_to_keep], attention_mask[:, :-logits_to_keep])
        mask = attention_mask[:, -logits_to_keep:].bool()
        packed = self._token_logps(prompts, _unpadded(input_ids[:, -logits_to_keep:], mask))
        return torch.zeros(mask.shape, device=packed.device).masked_scatter(mask, packed), None, None

    def _generate_and_score_completions(self, inputs: list[dict]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        training, device = self.model.training, self.accelerator.device
        size = self.num_generations if training else self.num_generations_eval
        count = len(inputs)
        if self.args.log_z == "group" and (size < 2 or count % size):
            raise ConfigError(
                f"PowerFlowTRLTrainer: with log_z='group' a batch of {count} completions must be whole groups of at "
                f"least 2; num_generations{'' if training else '_eval'} is {size}: change it, or "
                f"per_device_{'train' if training else 'eval'}_batch_size"
            )
        mask = output["completion_mask"].bool()
        prompts = _unpadded(output["prompt_ids"], output["prompt_mask"])
        completions = _unpadded(output["completion_ids"], mask)
        current = sampled = output.get("old_per_token_logps")
        if current is not None and self.use_vllm and self.vllm_importance_sampling_correction:
            # Drawn by vLLM: its own log-probs are those of the sampling policy. NaN where it gave none.
            by_vllm = output["sampling_per_token_logps"]
            sampled = torch.where(by_vllm.isnan(), current, by_vllm)
        base = []
        with self.accelerator.autocast():
            for batch in self._batches(prompts, completions):
                logps = self._base.score(batch, temperature=self.temperature)
                base.append(segment_sum(logps, batch.cu_seqlens))
        rollout = _Rollout(
            prompts,
            completions,
            group_ids=torch.arange(count, device=device) // size,
            psi=torch.tensor(self._psi, device=device),
            base_logps=torch.cat(base),
            old_logps=None if sampled is None else (sampled.double() * mask).sum(1).float(),
            token_logps=None if current is None else current[mask],
            scored_at=-1 if current is None else self.state.global_step,
        )
        if training and self.log_z_head is not None and not self._log_z_started:
            self._warm_start(rollout)
        # TRL shuffles and splits lists as it does tensors, each sequence's rollout and number with it.
        output["powerflow"] = [(rollout, i) for i in range(count)]
        return output

    def _batches(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Iterator[Batch]:
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        for start in range(0, len(prompts), size):
            yield self._batch(prompts[start : start + size], completions[start : start + size])

    def _batch(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Batch:
        # Padded anew, on the right: left padding moves the positions of models that count them from the row's start.
        return pad_batch(prompts, completions, self._pad_id).to(self.accelerator.device)

    @torch.no_grad()
    def _token_logps(self, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
        """(N,) fp32 packed log-probs under the policy as it is now."""
        batches = list(self._batches(prompts, completions))
        with evaluating(self._scorer.model), self.accelerator.autocast():
            return torch.cat([self._scorer(batch, temperature=self.temperature).logps.float() for batch in batches])

    def _current_logps(self, rollout: _Rollout) -> Tensor:
        """(N,) of the whole rollout under the policy of this optimiser step, scored once for it."""
        if rollout.scored_at != self.state.global_step:
            rollout.token_logps = self._token_logps(rollout.prompt_ids, rollout.completion_ids)
            rollout.scored_at = self.state.global_step
        return rollout.token_logps

    def _warm_start(self, rollout: _Rollout) -> None:
        """The head begins at the mean of alpha (r + psi) - s over the first sequences of all processes."""
        lengths = rollout.cu_seqlens.diff().double()
        means = torch.segment_reduce(self._current_logps(rollout).double(), "mean", lengths=lengths.long())
        target = self.args.alpha * (rollout.base_logps / lengths + rollout.psi) - means
        value = float(self.accelerator.reduce(target.mean(), reduction="mean"))
        if math.isfinite(value):
            self.log_z_head.warm_start(value)
        self._log_z_started = True

    # The loss

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        rollout, rows = inputs["powerflow"][0][0], [i for _, i in inputs["powerflow"]]
        batch = self._batch([rollout.prompt_ids[i] for i in rows], [rollout.completion_ids[i] for i in rows])
        with self.accelerator.autocast():
            out = model(powerflow_batch=batch)
        logps = out.logps.float()
        at = torch.tensor(rows, device=logps.device)
        scores = {
            "base_logps": rollout.base_logps[at],
            "psi": rollout.psi[at],
            "old_logps": None if rollout.old_logps is None else rollout.old_logps[at],
            "alpha": self.args.alpha,
            "clip": tuple(self.args.importance_clip),
            "importance_level": self.args.importance_level,
        }
        if self.log_z_head is not None:
            log_z = self.log_z_head(out.pooled_prompt)
        elif len(rows) == len(rollout.completion_ids):
            log_z = group_log_z(logps.detach(), group_ids=rollout.group_ids[at], cu_seqlens=batch.cu_seqlens, **scores)
        else:
            whole = {name: getattr(rollout, name) for name in ("base_logps", "psi", "old_logps")}
            everyone = {"group_ids": rollout.group_ids, "cu_seqlens": rollout.cu_seqlens, **scores, **whole}
            log_z = group_log_z(self._current_logps(rollout), **everyone)[at]
        # The mean of the whole step: TRL adds the losses of micro-batches up, and DDP averages over processes.
        training = self.model.training
        processes = self.accelerator.num_processes if training else 1
        share = processes * self.current_gradient_accumulation_steps if training else 1
        loss, delta, weight, logp_mean = la_tb_loss(
            logps, log_z=log_z, cu_seqlens=batch.cu_seqlens, num_sequences=len(rows) * share, **scores
        )
        low, high = scores["clip"]
        metrics = {
            "delta_abs": delta.abs(),
            "log_z": log_z.detach(),
            "policy_logp": logp_mean,
            "base_logp": scores["base_logps"] / batch.completion_lengths,
            "importance_weight": weight,
            "clip_fraction": ((weight <= low) | (weight >= high)).float(),
            "format_ok": (scores["psi"] == 0).float(),
        }
        means = self.accelerator.reduce(torch.stack([value.mean() for value in metrics.values()]), reduction="mean")
        for name, value in zip(metrics, means.tolist(), strict=True):
            self._metrics["train" if training else "eval"][name].append(value)
        return loss * processes

    # The log Z' head: beside the model, never in it, so that no engine is sent it and no checkpoint of the model has it

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self.log_z_head is not None:
            ours = list(self.log_z_head.parameters())
            if not any(p is ours[0] for group in optimizer.param_groups for p in group["params"]):
                rate = self.args.log_z_learning_rate
                optimizer.add_param_group({"params": ours, "lr": rate, "weight_decay": 0.0})
        return optimizer

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        head = self.log_z_head
        if head is None:
            return super().training_step(model, inputs, num_items_in_batch)
        if self._accumulation_starts:
            head.zero_grad()  # the Trainer empties the gradients of the model only
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._accumulation_starts = self.accelerator.sync_gradients
        if self._accumulation_starts and self.accelerator.num_processes > 1:
            for parameter in head.parameters():
                parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        if self.log_z_head is not None:
            save_file(self.log_z_head.state_dict(), folder / LOG_Z_FILE)
        (folder / STATE_FILE).write_text(json.dumps(self._identity, indent=2) + "\n")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise CheckpointError(f"{folder} has no {STATE_FILE}: it is not a checkpoint of PowerFlowTRLTrainer")
        saved = json.loads((folder / STATE_FILE).read_text())
        for name, value in self._identity.items():
            if saved.get(name) != value:
                raise CheckpointError(
                    f"{folder} belongs to a run with {name}={saved.get(name)!r}, this one has {value!r}; a resumed run "
                    "needs the same target, and the model that training began with as `model`"
                )
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_log_z_head(folder)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_log_z_head(Path(self.state.best_model_checkpoint))

    def _load_log_z_head(self, folder: Path) -> None:
        if self.log_z_head is not None:
            self.log_z_head.load_state_dict(load_file(folder / LOG_Z_FILE))
            self._log_z_started = True


def no_reward(completions: list, **columns: Any) -> list[float]:
    """The reward of every completion where the user gives none: PowerFlow trains without."""
    return [0.0] * len(completions)


def _unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The tokens of each row of ``ids`` (B, T) where ``mask`` (B, T) is not zero."""
    return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
