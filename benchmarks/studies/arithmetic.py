r"""A small language model that does sums in visible steps, trained here from scratch in a few minutes on one core.

It stands in for a base LM in the studies of training. A problem is ``3*7+5*6=``; demonstrations solve it in one of five
ways and put the answer in a box:

    left      3*7=21; 5*6=30, so 21+30=51. So \boxed{51}
    right     5*6=30; 3*7=21; 30+21=51. Answer: \boxed{51}
    check     3*7=21; 5*6=30, then 21+30=51, so 30+21=51. So \boxed{51}
    brief     3*7=21; 5*6=30. So \boxed{51}
    direct    \boxed{51}

They have what makes a base LM's samples worse than its mode: steps are wrong with probability ``STEP_ERROR``, what is
wrong differs from one demonstration to the next, and later steps go on from it. And what makes its long completions
less likely than its short ones: each step may be written in several ways, so that longer is more of a choice. Answers
without steps exist and are short; a model of this size cannot find them reliably.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from powerflow_fast.rewards import extract_answer

STRATEGIES = {"left": 0.35, "right": 0.2, "check": 0.15, "brief": 0.2, "direct": 0.1}
STEP_ERROR, DIRECT_ERROR = 0.2, 0.4
MAX_COMPLETION = 42  # tokens; the longest demonstration has 41
DIGITS = range(2, 8)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
OPENERS = ("", "", "", "First ", "We get ")
JOINS = ("; ", ", then ", ", so ")
CLOSERS = (". So ", ". Answer: ", ". Therefore ")
_BOX = r"\boxed{"
_WORDS = (*OPENERS[3:], *JOINS, *CLOSERS, _BOX)
_EQUATION = re.compile(r"(\d+)([*+])(\d+)=(\d+)")


@dataclass(frozen=True)
class BaseSettings:
    """All that the weights of the base model depend on."""

    steps: int = 2000
    batch_size: int = 64
    learning_rate: float = 3e-3
    hidden_size: int = 64
    layers: int = 3
    heads: int = 4
    seed: int = 0


QUICK = BaseSettings(steps=12, batch_size=16, hidden_size=32, layers=1, heads=2)


# Problems

Terms = tuple[int, int, int, int]


def prompt_of(terms: Terms) -> str:
    a, b, c, d = terms
    return f"{a}*{b}+{c}*{d}="


def answer_of(terms: Terms) -> int:
    a, b, c, d = terms
    return a * b + c * d


def is_held_out(terms: Terms) -> bool:
    """An eighth of the 1296 problems, which no demonstration and no training prompt has."""
    return hashlib.blake2b(prompt_of(terms).encode(), digest_size=4).digest()[0] % 8 == 0


def problems(*, held_out: bool) -> list[dict[str, str]]:
    """All problems of one part in an order that is random and always the same, rows with "prompt" and "answer"."""
    found = [terms for terms in product(DIGITS, repeat=4) if is_held_out(terms) == held_out]
    random.Random("order of the problems").shuffle(found)
    return [{"prompt": prompt_of(terms), "answer": str(answer_of(terms))} for terms in found]


def strategy_of(prompt: str, completion: str) -> str:
    """A key of ``STRATEGIES``, or "other" for what is none of them."""
    if not (equations := _EQUATION.findall(completion)):
        return "direct" if extract_answer(completion) is not None and "=" not in completion else "other"
    signs = "".join(sign for _, sign, _, _ in equations)
    asked = [sorted(map(int, pair.split("*"))) for pair in prompt.removesuffix("=").split("+")]
    given = [sorted((int(x), int(y))) for x, sign, y, _ in equations if sign == "*"]
    if signs not in ("**", "**+", "**++") or sorted(given) != sorted(asked):
        return "other"
    return {"**": "brief", "**++": "check"}.get(signs) or ("left" if given == asked else "right")


# Demonstrations


def demonstration(terms: Terms, rng: random.Random) -> str:
    """One solution, by a strategy of its own choice, perhaps wrong."""
    strategy = rng.choices(list(STRATEGIES), list(STRATEGIES.values()))[0]
    if strategy == "direct":
        total = answer_of(terms)
        return _boxed(_wrong(total, rng, width=25) if rng.random() < DIRECT_ERROR else total)
    pairs = [terms[:2], terms[2:]]
    steps = [_step(pair, "*", rng) for pair in (reversed(pairs) if strategy == "right" else pairs)]
    (_, x), (_, y) = steps
    if strategy == "brief":
        total = _step((x, y), "+", rng)[1]
    else:
        steps += [_step((x, y), "+", rng) for _ in range(2 if strategy == "check" else 1)]
        total = steps[-1][1]
    text = steps[0][0] + "".join(rng.choice(JOINS) + written for written, _ in steps[1:])
    return rng.choice(OPENERS) + text + rng.choice(CLOSERS) + _boxed(total)


def _step(terms: Sequence[int], sign: str, rng: random.Random) -> tuple[str, int]:
    """A step as it is written, and its result."""
    x, y = terms if rng.random() < 0.5 else (terms[1], terms[0])
    total = x * y if sign == "*" else x + y
    if rng.random() < STEP_ERROR:
        total = _wrong(total, rng, width=10)
    return f"{x}{sign}{y}={total}", total


def _wrong(total: int, rng: random.Random, *, width: int) -> int:
    """Off by up to ``width``, or by twenty: errors do not agree with each other."""
    return total + rng.choice([d for d in (*range(-width, width + 1), -20, 20) if d and total + d >= 0])


def _boxed(answer: int) -> str:
    return f"{_BOX}{answer}}}"


# Tokenizer and model


def arithmetic_tokenizer() -> Any:
    """Digits and signs are a token each, and so are the words around them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate((*SPECIAL, *"0123456789*+=}", *_WORDS))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    longest_first = sorted(_WORDS, key=len, reverse=True)
    pieces = "|".join(re.escape(word).replace(r"\ ", " ") for word in longest_first)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pieces}|[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="left", **names)


def arithmetic_model(settings: BaseSettings, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=settings.hidden_size,
            intermediate_size=3 * settings.hidden_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=True,
        )
    )


def _batches(settings: BaseSettings, tokenizer: Any) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (B, L) token ids and labels."""
    rng = random.Random(f"demonstrations {settings.seed}")
    known = [terms for terms in product(DIGITS, repeat=4) if not is_held_out(terms)]
    end, ignored = tokenizer.eos_token_id, -100
    while True:
        drawn = rng.choices(known, k=settings.batch_size)
        prompts = tokenizer([prompt_of(terms) for terms in drawn])["input_ids"]
        answers = tokenizer([demonstration(terms, rng) for terms in drawn])["input_ids"]
        width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + 1
        ids = [p + a + [end] for p, a in zip(prompts, answers, strict=True)]
        labels = [[ignored] * len(p) + a + [end] for p, a in zip(prompts, answers, strict=True)]
        yield (
            torch.tensor([row + [0] * (width - len(row)) for row in ids]),
            torch.tensor([row + [ignored] * (width - len(row)) for row in labels]),
        )


def train_base(settings: BaseSettings, *, log_every: int = 0) -> tuple[nn.Module, Any]:
    """The model and its tokenizer: cross-entropy on demonstrations, AdamW, warm-up and a cosine to zero."""
    tokenizer = arithmetic_tokenizer()
    model = arithmetic_model(settings, len(tokenizer)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = max(1, min(100, settings.steps // 10))

    def rate(step: int) -> float:
        return min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / settings.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    started = time.perf_counter()
    for step, (ids, labels) in zip(range(settings.steps), _batches(settings, tokenizer), strict=False):
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if log_every and (step + 1) % log_every == 0:
            print(f"step {step + 1}/{settings.steps} loss {loss:.3f} {time.perf_counter() - started:.0f} s", flush=True)
    return model.eval(), tokenizer


def arithmetic_base(folder: str | Path, settings: BaseSettings | None = None, *, log_every: int = 0) -> Path:
    """The folder of the base model with these settings below ``folder``, trained first if it is not there.

    It holds safetensors and a tokenizer, and loads with ``powerflow_fast.train``.
    """
    settings = settings or BaseSettings()
    text = json.dumps([asdict(settings), STRATEGIES, STEP_ERROR, DIRECT_ERROR, OPENERS, JOINS, CLOSERS])
    place = Path(folder) / f"arithmetic-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
    if place.is_dir():
        return place
    model, tokenizer = train_base(settings, log_every=log_every)
    unfinished = place.with_name(f"{place.name}-{os.getpid()}")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    try:
        unfinished.rename(place)  # at once: another process may be making the same
    except OSError:
        shutil.rmtree(unfinished)
    return place


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the base model of the studies of training.")
    parser.add_argument("--folder", default="runs/studies")
    parser.add_argument("--steps", type=int, default=BaseSettings.steps)
    options = parser.parse_args()
    print(arithmetic_base(options.folder, BaseSettings(steps=options.steps), log_every=100))
