"""A DPO loop that takes nothing from this library but the log-probs: one line more, and no logits in memory.

python examples/dpo_with_our_kernel.py                               # a tiny random model on a CPU, in seconds
python examples/dpo_with_our_kernel.py Qwen/Qwen2.5-0.5B-Instruct    # a real one
"""

from __future__ import annotations

import torch
from shared import arguments, load
from torch.nn.utils.rnn import pad_sequence

from powerflow_fast.models import patch_causal_lm

BETA = 0.1
PAIRS = [  # prompt, preferred and rejected answer
    ("Name a colour. ", "Blue.", "I would rather not."),
    ("What is 2 + 2? ", "4", "It depends on whom you ask."),
    ("Say hello. ", "Hello!", "No."),
]


def collate(tokenizer, pairs: list[tuple[str, str]], device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of prompt and answer; labels are -100 on the prompt and on padding."""
    rows, labels = [], []
    for prompt, answer in pairs:
        prompt_ids, answer_ids = tokenizer.encode(prompt), tokenizer.encode(answer, add_special_tokens=False)
        rows.append(torch.tensor(prompt_ids + answer_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + answer_ids))
    return {
        "input_ids": pad_sequence(rows, batch_first=True).to(device),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100).to(device),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
    }


def main() -> None:
    args = arguments(__doc__, steps=30)
    model, tokenizer = load(args.model)
    patch_causal_lm(model)  # the one line: it makes model.logprobs
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    chosen = collate(tokenizer, [(prompt, answer) for prompt, answer, _ in PAIRS], model.device)
    rejected = collate(tokenizer, [(prompt, answer) for prompt, _, answer in PAIRS], model.device)

    def margin() -> torch.Tensor:
        return model.logprobs(**chosen, reduction="sum") - model.logprobs(**rejected, reduction="sum")

    losses, reference = [], margin().detach()
    for _ in range(args.steps):
        loss = -torch.nn.functional.logsigmoid(BETA * (margin() - reference)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"DPO loss: {losses[0]:.3f} in the first step, {losses[-1]:.3f} in the last")


if __name__ == "__main__":
    main()
