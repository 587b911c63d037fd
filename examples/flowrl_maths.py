"""FlowRL on maths prompts: completions are sampled in proportion to their reward instead of maximising it.

python examples/flowrl_maths.py                               # a tiny random model on a CPU, in seconds
python examples/flowrl_maths.py Qwen/Qwen2.5-0.5B-Instruct    # a real one
"""

import re

import reasoning_gym
import torch
from shared import arguments, load

from powerflow_fast.models import CausalLMScorer, make_base, pad_batch
from powerflow_fast.objectives import Trajectories, flowrl
from powerflow_fast.rollout import HFGenerateEngine

PROMPTS, SAMPLES = 4, 32


def main() -> None:
    args = arguments(__doc__, steps=80)
    model, tokenizer = load(args.model)
    task = reasoning_gym.create_dataset("chain_sum", seed=0, size=60, min_terms=2, max_terms=2, max_digits=1)
    entries = [entry for entry in task if 0 <= int(entry["answer"]) <= 9][:PROMPTS]
    policy, base = CausalLMScorer(model), make_base(model)
    engine = HFGenerateEngine(model, tokenizer, temperature=1.0, max_completion_length=2, batch_size=128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    prompts = [tokenizer.encode(entry["question"].split(": ")[-1]) for entry in entries for _ in range(SAMPLES)]
    group_ids = torch.arange(PROMPTS).repeat_interleave(SAMPLES)

    means = []
    for step in range(args.steps):
        rollout = engine.generate(prompts, seed=step)
        texts = tokenizer.batch_decode(rollout.completion_ids, skip_special_tokens=True)
        answers = [re.split(r"\D", text.strip())[0] or None for text in texts]  # the number that comes first
        rewards = torch.tensor([task.score_answer(a, entries[i]) for i, a in zip(group_ids, answers, strict=True)])
        batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, engine.pad_id).to(model.device)
        with torch.no_grad():
            base_logps = base.scorer(batch, temperature=1.0).logps
        samples = Trajectories(
            logps=policy(batch, temperature=1.0).logps,
            base_logps=base_logps,
            cu_seqlens=batch.cu_seqlens,
            rewards=rewards.to(model.device),
            group_ids=group_ids.to(model.device),
        )
        flowrl(samples, beta=15.0).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        means.append(float(rewards.mean()))
    print(f"mean reward: {sum(means[:5]) / 5:.3f} in the first five steps, {sum(means[-5:]) / 5:.3f} in the last five")


if __name__ == "__main__":
    main()
