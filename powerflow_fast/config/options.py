"""PowerFlowConfig: every option of a training run, checked on construction.

The same dataclass feeds the Python API, YAML files and the command line: each field carries its help text and its
bounds in ``metadata``. Names and meanings follow TRL where it has them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from ..errors import suggest
from .fields import RENAMED, alpha_request, checked, config_error

TRACKERS = ("tensorboard", "wandb", "trackio", "all", "none")

# Schedules of transformers.get_scheduler that need no further arguments. The second group reads the length of the run.
_OPEN_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")
_CLOSED_SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial")

# Options that leave the numbers of a run alone, those about memory up to rounding: they may differ between a run and
# its continuation.
_FREE_ON_RESUME = {
    "activation_checkpointing",
    "alarm_clip_fraction",
    "alarm_length_share",
    "alarm_repetition",
    "eval_steps",
    "fsdp",
    "log_completions",
    "logging_steps",
    "max_tokens_per_batch",
    "max_nonfinite_steps",
    "num_sample_prompts",
    "on_nonfinite",
    "output_dir",
    "packing",
    "report_to",
    "resume_from_checkpoint",
    "run_name",
    "save_steps",
    "save_total_limit",
    "self_check",
    "trust_remote_code",
    "vllm_gpu_memory_utilization",
    "vllm_server_base_url",
}


def _opt(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its help text and bounds (``ge``, ``gt``, ``le``, ``lt``)."""
    return field(default=default, metadata={"help": help, **bounds})


@dataclass(kw_only=True)
class PowerFlowConfig:
    """Options of :func:`powerflow_fast.train`.

    A wrong type, a value out of range, or a contradiction raises :class:`ConfigError` that names the field, what was
    expected and what was found. ``alpha`` may stay ``None`` here: ``train(alpha=...)`` and the command line set it.
    """

    # The target
    alpha: float | str | None = _opt(
        None,
        "exponent of the target p_base(y|q)^alpha: > 1 sharpens, < 1 flattens, 1 keeps the base; auto:entropy=0.8 "
        "or auto:logp=-0.5 finds the one with that mean token entropy, or that log-prob per token under the base",
        gt=0,
    )
    objective: str = _opt(
        "la_tb", "training loss by name, see docs/objectives.md; la_tb: length-aware trajectory balance"
    )
    objective_options: dict | None = _opt(None, 'keyword options of the objective, such as {"lam": 0.9}')  # noqa: RUF009
    log_z: Literal["learned", "group", "table"] = _opt(
        "learned",
        "log-partition: a small learned head on the prompt, the mean over a prompt's completions, or its running mean "
        "over the times that the prompt was seen",
    )
    log_z_momentum: float = _opt(0.9, "share of the past in that running mean", ge=0, lt=1)
    log_z_learning_rate: float = _opt(1e-3, "learning rate of the learned log Z' head", gt=0)
    log_z_num_layers: int = _opt(1, "linear layers of the learned log Z' head", ge=1, le=3)
    format_penalty: float = _opt(
        -0.5, "added to a completion's mean base log-prob (nats per token) when format_fn returns False", le=0
    )
    importance_level: Literal["sequence", "length_normalized"] = _opt(
        "sequence", "ratio of policies that weighs stale samples: of whole sequences, or its per-token geometric mean"
    )
    importance_clip: tuple[float, float] = _opt((0.8, 1.2), "lower and upper bound of that ratio; must enclose 1")
    reward: str | list[str] | None = _opt(  # noqa: RUF009
        None, "ready-made rewards by name, see docs/rewards.md, for objectives that take one; functions go to reward_fn"
    )
    reward_weights: list[float] | None = _opt(None, "weights of several rewards (default: 1 each)")  # noqa: RUF009
    answer_equivalence: Literal["normalized", "math_verify"] = _opt(
        "normalized", "how rewards compare answers: as normalised text, or as mathematics by math-verify"
    )

    # Sampling
    num_generations: int = _opt(8, "completions per prompt", ge=1)
    max_prompt_length: int = _opt(512, "longest prompt in tokens; a longer one is an error", ge=1)
    max_completion_length: int = _opt(256, "most tokens per completion, the end-of-sequence token included", ge=1)
    temperature: float = _opt(1.0, "sampling temperature; log-probs are scored at the same temperature", gt=0)
    rollout_temperature: float | None = _opt(
        None, "sample at this temperature instead; importance ratios then make up for the difference", gt=0
    )
    top_p: float = _opt(1.0, "must stay 1.0: samples are drawn from the full softmax that is scored")
    top_k: int = _opt(0, "must stay 0: samples are drawn from the full softmax that is scored")
    rollout_engine: Literal["auto", "hf", "continuous", "vllm"] = _opt(
        "auto",
        "what samples; auto: vllm with use_vllm, continuous batching where it pays and a probe finds it right, else hf",
    )
    rollout_batch_size: int = _opt(64, "sequences decoded at once on each device", ge=1)
    rollout_cache_tokens: int | None = _opt(
        None, "continuous batching: tokens in the key-value cache (default: rollout_batch_size longest sequences)", ge=1
    )
    rollout_max_batch_tokens: int = _opt(512, "continuous batching: most tokens of one forward", ge=1)
    use_rollout_logps: bool = _opt(False, "take the engine's own log-probs as those of the policy that sampled")
    use_vllm: bool = _opt(False, "sample with vLLM")
    vllm_mode: Literal["colocate", "server"] = _opt(
        "colocate", "vLLM in this process, on the training GPU, or in a server started with vllm serve"
    )
    vllm_server_base_url: str | None = _opt(None, "address of that server, such as http://host:8000")
    vllm_gpu_memory_utilization: float = _opt(0.3, "share of the GPU's memory for colocated vLLM", gt=0, le=1)
    vllm_tensor_parallel_size: int = _opt(1, "GPUs of one colocated vLLM engine; must be 1", ge=1)
    vllm_max_model_length: int | None = _opt(None, "longest prompt with completion in colocated vLLM, tokens", ge=1)
    use_chat_template: bool | Literal["auto"] = _opt(
        "auto", "wrap prompts in the tokenizer's chat template; auto: where it has one"
    )
    system_prompt: str | None = _opt(None, "system message put before every prompt; needs a chat template")

    # Optimisation
    learning_rate: float = _opt(1e-6, "peak learning rate of the policy", gt=0)
    lr_scheduler_type: str = _opt(
        "constant_with_warmup", "learning-rate schedule: " + ", ".join(_OPEN_SCHEDULES + _CLOSED_SCHEDULES)
    )
    warmup_steps: int = _opt(0, "optimizer steps of linear warm-up", ge=0)
    weight_decay: float = _opt(0.0, "AdamW weight decay of the policy (the log Z' head has none)", ge=0)
    optim: Literal[
        "auto", "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_32bit", "paged_adamw_8bit"
    ] = _opt("auto", "optimizer; auto: AdamW of torch, fused on CUDA; 8-bit and paged ones need bitsandbytes")
    adam_beta1: float = _opt(0.9, "AdamW beta1", ge=0, lt=1)
    adam_beta2: float = _opt(0.999, "AdamW beta2", ge=0, lt=1)
    adam_epsilon: float = _opt(1e-8, "AdamW epsilon", gt=0)
    max_grad_norm: float = _opt(1.0, "gradients are scaled down to this norm; 0 switches it off", ge=0)
    per_device_train_batch_size: int = _opt(8, "sequences per micro-batch on each device", ge=1)
    max_tokens_per_batch: int | None = _opt(
        None,
        "cut each optimizer step into micro-batches of at most this many prompt and completion tokens, balanced by "
        "length, instead of per_device_train_batch_size sequences; the sequences per step stay the same",
        ge=1,
    )
    gradient_accumulation_steps: int = _opt(1, "micro-batches per optimizer step", ge=1)
    steps_per_generation: int | None = _opt(
        None, "micro-batches per rollout, a multiple of gradient_accumulation_steps (default: equal to it)", ge=1
    )
    num_iterations: int = _opt(1, "passes over each rollout", ge=1)
    replay_steps: int = _opt(0, "further optimizer steps after each rollout, on groups of earlier ones", ge=0)
    replay_capacity: int = _opt(1024, "groups that are kept for them on each device, the oldest dropped first", ge=1)
    replay_prioritized: bool = _opt(False, "draw and keep groups of high reward instead, as exp(mean reward)")
    max_steps: int = _opt(-1, "optimizer steps of the run; -1: num_train_epochs decides", ge=-1)
    num_train_epochs: float = _opt(1.0, "passes over the prompts when max_steps is -1", gt=0)
    seed: int = _opt(0, "seed of initialisation, prompt order and sampling", ge=0, lt=2**32)

    # Faults
    on_nonfinite: Literal["skip", "stop"] = _opt("skip", "a step whose loss or gradient is not finite: skip it, or end")
    max_nonfinite_steps: int = _opt(5, "steps skipped in a row that end the run", ge=1)
    alarm_length_share: float = _opt(0.25, "warn when lengths fall below this share of the first steps'", ge=0, lt=1)
    alarm_repetition: float = _opt(0.5, "warn when more 4-grams repeat within completions; 1: never", gt=0, le=1)
    alarm_clip_fraction: float = _opt(0.5, "warn when more importance ratios are clipped; 1: never", gt=0, le=1)

    # Model and memory
    dtype: Literal["auto", "float32", "bfloat16"] = _opt(
        "auto", "dtype of loaded weights; auto: float32, or as stored with use_peft"
    )
    bf16: bool | Literal["auto"] = _opt(
        "auto", "bfloat16 autocast; auto: on CUDA with compute capability >= 8.0 and CPUs with AMX or AVX512-BF16"
    )
    packing: Literal["auto", "on", "off"] = _opt(
        "auto",
        "run the sequences of a micro-batch end to end in one row, without padding; auto: where a check before "
        "training finds that this model scores them as it does each alone",
    )
    activation_checkpointing: bool = _opt(False, "recompute activations in the backward pass to save memory")
    fsdp: bool = _opt(False, "shard weights, gradients and optimiser state over the processes (FSDP2)")
    use_liger_kernel: Literal["auto", "on", "off"] = _opt(
        "off", "Liger's RMSNorm, RoPE and SwiGLU on policy and base; auto: on CUDA where liger-kernel has them"
    )
    base: Literal["auto", "adapter_off", "copy", "cpu", "8bit", "4bit"] = _opt(
        "auto",
        "where p_base comes from: the model with its adapter off, a frozen copy, one in CPU memory, or quantised by "
        "bitsandbytes",
    )
    use_peft: bool = _opt(False, "train a LoRA adapter instead of all weights")
    lora_r: int = _opt(16, "LoRA rank", ge=1)
    lora_alpha: int = _opt(32, "LoRA scale numerator", ge=1)
    lora_target_modules: str | list[str] = _opt(  # noqa: RUF009
        "all-linear", "modules that get an adapter; all-linear: every linear layer except the head"
    )
    trust_remote_code: bool = _opt(False, "run Python code that comes with the model")
    self_check: bool = _opt(True, "compare our log-probs with the model's own logits before training")

    # Output
    output_dir: str = _opt("powerflow-run", "folder of the run: model, history, plots, checkpoints")
    logging_steps: int = _opt(1, "steps between rows of history.jsonl and trackers", ge=1)
    save_steps: int = _opt(0, "steps between checkpoints; 0: only at the end", ge=0)
    save_total_limit: int | None = _opt(None, "checkpoints to keep; older ones are deleted", ge=1)
    eval_steps: int = _opt(0, "steps between calls of eval_fn; 0: never", ge=0)
    report_to: str | list[str] = _opt("none", "experiment trackers: " + ", ".join(TRACKERS))  # noqa: RUF009
    run_name: str | None = _opt(None, "name of the run in trackers")
    resume_from_checkpoint: bool | str | None = _opt(
        None, "true: continue from the newest checkpoint in output_dir; or a checkpoint folder"
    )
    num_sample_prompts: int = _opt(4, "prompts whose completions are shown before and after training", ge=0)
    log_completions: bool = _opt(False, "also write every sampled completion to completions.jsonl")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            setattr(self, f.name, checked(f, FIELD_TYPES[f.name], getattr(self, f.name)))
        alpha_request(self.alpha)
        for name, only in (("top_p", 1.0), ("top_k", 0)):
            if getattr(self, name) != only:
                raise config_error(
                    f"{name} must be {only}, got {getattr(self, name)}: truncated sampling draws from another "
                    "distribution than the full softmax that is scored, and the loss would lose its target. Use "
                    "temperature instead"
                )
        if self.max_steps == 0:
            raise config_error("max_steps must be -1 (num_train_epochs decides) or >= 1, got 0")
        low, high = self.importance_clip
        if not 0 <= low <= 1 <= high:
            raise config_error(
                f"importance_clip must be (low, high) with 0 <= low <= 1 <= high, got {self.importance_clip}"
            )
        if self.lr_scheduler_type not in _OPEN_SCHEDULES + _CLOSED_SCHEDULES:
            raise config_error(
                f"lr_scheduler_type must be one of {', '.join(_OPEN_SCHEDULES + _CLOSED_SCHEDULES)}, "
                f"got {self.lr_scheduler_type!r}{suggest(self.lr_scheduler_type, _OPEN_SCHEDULES + _CLOSED_SCHEDULES)}"
            )
        if self.log_z != "learned" and self.num_generations < 2:
            raise config_error(f"num_generations must be >= 2 with log_z={self.log_z!r}, got {self.num_generations}")
        if self.steps_per_generation and self.steps_per_generation % self.gradient_accumulation_steps:
            raise config_error(
                f"steps_per_generation must be a multiple of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}, got {self.steps_per_generation}"
            )
        for tracker in self.trackers:
            if tracker not in TRACKERS:
                raise config_error(
                    f"report_to must name {', '.join(TRACKERS)}, got {tracker!r}{suggest(tracker, TRACKERS)}"
                )
        targets = self.lora_target_modules
        if any(t.split(".")[-1] == "lm_head" for t in ([targets] if isinstance(targets, str) else targets)):
            raise config_error(
                f"lora_target_modules must not contain the head, got {targets!r}: log-probs are computed from the "
                "head's own weight, and an adapter on it would be left out"
            )
        if self.use_peft and self.base in ("8bit", "4bit"):
            raise config_error(f"base={self.base!r} quantises a copy; with use_peft the base is the model itself")
        if not self.output_dir.strip():
            raise config_error("output_dir must not be empty")
        self.output_dir = str(Path(self.output_dir).expanduser())

    # Derived sizes

    @property
    def cache_tokens(self) -> int:
        """``rollout_cache_tokens`` with its default filled in."""
        default = self.rollout_batch_size * (self.max_prompt_length + self.max_completion_length)
        return self.rollout_cache_tokens or default

    @property
    def trackers(self) -> list[str]:
        """``report_to`` as a list; empty for ``none``."""
        names = self.report_to.split(",") if isinstance(self.report_to, str) else self.report_to
        return [n.strip() for n in names if n.strip() != "none"]

    @property
    def micro_batches_per_generation(self) -> int:
        """``steps_per_generation`` with its default filled in."""
        return self.steps_per_generation or self.gradient_accumulation_steps

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps between one rollout and the next: on its completions, then on those of the buffer."""
        return self.fresh_updates + self.replay_steps

    @property
    def fresh_updates(self) -> int:
        """Optimizer steps made from one rollout while it is fresh."""
        return self.micro_batches_per_generation // self.gradient_accumulation_steps * self.num_iterations

    def require_alpha(self, *, auto: bool = True) -> float | str:
        """``alpha``, or :class:`ConfigError` when nobody set it, or where it must be a number (``auto=False``)."""
        if self.alpha is None:
            raise config_error("alpha is required and must be > 0: 4 sharpens a base model, 0.5 flattens it")
        if isinstance(self.alpha, str) and not auto:
            raise config_error(f"alpha must be a number here, got {self.alpha!r}: powerflow_fast.train takes it")
        return self.alpha

    def sequences_per_step(self, world_size: int = 1) -> int:
        """Sequences whose gradients make one optimizer step, over all devices."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * world_size

    def generation_batch_size(self, world_size: int = 1) -> int:
        """Sequences of one rollout over all devices: a multiple of ``num_generations``, or :class:`ConfigError`."""
        per_device, steps = self.per_device_train_batch_size, self.micro_batches_per_generation
        size = per_device * steps * world_size
        if size % self.num_generations:
            # The least multiple of the batch size that, with the other two factors, is divisible.
            unit = self.num_generations // math.gcd(self.num_generations, steps * world_size)
            fits = [n for n in range(2, size + 1) if size % n == 0]
            near = sorted(sorted(fits, key=lambda n: abs(n - self.num_generations))[:5])
            raise config_error(
                f"num_generations={self.num_generations} must divide the {size} sequences of a rollout "
                f"(per_device_train_batch_size={per_device} x {steps} micro-batches x {world_size} devices). "
                f"Set num_generations to one of {near or [1]}, or per_device_train_batch_size to a multiple of {unit}"
            )
        return size

    def prompts_per_generation(self, world_size: int = 1) -> int:
        """Prompts of one rollout over all devices."""
        return self.generation_batch_size(world_size) // self.num_generations

    def check_groups(self, world_size: int = 1, *, needed_by: str | None = None) -> None:
        """:class:`ConfigError` where the completions of a prompt would be torn apart: see the messages.

        ``needed_by`` names an objective that needs whole groups in each step whatever the other options are.
        """
        k = self.num_generations
        per_device = self.per_device_train_batch_size * self.micro_batches_per_generation
        if world_size > 1 and per_device % k:
            raise config_error(
                f"the completions of a prompt stay on one device: num_generations={k} must divide its {per_device} "
                "sequences of a rollout"
            )
        per_step = self.per_device_train_batch_size * self.gradient_accumulation_steps
        reasons = [f"objective={needed_by!r}"] if needed_by else []
        reasons += [f"log_z={self.log_z!r}"] if self.log_z != "learned" else []
        reasons += [f"replay_steps={self.replay_steps}"] if self.replay_steps else []
        if reasons and k < 2 and (needed_by or self.log_z != "learned"):
            raise config_error(f"num_generations must be >= 2 with {reasons[0]}, which compares completions, got {k}")
        if reasons and per_step % k:
            raise config_error(
                f"{reasons[0]} needs whole groups in each optimizer step: num_generations={k} must divide "
                f"per_device_train_batch_size x gradient_accumulation_steps = {per_step}"
            )

    def total_steps(self, num_prompts: int, world_size: int = 1) -> int:
        """Optimizer steps of the whole run: ``max_steps``, or what ``num_train_epochs`` over ``num_prompts`` needs."""
        if self.max_steps > 0:
            return self.max_steps
        rollouts = math.ceil(self.num_train_epochs * num_prompts / self.prompts_per_generation(world_size))
        return rollouts * self.updates_per_generation

    # Dicts, resume

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PowerFlowConfig:
        """The config with ``values`` over the defaults; an unknown name raises, with the nearest one suggested."""
        for name in values:
            if message := unknown_field(name):
                raise config_error(message)
        return cls(**values)

    def merge(self, **overrides: Any) -> PowerFlowConfig:
        """A copy with ``overrides``, checked like :meth:`from_dict`."""
        return self.from_dict({**self.to_dict(), **overrides})

    def to_dict(self) -> dict[str, Any]:
        """All fields, as values that JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def fingerprint_fields(self) -> dict[str, Any]:
        """The fields that change a run's numbers and so must be equal when it is resumed.

        Left out: fields about output only; the run's length when the schedule does not depend on it; options of LoRA
        and of the log Z' head where those are not in use. What no field holds (the number of devices, the prompts) is
        the trainer's to record.
        """
        values = self.to_dict()
        unused = set(_FREE_ON_RESUME)
        if self.lr_scheduler_type in _OPEN_SCHEDULES:
            unused |= {"max_steps", "num_train_epochs"}
        elif self.max_steps > 0:
            unused.add("num_train_epochs")
        unused |= {n for n in values if n.startswith("lora_") and not self.use_peft}
        unused |= {n for n in values if n.startswith("log_z_") and self.log_z != "learned"} - {"log_z_momentum"}
        unused |= {"log_z_momentum"} if self.log_z != "table" else set()
        unused |= {"replay_capacity", "replay_prioritized"} if not self.replay_steps else set()
        return {n: v for n, v in values.items() if n not in unused}

    def diff_for_resume(self, saved: Mapping[str, Any]) -> list[str]:
        """One line per field in which ``saved`` (:meth:`to_dict` or :meth:`fingerprint_fields`) differs from here."""
        here = self.fingerprint_fields()
        missing = object()
        lines = []
        for name, value in here.items():
            other = _plain(saved.get(name, missing))
            if other is missing:
                lines.append(f"{name}: not recorded in the checkpoint, this run has {value!r}")
            elif other != value:
                lines.append(f"{name}: checkpoint has {other!r}, this run has {value!r}")
        unknown = sorted(saved.keys() - FIELD_TYPES.keys())
        return lines + [f"{n}: checkpoint has {saved[n]!r}, this version has no such field" for n in unknown]


def _plain(value: Any) -> Any:
    """Tuples as lists, so that a config equals its JSON."""
    return list(value) if isinstance(value, tuple) else value


def unknown_field(name: str) -> str | None:
    """What is wrong with the field name ``name``, or ``None``."""
    if name in FIELD_TYPES:
        return None
    hint = f": {RENAMED[name]}" if name in RENAMED else suggest(str(name), FIELD_TYPES)
    return f"unknown field {name!r}{hint}"


FIELD_TYPES: dict[str, Any] = get_type_hints(PowerFlowConfig)
