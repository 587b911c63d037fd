"""One training run: sample from the policy, score under p_base, take steps, show what happens, save.

accelerate places the model on its devices, wraps it for several processes, casts, reduces gradients and feeds trackers.
Its ``save_state`` is not used: it writes pickles, and checkpoints here are safetensors and JSON only.
"""

from __future__ import annotations

import json
import logging
import math
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..checkpoints.folder import checkpoint_step, latest_checkpoint
from ..checkpoints.output_dir import prepare_output_dir
from ..config.options import PowerFlowConfig
from ..data import PromptDataset, encode_prompt, load_prompts
from ..errors import ConfigError, ModelError, OutputDirError, PowerFlowError, RunStopped
from ..models.liger import apply_liger
from ..models.loading import load_model, pad_token_id, weights_fingerprint
from ..models.logprob_model import CausalLMScorer, make_base
from ..models.quantization import QUANTIZED, quantize_base
from ..models.sharding import assembled, check_sharding, gathered, shard, whole, whole_number
from ..objectives.log_z import LogZHead, LogZTable
from ..objectives.registry import Objective
from ..report import samples_page
from ..rewards.formats import resolve_format
from ..rollout.choice import check_rollout_config, logp_gap, make_engine
from ..rollout.engine import RolloutEngine
from ..tools.files import disk_full
from ..tools.random_state import seed_of, seeded
from .alarms import Alarms
from .alpha_search import make_alpha
from .collector import Collector
from .non_finite import may_skip, non_finite_error
from .optimizer import make_optimizer
from .policy import Policy
from .prepare import (
    check_prompts,
    choose_objective,
    choose_packing,
    digest,
    make_accelerator,
    prepare_model,
    prompt_text,
)
from .replay import ReplayBuffer
from .result import StepReport, TrainResult, write_results
from .run_log import RunLog
from .run_state import RunState, find_checkpoint
from .samples import Samples
from .self_check import self_check
from .signals import Abandoned, StopRequest
from .throughput import Throughput
from .update import Updater

logger = logging.getLogger(__name__)

EvalFn = Callable[[nn.Module, Any, int], dict[str, float]]


class Run:
    """State of one call of ``train``, built in the order in which things can go wrong most cheaply."""

    def __init__(
        self,
        model,
        prompts,
        config: PowerFlowConfig,
        *,
        format_fn,
        eval_fn,
        callbacks,
        tokenizer,
        reward_fn,
        objective_fn,
        engine: RolloutEngine | None,
    ):
        self.config = config
        self.format_fn, self.eval_fn, self.callbacks = resolve_format(format_fn), eval_fn, callbacks
        self.own_engine = engine
        self.objective: Objective
        self.objective, self.reward = choose_objective(config, objective_fn, reward_fn)
        self.dataset: PromptDataset = load_prompts(prompts)
        self.accelerator = make_accelerator(config)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.is_main = self.accelerator.is_main_process
        if config.fsdp:
            check_sharding(self.world)
        config.generation_batch_size(self.world)
        config.check_groups(self.world, needed_by=self.objective.name if self.objective.needs_groups else None)
        check_rollout_config(config)
        self.total_steps = config.total_steps(len(self.dataset), self.world)
        self.resume_from = find_checkpoint(config)

        weights_dtype = config.dtype
        if weights_dtype == "auto" and not config.use_peft:
            # A step of 1e-6 disappears in a bfloat16 weight: what is trained is kept in fp32, and bf16 is autocast.
            weights_dtype = "float32"
        loaded = load_model(model, tokenizer=tokenizer, dtype=weights_dtype, trust_remote_code=config.trust_remote_code)
        self.tokenizer, self.model_name = loaded.tokenizer, loaded.name
        self._encode_options = {"use_chat_template": config.use_chat_template, "system_prompt": config.system_prompt}
        check_prompts(self.dataset, self.tokenizer, loaded.model, config, self._encode_options)
        vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
        self.alpha = make_alpha(config, self.objective, own_engine=engine is not None, vocabulary=vocabulary)
        self.model = prepare_model(loaded.model, config).to(self.accelerator.device)
        self.unpatch = lambda: None
        try:
            self._build()
        except BaseException:
            self.unpatch()
            raise

    # Set-up

    def _build(self) -> None:
        """Everything that needs the model: base, engine, optimiser, scheduler, check, output folder, resumed state."""
        from transformers import get_scheduler

        config, accelerator = self.config, self.accelerator
        # Before anything is loaded over the weights: p_base is the model as it was given.
        self.base = make_base(self.model, "copy" if config.base in QUANTIZED else config.base)
        base_weights = weights_fingerprint(self.base.scorer.model)
        if config.base in QUANTIZED:
            quantize_base(self.base, config.base)
        on_device = [self.model] if self.base.mode == "cpu" else [self.model, self.base.scorer.model]
        self.unpatch = apply_liger(on_device, config.use_liger_kernel, accelerator.device)
        scorer = CausalLMScorer(self.model)
        head = None
        if config.log_z == "learned" and self.objective.partition is not None:
            with seeded(config.seed, torch.device("cpu")):
                head = LogZHead(scorer.head.weight.shape[1], num_layers=config.log_z_num_layers)
            head.to(accelerator.device)
        self.policy = Policy(scorer, head)
        first_prompts = [self._encode(i) for i in range(min(4, len(self.dataset)))]
        self.engine = self.own_engine
        if self.engine is None:
            self.engine = make_engine(self.model, self.tokenizer, config, accelerator, probe_prompts=first_prompts)
        self.engine.sync(0)
        self.engine_logps: list[list[float]] | None = None
        if config.self_check:
            self_check(
                scorer,
                self.tokenizer,
                temperature=config.temperature,
                sample_prompts_ids=first_prompts,
                engine=None if self.own_engine else self.engine,
                engine_temperature=config.rollout_temperature,
                autocast=accelerator.autocast,
            )
        packing = choose_packing(config, scorer, self.base, accelerator=accelerator, sample_prompts_ids=first_prompts)
        self.shell = shard(self.policy, self.model, accelerator.device) if config.fsdp else None
        if config.fsdp and self.base.scorer.model is self.model:
            self.base.root = self.policy
        trained = [p for p in scorer.parameters() if p.requires_grad]
        optimizer = make_optimizer(trained, head, config, accelerator.device)
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
            "rewards": None if self.reward is None else self.reward.names,
            "base_model": base_weights,
            "num_processes": self.world,
        }
        self.state = RunState(self.policy, optimizer, self.scheduler, config, identity)
        table = LogZTable(config.log_z_momentum) if config.log_z == "table" else None
        buffer = None
        if config.replay_steps:
            options = {"prioritized": config.replay_prioritized, "seed": seed_of(config.seed, 0, self.rank)}
            buffer = ReplayBuffer(config.replay_capacity, **options)
        self.state.attached = {name: v for name, v in (("log_z_table", table), ("replay", buffer)) if v is not None}
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
        self.saved_step = self.step
        self.alarms = Alarms(config, warn=self.is_main)
        if "alarms" in self.state.counters:
            self.alarms.load_state_dict(self.state.counters["alarms"])
        if "alpha" in self.state.counters:
            self.alpha.load_state_dict(self.state.counters["alpha"])
        # A sharded policy is its own wrapper; otherwise accelerate's synchronises several devices.
        self.wrapped = self.policy if config.fsdp else accelerator.prepare(self.policy)
        self.optimizer = accelerator.prepare(optimizer)
        self.updater = Updater(
            self.wrapped,
            self.base,
            accelerator,
            config,
            alpha=self.alpha.value,
            pad_id=pad_token_id(self.tokenizer, self.model),
            packing=packing,
            objective=self.objective,
            log_z_table=table,
        )
        self.collector = Collector(
            config,
            accelerator,
            dataset=self.dataset,
            encode=self._encode,
            tokenizer=self.tokenizer,
            engine=self.engine,
            external=self.own_engine is not None,
            policy=self.policy,
            updater=self.updater,
            format_fn=self.format_fn,
            reward=self.reward,
            buffer=buffer,
        )

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
        # A run from the start keeps no rows of one that was killed before its first checkpoint.
        first = None if self.resume_from is None else self.step
        self.log = RunLog(self.output_dir, self.config, self.accelerator, total=self.total_steps, first=first)
        with StopRequest() as self.stop_request:
            try:
                before = self._samples_before()
                self._loop()
                self._save()
                self._heed_signals()
                self._evaluate(record_always=True)
                self._finish(before)
                self._heed_signals()
            except Abandoned:
                self._stopped()
            except (OSError, SafetensorError) as error:
                if isinstance(error, PowerFlowError) or (reason := disk_full(error, self.output_dir)) is None:
                    raise
                remedy = "Free some space, then run the same with resume_from_checkpoint=True"
                raise OutputDirError(f"output_dir {self.output_dir}: {reason}. {remedy}") from error
            finally:
                self.unpatch()
                self.log.close()
        return TrainResult(self.model, self.tokenizer, self.log.history, self.output_dir, self.alpha.landed)

    def _loop(self) -> None:
        config = self.config
        if self.step == 0:
            self._evaluate(record_always=True)
        stop = self.step >= self.total_steps
        cuda = self.accelerator.device.type == "cuda"
        device_name = torch.cuda.get_device_name(self.accelerator.device) if cuda else "cpu"
        self.throughput = Throughput(self.policy.scorer, device_name, self.world)
        if stop:
            logger.warning("nothing to do: the checkpoint is at step %d of %d", self.step, self.total_steps)
        per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
        while not stop:
            rollout_number, update = divmod(self.step, config.updates_per_generation)
            timings = {"rollout": 0.0, "score": 0.0}
            self._heed_signals()
            if update == 0:
                with self._abandonable():
                    self.samples = self._collect(rollout_number, timings)
            if update < config.fresh_updates:
                parts = list(self.samples.split(per_step))
                part = parts[update % len(parts)]
            else:
                part = self.collector.replay(per_step // config.num_generations)
            if self.alpha.needs_start:
                with self._abandonable():
                    scores = self.updater.score_policy(part, need_stats=self.alpha.needs_entropy)
                self._choose_alpha(part, scores.logps, scores.stats.entropy if self.alpha.needs_entropy else None)
            # An untrained head starts at the best constant; a first step that is skipped leaves it untrained.
            if self.policy.log_z_head is not None and not self.optimizer.state:
                self._warm_start(part)
            logged = (self.step + 1) % config.logging_steps == 0 or self.step + 1 == self.total_steps
            skipped = self.state.counters.get("skipped_steps", 0)
            metrics = self._step(part, first=update == 0, logged=logged, timings=timings)
            self.step += 1
            if logged:
                metrics |= self.throughput.metrics()
            if logged or metrics["skipped_steps"] > skipped:
                self.log.record(self.step, metrics, progress=True)
            if config.eval_steps and self.step % config.eval_steps == 0 and self.step < self.total_steps:
                self._evaluate()
            step_report = StepReport(self.step, metrics, self.model)
            stop = any([callback(step_report) for callback in self.callbacks]) or self.step >= self.total_steps
            if config.save_steps and self.step % config.save_steps == 0 and not stop:
                self._save()
        self.log.end_progress()

    def _abandonable(self) -> AbstractContextManager[None]:
        return self.stop_request.abandonable(self.world == 1)

    def _heed_signals(self) -> None:
        """Leave the loop if any process was asked to; all of them do so before the same step."""
        asked = self.stop_request.signal is not None
        if self.world > 1:
            asked = bool(self.accelerator.reduce(torch.tensor(float(asked), device=self.accelerator.device)))
        if asked:
            raise Abandoned

    def _stopped(self) -> NoReturn:
        """Save and say how to go on; a SIGINT then is the KeyboardInterrupt that callers expect."""
        self.log.end_progress()
        if self.step > self.saved_step:
            self._save()
        name = signal.SIGTERM.name if self.stop_request.signal is None else self.stop_request.signal.name
        kept = self.output_dir / f"checkpoint-{self.step}" if self.step else None
        if self.is_main:
            state = f"step {self.step} of {self.total_steps} is saved in {kept}" if kept else "no step was made yet"
            logger.warning("%s: %s; to go on, run the same with resume_from_checkpoint=True", name, state)
        if self.stop_request.signal is signal.SIGINT:
            raise KeyboardInterrupt
        raise RunStopped(str(kept) if kept else None)

    def _collect(self, number: int, timings: dict[str, float]) -> Samples:
        samples, self.engine_logps, indices, texts = self.collector.collect(number, self.step, timings)
        self.log.completions(number, indices, texts)
        return samples

    def _choose_alpha(self, samples: Samples, logps: Tensor, entropy: Tensor | None) -> None:
        """The exponent of the next step, after fresh samples of the policy."""
        self.updater.change_alpha(self.alpha.observe(samples, logps, entropy, self.accelerator), samples)
        self.state.counters["alpha"] = self.alpha.state_dict()

    def _warm_start(self, samples: Samples) -> None:
        constant = self.updater.mean_target(samples)
        if math.isfinite(constant):  # else the step's gradient is not finite either, and it is dealt with there
            self.policy.log_z_head.warm_start(constant)

    def _step(self, samples: Samples, *, first: bool, logged: bool, timings: dict[str, float]) -> dict[str, float]:
        """One optimiser step, the ``first`` on its rollout or not; none where loss or gradient are not finite."""
        on_policy = first and self.collector.samples_policy and not self.objective.needs_old_logps
        observed = first and self.alpha.auto
        need_entropy = logged or (observed and self.alpha.needs_entropy)
        self.updater.steps_made = self.step
        started = time.perf_counter()
        self.wrapped.train()
        with self._abandonable():
            sums = self.updater.gradient(samples, on_policy=on_policy, need_entropy=need_entropy)
        max_norm = self.config.max_grad_norm or float("inf")
        grad_norm = whole_number(self.accelerator.clip_grad_norm_(self.wrapped.parameters(), max_norm))
        loss = float(self.accelerator.reduce(sums.loss, reduction="sum"))
        metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        metrics |= self.alpha.metrics()
        bad = next((name for name in ("loss", "grad_norm") if not math.isfinite(metrics[name])), None)
        # Reduced numbers are everyone's, but a wrapper may compute the norm on its own: one that skips makes all skip.
        if self.accelerator.reduce(torch.tensor(float(bad is not None), device=self.accelerator.device)) > 0:
            if not may_skip(self.config, self.state.counters):
                self._stop_non_finite(bad or "grad_norm", metrics)
            if self.is_main:
                logger.warning("step %d is skipped: %s is %s", self.step + 1, bad, metrics.get(bad))
        else:
            self.optimizer.step()
            total = torch.nn.utils.get_total_norm([p.detach() for p in self.policy.parameters() if p.requires_grad])
            if not math.isfinite(whole_number(total)):
                self._stop_non_finite("weights", metrics)
            self.scheduler.step()
            self.updater.commit()
            if observed:
                self._choose_alpha(samples, sums.token_logps, sums.entropy)
            self.state.counters["skipped_in_a_row"] = 0
        self.optimizer.zero_grad(set_to_none=True)
        timings["update"] = time.perf_counter() - started
        metrics["skipped_steps"] = self.state.counters.get("skipped_steps", 0)
        if logged:
            metrics |= self.updater.metrics(samples, sums)
            metrics |= self.alarms.check(self.step + 1, metrics)
            self.state.counters["alarms"] = self.alarms.state_dict()
        if first and self.engine_logps is not None and not self.config.rollout_temperature:
            # Both are of the weights that sampled. The sequences of this first step come first in the rollout.
            metrics |= logp_gap(self.engine_logps[: len(samples)], sums.token_logps, self.accelerator)
        self.throughput.add(timings, sum(map(len, samples.prompt_ids)), sum(samples.lengths))
        metrics |= {f"seconds/{name}": value for name, value in timings.items()}
        return metrics

    def _stop_non_finite(self, metric: str, metrics: dict[str, float]) -> NoReturn:
        # Where there is a checkpoint, nothing newer goes over it: the run may have been on its way here for a while.
        if metric != "weights" and self.step > 0 and self.saved_step == 0:
            self._save()
        kept = latest_checkpoint(self.output_dir)
        raise non_finite_error(self.step + 1, metric, metrics, kept, self.state.counters)

    # What people see

    def _evaluate(self, *, record_always: bool = False) -> None:
        if self.eval_fn is None or not (record_always or self.config.eval_steps):
            return
        scores = None
        with gathered(self.policy), torch.no_grad(), self._abandonable():
            if self.is_main:
                self.model.eval()
                scores = self.eval_fn(self.model, self.tokenizer, self.step)
        if self.is_main:
            try:
                numbers = {f"eval/{name}": float(value) for name, value in scores.items()}
            except (AttributeError, TypeError, ValueError):
                raise ConfigError(f"eval_fn must return a dict of numbers, got {scores!r}") from None
            self.log.record(self.step, numbers)
        self.accelerator.wait_for_everyone()

    def _draw_samples(self, count: int) -> list[samples_page.Sample]:
        """The same prompts and seed whenever it is called, so that before and after can be compared."""
        if not count:
            return []
        prompts = [self._encode(i) for i in range(count)]
        with gathered(self.policy):
            if not self.is_main:
                return []
            rollout = self.collector.draw(prompts, 0, 0, self.step)
        texts = self.tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        return [samples_page.Sample(prompt_text(self.dataset[i].prompt), text) for i, text in enumerate(texts)]

    def _samples_before(self) -> list[samples_page.Sample]:
        path = self.output_dir / "samples_before.json"
        resumed = path.is_file()
        self.accelerator.wait_for_everyone()  # until all have looked, nobody writes it
        if resumed:  # a resumed run: its policy is no longer the one from before
            return [samples_page.Sample(**sample) for sample in json.loads(path.read_text(encoding="utf-8"))]
        samples = self._draw_samples(min(self.config.num_sample_prompts, len(self.dataset)))
        if self.is_main:
            rows = [asdict(sample) for sample in samples]
            path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        return samples

    def _save(self) -> None:
        """A checkpoint at the present step; an unfinished rollout goes with it."""
        unfinished = self.step % self.config.updates_per_generation != 0
        self.state.save(self.output_dir, self.step, self.samples if unfinished else None, self.accelerator)
        self.saved_step = self.step

    def _finish(self, before: list[samples_page.Sample]) -> None:
        from accelerate.utils import broadcast_object_list

        self.model.eval()
        after = self._draw_samples(broadcast_object_list([len(before)])[0])
        head = self.policy.log_z_head
        head_weights = None if head is None else whole(head.state_dict())
        model = self.model if self.shell is None else assembled(self.shell, self.model, keep=self.is_main)
        if self.is_main:
            self.alpha.check()
            write_results(
                self.output_dir,
                model,
                self.tokenizer,
                self.log.history,
                samples=(before, after),
                log_z_weights=head_weights,
                alpha=self.alpha.landed,
                alpha_note=self.alpha.summary(),
                base_model=self.model_name,
                data_description=self.dataset.description,
                config=self.config,
            )
        self.accelerator.wait_for_everyone()
