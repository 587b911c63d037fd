"""Trajectory balance on a reward of your own: learn to sample from p_base(y|q) exp(beta reward(y)) / Z(q).

python examples/tb_with_reward.py                      # a tiny random model on a CPU, in seconds
python examples/tb_with_reward.py Qwen/Qwen2.5-0.5B    # a real one
"""

from __future__ import annotations

import torch
from shared import arguments, load

from powerflow_fast.models import CausalLMScorer, make_base, pad_batch
from powerflow_fast.objectives import Trajectories, relative_tb
from powerflow_fast.rollout import HFGenerateEngine

PROMPTS = ["Sing: ", "Once upon a time, "]
SAMPLES, TOKENS, BETA = 32, 8, 30.0


def reward(text: str) -> float:
    """Put your own here. This one likes vowels."""
    return sum(character in "aeiouAEIOU" for character in text) / TOKENS


def main() -> None:
    args = arguments(__doc__, steps=40)
    model, tokenizer = load(args.model)
    policy, base = CausalLMScorer(model), make_base(model)
    engine = HFGenerateEngine(model, tokenizer, temperature=1.0, max_completion_length=TOKENS, batch_size=64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS for _ in range(SAMPLES)]
    group_ids = torch.arange(len(PROMPTS)).repeat_interleave(SAMPLES)

    means = []
    for step in range(args.steps):
        rollout = engine.generate(prompts, seed=step)
        texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        rewards = torch.tensor([reward(text) for text in texts])
        batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, engine.pad_id).to(model.device)
        with torch.no_grad():
            base_logps = base.scorer(batch, temperature=1.0).logps
        samples = Trajectories(
            logps=policy(batch, temperature=1.0).logps,
            base_logps=base_logps,
            cu_seqlens=batch.cu_seqlens,
            rewards=rewards.to(model.device),
            group_ids=group_ids.to(model.device),  # log Z is estimated from the samples of a prompt
        )
        relative_tb(samples, beta=BETA).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(rewards.mean()))
    print(f"mean reward: {sum(means[:5]) / 5:.3f} in the first five steps, {sum(means[-5:]) / 5:.3f} in the last five")


if __name__ == "__main__":
    main()
