"""Train with TRL on a few prompts: python examples/trl_powerflow.py [model] (needs powerflow_fast[trl,lora])."""

from __future__ import annotations

import sys

import torch
from datasets import Dataset
from peft import LoraConfig

from powerflow_fast.integrations.trl import PowerFlowTRLConfig, PowerFlowTRLTrainer

QUESTIONS = [f"What is {a} times {b}? End with \\boxed{{the answer}}." for a in range(2, 10) for b in range(11, 19)]


def main(model: str) -> None:
    trainer = PowerFlowTRLTrainer(
        model,
        args=PowerFlowTRLConfig(
            output_dir="trl-powerflow",
            alpha=2.0,
            log_z="group",
            num_generations=8,
            max_completion_length=128,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            learning_rate=2e-5,
            max_steps=50,
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": q}] for q in QUESTIONS]}),
        format_fn="boxed",
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    )
    trainer.train()
    trainer.save_model("trl-powerflow/adapter")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "Qwen/Qwen2.5-0.5B-Instruct")
