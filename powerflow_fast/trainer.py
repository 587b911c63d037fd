"""``train``: sample from the policy, score under p_base, take LA-TB steps, show what happens, save.

accelerate places the model on its devices, wraps it for several processes, casts, reduces gradients and feeds trackers.
Its ``save_state`` is not used: it writes pickles, and checkpoints here are safetensors and JSON only.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from . import report
from .checkpoint import checkpoint_step, git_commit, latest_checkpoint, prepare_output_dir
from .config import PowerFlowConfig
from .data import PromptDataset, check_lengths, encode_prompt, load_prompts, prompt_indices
from .errors import ConfigError, ModelError, NonFiniteLossError, OutputDirError, RolloutError
from .models import (
    CausalLMScorer,
    load_model,
    make_base,
    max_positions,
    pad_token_id,
    save_model,
    weights_fingerprint,
)
from .partition import LogZHead
from .plots import plot_history
from .preparation import check_arguments, digest, make_accelerator, prepare_model, prompt_text, seed_of
from .rewards import FormatFn, format_penalties, resolve_format
from .rollout import Rollout, seeded
from .rollout_choice import check_rollout_config, logp_gap, make_engine
from .run_state import RunState, find_checkpoint
from .self_check import self_check
from .update import Policy, Samples, Updater

__all__ = ["StepReport", "TrainResult", "train"]

logger = logging.getLogger(__name__)

_CARD_METRICS = ("entropy", "policy_logp", "base_logp", "length", "delta_abs")

EvalFn = Callable[[nn.Module, Any, int], dict[str, float]]


class StepReport(NamedTuple):
    """What a callback gets after each optimiser step."""

    step: int
    metrics: dict[str, float]
    model: nn.Module


@dataclass(frozen=True)
class TrainResult:
    """The trained model (in eval mode), its tokenizer, one dict per logged step, and the folder of the run."""

    model: nn.Module
    tokenizer: Any
    history: list[dict[str, float]]
    output_dir: Path

    @property
    def model_dir(self) -> Path:
        """Loads with ``AutoModelForCausalLM.from_pretrained``; a LoRA run is merged into it."""
        return self.output_dir / "model"


def train(
    model: str | Path | nn.Module,
    prompts: Any,
    *,
    alpha: float | None = None,
    config: PowerFlowConfig | None = None,
    format_fn: FormatFn | str | None = None,
    eval_fn: EvalFn | None = None,
    callbacks: Sequence[Callable[[StepReport], bool | None]] = (),
    tokenizer: Any = None,
    **overrides: Any,
) -> TrainResult:
    """Train ``model`` to sample from ``p_base(y|q) ** alpha``, where p_base is the model as it is given.

    (Of a PEFT model p_base is the model with its adapter off, unless ``base="copy"``.)

    Args:
        model: hub name, local folder, or a loaded ``PreTrainedModel`` or ``PeftModel`` (trained in place).
        prompts: list of strings or of chat message lists, a ``datasets.Dataset``, or a path to .jsonl/.json/.parquet/
            .txt. Other columns of a row reach ``format_fn`` as keywords.
        alpha: > 1 sharpens (4 for a base model, 2 for an instruct model), < 1 flattens (0.5).
        config: all other options; ``overrides`` are fields of it and win.
        format_fn: ``format_fn(prompt, completion, **columns) -> bool``; a completion for which it is False is scored
            with ``config.format_penalty`` nats per token added to its base log-prob. ``"boxed"`` is ready-made.
        eval_fn: ``eval_fn(model, tokenizer, step) -> {name: number}``, called before, every ``eval_steps``, and after.
        callbacks: called with a :class:`StepReport` after each optimiser step; a true result ends the training.
        tokenizer: used instead of the one beside the model.

    Returns:
        :class:`TrainResult`. ``output_dir`` then holds ``model/`` (plain safetensors, with a model card),
        ``history.jsonl``, ``history.png``, ``samples.md``, ``run.json`` and ``checkpoint-<step>/``.

    Run it under ``accelerate launch`` for several GPUs. On one machine the numbers are a function of the config, the
    prompts and the weights: a run that was killed and resumed ends with the same bits on a CPU.

    Raises:
        ConfigError, DataError, ModelError, SelfCheckError, OutputDirError, CheckpointError: before the first step.
        NonFiniteLossError: the loss or its gradient was NaN or infinite; the weights before that step are saved.

    Source: LA-TB, PowerFlow (arXiv 2603.18363).
    """
    callbacks = check_arguments(config, eval_fn, callbacks, tokenizer)
    config = config or PowerFlowConfig()
    config = config.merge(**overrides, **({} if alpha is None else {"alpha": alpha}))
    config.require_alpha()
    return _Run(model, prompts, config, format_fn, eval_fn, callbacks, tokenizer).train()


class _Run:
    """State of one call of :func:`train`, built in the order in which things can go wrong most cheaply."""

    def __init__(self, model, prompts, config: PowerFlowConfig, format_fn, eval_fn, callbacks, tokenizer):
        self.config, self.alpha = config, config.require_alpha()
        self.format_fn, self.eval_fn, self.callbacks = resolve_format(format_fn), eval_fn, callbacks
        self.dataset: PromptDataset = load_prompts(prompts)
        self.accelerator = make_accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process
        self.prompts_per_rollout = config.prompts_per_generation(self.world)
        config.check_groups(self.world)
        check_rollout_config(config)
        self.total_steps = config.total_steps(len(self.dataset), self.world)
        self.resume_from = find_checkpoint(config)

        weights_dtype = config.dtype
        if weights_dtype == "auto" and not config.use_peft:
            # A step of 1e-6 disappears in a bfloat16 weight: what is trained is kept in fp32, and bf16 is autocast.
            weights_dtype = "float32"
        loaded = load_model(model, tokenizer=tokenizer, dtype=weights_dtype, trust_remote_code=config.trust_remote_code)
        self.tokenizer, self.model_name = loaded.tokenizer, loaded.name
        self._check_prompts(loaded.model)
        self.model = prepare_model(loaded.model, config).to(self.accelerator.device)
        self._build()

    # Set-up

    def _check_prompts(self, model: nn.Module) -> None:
        config = self.config
        self._encode_options = {"use_chat_template": config.use_chat_template, "system_prompt": config.system_prompt}
        longest = check_lengths(
            self.dataset, self.tokenizer, max_prompt_length=config.max_prompt_length, **self._encode_options
        )
        limit = max_positions(model)
        if limit is not None and longest + config.max_completion_length > limit:
            raise ConfigError(
                f"PowerFlowConfig: the longest prompt has {longest} tokens; with max_completion_length="
                f"{config.max_completion_length} that exceeds the model's {limit} positions; set max_completion_length "
                f"to at most {limit - longest}"
            )

    def _build(self) -> None:
        """Everything that needs the model: base, engine, optimiser, scheduler, check, output folder, resumed state."""
        from transformers import get_scheduler

        config, accelerator = self.config, self.accelerator
        # Before anything is loaded over the weights: p_base is the model as it was given.
        self.base = make_base(self.model, config.base)
        scorer = CausalLMScorer(self.model)
        head = None
        if config.log_z == "learned":
            with seeded(config.seed, torch.device("cpu")):
                head = LogZHead(scorer.head.weight.shape[1], num_layers=config.log_z_num_layers)
            head.to(accelerator.device)
        self.policy = Policy(scorer, head)
        prompts = [self._encode(i) for i in range(min(4, len(self.dataset)))]
        self.engine = make_engine(self.model, self.tokenizer, config, accelerator, probe_prompts=prompts)
        self.engine.sync(0)
        self.rollout_logps: list[list[float]] | None = None
        trained = [p for p in scorer.parameters() if p.requires_grad]
        groups = [{"params": trained, "lr": config.learning_rate, "weight_decay": config.weight_decay}]
        if head is not None:
            groups.append({"params": list(head.parameters()), "lr": config.log_z_learning_rate, "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            fused=accelerator.device.type == "cuda",
        )
        self.scheduler = get_scheduler(
            config.lr_scheduler_type,
            optimizer,
            num_warmup_steps=config.warmup_steps,
            num_training_steps=self.total_steps,
        )
        identity = {
            "prompts": self.dataset.fingerprint,
            "chat_template": digest(getattr(self.tokenizer, "chat_template", None)),
            "format_fn": getattr(self.format_fn, "__qualname__", None),
            "base_model": weights_fingerprint(self.base.scorer.model),
            "num_processes": self.world,
        }
        self.state = RunState(self.policy, optimizer, self.scheduler, config, identity)
        if config.self_check:
            self_check(
                scorer,
                self.tokenizer,
                temperature=config.temperature,
                sample_prompts_ids=prompts,
                engine=self.engine,
                autocast=accelerator.autocast,
            )
        self.step, self.samples = 0, None
        if self.resume_from is not None:
            self.step, self.samples = self.state.load(self.resume_from, self.rank)
            newest = latest_checkpoint(config.output_dir)
            if newest is not None and checkpoint_step(newest) > self.step:
                raise OutputDirError(
                    f"output_dir {config.output_dir} holds {newest.name}, later than {self.resume_from}: continue from "
                    "there with resume_from_checkpoint=True, or branch off into another output_dir"
                )
        elif config.resume_from_checkpoint:
            logger.warning("no checkpoint in %s yet: the run starts at step 1", config.output_dir)
        self.wrapped, self.optimizer = accelerator.prepare(self.policy, optimizer)
        pad_id = pad_token_id(self.tokenizer, self.model)
        self.updater = Updater(self.wrapped, self.base, accelerator, config, alpha=self.alpha, pad_id=pad_id)

        resuming = self.config.resume_from_checkpoint not in (None, False)
        record = {"config": config.to_dict(), "model": self.model_name, "prompts": self.dataset.description, **identity}
        self.output_dir = Path(config.output_dir)
        if self.is_main:
            prepare_output_dir(self.output_dir, run_record=record, resume=resuming)
        accelerator.wait_for_everyone()
        if config.trackers:
            accelerator.init_trackers(
                config.run_name or "powerflow",
                config={k: v for k, v in config.to_dict().items() if isinstance(v, (int, float, str, bool))},
            )

    def _encode(self, index: int) -> list[int]:
        ids = encode_prompt(self.dataset[index], self.tokenizer, **self._encode_options)
        rows = self.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= rows:
            raise ModelError(
                f"{self.dataset[index].where}: the tokenizer gives token id {max(ids)}, but the model embeds {rows} "
                "tokens; use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer))"
            )
        return ids

    # The loop

    def train(self) -> TrainResult:
        config = self.config
        history_file = self.output_dir / "history.jsonl"
        # Rows after the resumed step are dropped: those steps are made again.
        self.history_file = report.HistoryWriter(history_file, resume_step=self.step) if self.is_main else None
        self.history = report.read_history(history_file) if self.is_main else []
        progress = report.ProgressLine(self.total_steps, first=self.step) if self.is_main else None
        completions = self.output_dir / "completions.jsonl"
        log = self.is_main and self.config.log_completions
        self.completions_file = report.HistoryWriter(completions, resume_step=self.step) if log else None
        before = self._samples_before()
        if self.step == 0:
            self._evaluate(record_always=True)
        stop = self.step >= self.total_steps
        if stop:
            logger.warning("nothing to do: the checkpoint is at step %d of %d", self.step, self.total_steps)
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        while not stop:
            rollout_number, update = divmod(self.step, config.updates_per_generation)
            timings = {"rollout": 0.0, "score": 0.0}
            if update == 0:
                self.samples = self._rollout(rollout_number, timings)
            parts = list(self.samples.split(per_step))
            part = parts[update % len(parts)]
            # An untrained head starts at the best constant.
            if self.step == 0 and self.policy.log_z_head is not None:
                self.policy.log_z_head.warm_start(self.updater.mean_target(part))
            logged = (self.step + 1) % config.logging_steps == 0 or self.step + 1 == self.total_steps
            metrics = self._step(part, first=update == 0, logged=logged, timings=timings)
            self.step += 1
            if logged:
                self._record(metrics)
                if progress:
                    progress.update({"step": self.step, **metrics})
            if config.eval_steps and self.step % config.eval_steps == 0 and self.step < self.total_steps:
                self._evaluate()
            step_report = StepReport(self.step, metrics, self.model)
            stop = any([callback(step_report) for callback in self.callbacks]) or self.step >= self.total_steps
            if config.save_steps and self.step % config.save_steps == 0 and not stop:
                self._save()
        if progress:
            progress.close()
        self._save()
        self._evaluate(record_always=True)
        return self._finish(before)

    def _rollout(self, number: int, timings: dict[str, float]) -> Samples:
        """Completions for this device's share of rollout ``number``, scored under p_base and, if needed, the policy."""
        config, k = self.config, self.config.num_generations
        started = time.perf_counter()
        indices = prompt_indices(number, self.prompts_per_rollout, len(self.dataset), config.seed)
        share = len(indices) // self.world
        indices = indices[self.rank * share : (self.rank + 1) * share] if self.world > 1 else indices
        prompts = [ids for i in indices for ids in [self._encode(i)] * k]
        rollout = self._draw(prompts, number, self.rank)
        self.rollout_logps = rollout.logps
        timings["rollout"] = time.perf_counter() - started
        started = time.perf_counter()
        samples = Samples(
            rollout.prompt_ids,
            rollout.completion_ids,
            rollout.finished,
            group_ids=torch.arange(len(indices)).repeat_interleave(k),
            psi=self._format_penalties(indices, rollout.completion_ids),
        ).to(self.accelerator.device)
        samples.base_logps = self.updater.score_base(samples)
        if config.use_rollout_logps:
            samples.old_logps = torch.tensor([sum(row) for row in rollout.logps], device=samples.psi.device)
        elif config.updates_per_generation > 1:
            samples.old_logps = self.updater.policy_sums(samples)
        timings["score"] = time.perf_counter() - started
        if self.completions_file is not None:
            self._write_completions(number, indices, rollout)
        return samples

    def _draw(self, prompts: list[list[int]], number: int, rank: int) -> Rollout:
        """Completions from the weights as they are after ``self.step`` steps, and from no older ones."""
        self.engine.sync(self.step)
        wanted = self.engine.logps_are_free or self.config.use_rollout_logps
        rollout = self.engine.generate(prompts, seed=seed_of(self.config.seed, number, rank), return_logps=wanted)
        if rollout.weight_version != self.step:
            raise RolloutError(
                f"train: the {self.engine.name} engine sampled from the weights of step {rollout.weight_version}, "
                f"not of step {self.step}"
            )
        return rollout

    def _format_penalties(self, indices: list[int], completions: list[list[int]]) -> torch.Tensor:
        rows = [self.dataset[i] for i in indices for _ in range(self.config.num_generations)]
        texts = self.tokenizer.batch_decode(completions, skip_special_tokens=True)
        prompts, columns = [row.prompt for row in rows], [row.extra for row in rows]
        psi = format_penalties(self.format_fn, prompts, texts, columns, penalty=self.config.format_penalty)
        return torch.tensor(psi, dtype=torch.float32)

    def _step(self, samples: Samples, *, first: bool, logged: bool, timings: dict[str, float]) -> dict[str, float]:
        """One optimiser step, the ``first`` on its rollout or not; a gradient that is not finite changes no weights."""
        on_policy = first and not self.config.use_rollout_logps
        started = time.perf_counter()
        self.wrapped.train()
        sums = self.updater.gradient(samples, on_policy=on_policy, need_entropy=logged)
        max_norm = self.config.max_grad_norm or float("inf")
        grad_norm = float(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), max_norm))
        loss = float(self.accelerator.reduce(sums.loss, reduction="sum"))
        if not (torch.isfinite(torch.tensor(loss)) and torch.isfinite(torch.tensor(grad_norm))):
            self._stop_non_finite(loss, grad_norm)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        total = torch.nn.utils.get_total_norm([p.detach() for p in self.policy.parameters() if p.requires_grad])
        if not bool(torch.isfinite(total)):
            self._stop_non_finite(loss, grad_norm)
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        timings["update"] = time.perf_counter() - started
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate}
        if logged:
            metrics |= self.updater.metrics(samples, sums)
        if first and self.rollout_logps is not None:
            # Both are of the weights that sampled. The sequences of this first step come first in the rollout.
            metrics |= logp_gap(self.rollout_logps[: len(samples)], sums.token_logps, self.accelerator)
        seconds = sum(timings.values())
        tokens = sum(map(len, samples.prompt_ids)) + sum(samples.lengths)
        metrics |= {f"seconds/{name}": value for name, value in timings.items()}
        metrics["tokens_per_second"] = tokens * self.world / seconds
        return metrics

    def _stop_non_finite(self, loss: float, grad_norm: float) -> None:
        step = self.step + 1
        finite = all(bool(torch.isfinite(p).all()) for p in self.policy.parameters())
        if finite and self.step > 0:
            self._save()
        kept = latest_checkpoint(self.output_dir)
        saved = f"the state after step {checkpoint_step(kept)} is in {kept}" if kept else "there is no checkpoint yet"
        state = "this step did not change the weights" if finite else "its update made the weights non-finite"
        raise NonFiniteLossError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}; {state}, and {saved}. "
            "Lower learning_rate, or look for prompts or completions that the model gives no finite log-probs",
            step=step,
            checkpoint=str(kept) if kept else None,
        )

    # What people see

    def _record(self, metrics: dict[str, float]) -> None:
        row = {"step": self.step, **metrics}
        if self.is_main:
            self.history.append(row)
            self.history_file.write(row)
        self.accelerator.log(metrics, step=self.step)

    def _evaluate(self, *, record_always: bool = False) -> None:
        if self.eval_fn is None or not (record_always or self.config.eval_steps):
            return
        if self.is_main:
            self.model.eval()
            with torch.no_grad():
                scores = self.eval_fn(self.model, self.tokenizer, self.step)
            try:
                numbers = {f"eval/{name}": float(value) for name, value in scores.items()}
            except (AttributeError, TypeError, ValueError):
                raise ConfigError(f"eval_fn must return a dict of numbers, got {scores!r}") from None
            self._record(numbers)
        self.accelerator.wait_for_everyone()

    def _draw_samples(self, count: int) -> list[report.Sample]:
        """The same prompts and seed whenever it is called, so that before and after can be compared."""
        if not count or not self.is_main:
            return []
        prompts = [self._encode(i) for i in range(count)]
        rollout = self._draw(prompts, 0, 0)
        texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        return [report.Sample(prompt_text(self.dataset[i].prompt), text) for i, text in enumerate(texts)]

    def _samples_before(self) -> list[report.Sample]:
        path = self.output_dir / "samples_before.json"
        if path.is_file():  # a resumed run: its policy is no longer the one from before
            return [report.Sample(**sample) for sample in json.loads(path.read_text(encoding="utf-8"))]
        samples = self._draw_samples(min(self.config.num_sample_prompts, len(self.dataset)))
        if self.is_main:
            rows = [asdict(sample) for sample in samples]
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        return samples

    def _write_completions(self, number: int, indices: list[int], rollout: Any) -> None:
        texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        step = number * self.config.updates_per_generation + 1  # the first that trains on them
        for j, text in enumerate(texts):
            index = indices[j // self.config.num_generations]
            self.completions_file.write({"step": step, "rollout": number, "prompt_index": index, "text": text})

    def _save(self) -> None:
        """A checkpoint at the present step; an unfinished rollout goes with it."""
        unfinished = self.step % self.config.updates_per_generation != 0
        self.state.save(self.output_dir, self.step, self.samples if unfinished else None, self.accelerator)

    def _finish(self, before: list[report.Sample]) -> TrainResult:
        self.model.eval()
        steps = [row for row in self.history if "loss" in row]
        if self.is_main:
            self.history_file.close()
            save_model(self.model, self.tokenizer, self.output_dir)
            if self.policy.log_z_head is not None:
                save_file(self.policy.log_z_head.state_dict(), self.output_dir / "log_z_head.safetensors")
            report.write_model_card(
                self.output_dir / "model",
                alpha=self.alpha,
                base_model=self.model_name,
                data_description=self.dataset.description,
                config=self.config.to_dict(),
                commit=git_commit(),
                metrics=[(name, steps[0][name], steps[-1][name]) for name in _CARD_METRICS] if steps else [],
            )
            report.write_samples(self.output_dir / "samples.md", before, self._draw_samples(len(before)))
            if steps:
                plot_history(
                    steps,
                    self.output_dir / "history.png",
                    alpha=self.alpha,
                    max_completion_length=self.config.max_completion_length,
                )
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:  # end_training would also end the caller's process group
            tracker.finish()
        return TrainResult(self.model, self.tokenizer, self.history, self.output_dir)
