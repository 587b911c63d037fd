"""Who makes an update: functions that turn the inputs into a step, ``(loss, sampled gradients...)`` or ``(loss,)``.

The contract: log-probs of both models for the very same tokens, micro-batches of eight sequences, gradients clipped to
a norm of one, one step of the shared AdamW.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from cases.update import ALPHA, GROUP, UpdateCase, UpdateInputs, sharing
from measure import Outputs
from providers import Provider, whole_package
from torch import Tensor

from powerflow_fast.config import PowerFlowConfig
from powerflow_fast.models import BaseScorer, CausalLMScorer, pad_batch
from powerflow_fast.models.batches import PaddedBatch
from powerflow_fast.training.policy import Policy
from powerflow_fast.training.prepare import choose_packing, make_accelerator
from powerflow_fast.training.samples import Samples
from powerflow_fast.training.update import Updater


def optimise(inputs: UpdateInputs) -> None:
    torch.nn.utils.clip_grad_norm_(inputs.policy.parameters(), 1.0)
    inputs.optimizer.step()
    inputs.optimizer.zero_grad(set_to_none=True)


def ours(inputs: UpdateInputs, *, entropy: bool = False, packing: str = "auto") -> Callable[[], Outputs]:
    """The trainer's own code: ``Updater`` on prepared modules, as ``train`` calls it between two rollouts."""
    count = len(inputs.prompt_ids)
    config = PowerFlowConfig(
        alpha=ALPHA,
        log_z="group",
        num_generations=GROUP,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=count // GROUP,
        bf16=inputs.bf16,
        packing=packing,
    )
    accelerator = make_accelerator(config)
    if accelerator.device.type != inputs.device.type:
        raise RuntimeError(f"the trainer runs on {accelerator.device.type} here, not on {inputs.device.type}")
    scorer = CausalLMScorer(sharing(inputs.policy))
    base = BaseScorer(CausalLMScorer(sharing(inputs.base)), mode="copy")
    attention = choose_packing(config, scorer, base, accelerator=accelerator, sample_prompts_ids=inputs.prompt_ids[:2])
    policy = accelerator.prepare(Policy(scorer, None)).train()
    updater = Updater(policy, base, accelerator, config, alpha=ALPHA, pad_id=0, packing=attention)
    tensors = {"group_ids": torch.tensor(inputs.group_ids), "psi": torch.zeros(count)}
    samples = Samples(inputs.prompt_ids, inputs.completion_ids, [True] * count, **tensors).to(inputs.device)

    def step() -> Outputs:
        samples.base_logps = updater.score_base(samples)
        sums = updater.gradient(samples, on_policy=True, need_entropy=entropy)
        outputs = (sums.loss, *inputs.sampled_gradients())
        optimise(inputs)
        return outputs

    return step


def naive(inputs: UpdateInputs) -> Callable[[], Outputs]:
    """A plain loop over Hugging Face logits, padded: float, log_softmax, gather, masked sums."""
    policy, base = sharing(inputs.policy), sharing(inputs.base)
    groups = torch.tensor(inputs.group_ids, device=inputs.device)
    count = len(inputs.prompt_ids)

    def micro_batches() -> list[tuple[slice, PaddedBatch]]:
        parts = [slice(start, start + GROUP) for start in range(0, count, GROUP)]
        ids = [(inputs.prompt_ids[part], inputs.completion_ids[part]) for part in parts]
        return [(part, pad_batch(*both, 0).to(inputs.device)) for part, both in zip(parts, ids, strict=True)]

    def sums(model: Any, batch: PaddedBatch) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.bf16):
            logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
        logps = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        place = torch.arange(1, batch.input_ids.shape[1], device=inputs.device)
        ends = batch.prompt_lengths + batch.completion_lengths
        completion = (place >= batch.prompt_lengths[:, None]) & (place < ends[:, None])
        return (logps * completion).sum(1)

    def step() -> Outputs:
        total = 0.0
        with torch.no_grad():
            base_sums = torch.cat([sums(base, batch) for _, batch in micro_batches()])
        for part, batch in micro_batches():
            r = base_sums[part] / batch.completion_lengths
            s = sums(policy, batch) / batch.completion_lengths
            target = ALPHA * r - s.detach()
            same = groups[part, None] == groups[None, part]
            log_z = (same * target).sum(1) / same.sum(1)
            loss = (log_z + s - ALPHA * r).square().sum() / count
            loss.backward()
            total = total + loss.detach()
        outputs = (total, *inputs.sampled_gradients())
        optimise(inputs)
        return outputs

    return step


def trl_trainer(inputs: UpdateInputs, folder: str) -> Any:
    """TRL's GRPOTrainer on our policy, with our base as its reference model; both have its fused head."""
    if not hasattr(sys.modules.get("trl"), "__version__"):
        whole_package("trl")
    trl = importlib.import_module("trl")
    from accelerate.state import AcceleratorState
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    AcceleratorState._reset_state()  # another case of this process may have had another precision
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "prompt": 2}, unk_token="<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    arguments = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=len(inputs.prompt_ids) // GROUP,
        num_generations=GROUP,
        max_completion_length=max(map(len, inputs.completion_ids)),
        gradient_checkpointing=False,
        bf16=inputs.bf16,
        use_cpu=inputs.device.type == "cpu",
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        sharing(inputs.policy),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "prompt"}]),
        processing_class=tokenizer,
    )
    # With beta > 0 its constructor would load the reference model from a hub or a folder. Ours is here already.
    reference = sharing(inputs.base)
    importlib.import_module("trl.trainer.utils").add_fused_lm_head(reference, temperature=trainer.temperature)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    trainer.beta = 0.04
    trainer.current_gradient_accumulation_steps = arguments.gradient_accumulation_steps  # train() sets it
    return trainer


def trl_batch(inputs: UpdateInputs) -> dict[str, Tensor]:
    """The tokens as its generation step leaves them: prompts, and completions padded to the longest."""
    lengths = torch.tensor([len(ids) for ids in inputs.completion_ids])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    completions = torch.zeros(mask.shape, dtype=torch.int64)
    completions[mask] = torch.tensor([token for ids in inputs.completion_ids for token in ids])
    prompts = torch.tensor(inputs.prompt_ids)
    advantages = torch.randn(len(lengths), generator=torch.Generator().manual_seed(0))
    tensors = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask.long(),
        "advantages": advantages,
    }
    return {name: tensor.to(inputs.device) for name, tensor in tensors.items()}


def trl_reference_logps(trainer: Any, model: Any, batch: dict[str, Tensor]) -> Tensor:
    """(B, T) log-probs of the completions, as its generation step scores the reference model."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        return trainer._get_per_token_logps_and_entropies(model, ids, mask, width, batch_size=GROUP)[0]


def trl_grpo(inputs: UpdateInputs) -> Callable[[], Outputs]:
    """TRL's GRPO update of the same tokens: reference scoring, its loss and backward pass, our optimiser step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl_trainer(inputs, folder)
    batch = trl_batch(inputs)
    model = trainer.accelerator.prepare_model(trainer.model).train()
    tokens = batch["completion_mask"].sum()

    def step() -> Outputs:
        batch["ref_per_token_logps"] = trl_reference_logps(trainer, trainer.ref_model, batch)
        total = 0.0
        for start in range(0, len(batch["advantages"]), GROUP):
            part = {name: tensor[start : start + GROUP] for name, tensor in batch.items()}
            loss = trainer.compute_loss(model, part | {"num_items_in_batch": tokens})
            trainer.accelerator.backward(loss)
            total = total + loss.detach()
        optimise(inputs)
        return (total,)

    return step


def _ours(name: str, **options: Any) -> Provider:
    return Provider(name, "powerflow_fast", lambda device: lambda x: ours(x, **options), backend="auto")


UPDATE_PROVIDERS = [
    _ours("powerflow_fast"),
    _ours("powerflow_fast with entropy", entropy=True),
    _ours("powerflow_fast padded", packing="off"),
    Provider("naive", "torch", lambda device: naive),
    Provider("trl GRPO", "trl", lambda device: trl_grpo),
]


def update_step(provider: Provider, case: UpdateCase, inputs: UpdateInputs) -> Callable[[], Outputs]:
    return provider.load(inputs.device)(inputs)
