"""Language models so small that all of their completions can be listed, and exact or sampled training of one.

What such a model samples, what it should sample, and the distance between the two are known and not estimated. One is a
table of next-token logits, a row for each prefix (a prompt is a first token of its own): :class:`World`. The other is a
transformer, for the trainer and the samplers: :func:`enumerable_lm`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from powerflow_fast.objectives import LogZTable, Objective, Trajectories, resolve_objective

END = 0


def tilted(scores: Tensor, lengths: Tensor) -> Tensor:
    """exp(scores − λ|y|) with the λ that makes it sum to one over the last dimension."""
    low, high = scores.new_full((*scores.shape[:-1], 1), -50.0), scores.new_full((*scores.shape[:-1], 1), 50.0)
    for _ in range(100):
        middle = (low + high) / 2
        heavy = (scores - middle * lengths).exp().sum(-1, keepdim=True) > 1
        low, high = middle.where(heavy, low), high.where(heavy, middle)
    return (scores - low * lengths).exp()


LM_LETTERS = "abcde"
LM_END = LM_LETTERS.index("e")


def enumerable_lm(*, ends: bool) -> tuple[nn.Module, Any, list[tuple[int, ...]]]:
    """(model, tokenizer, every completion it can give): 3 tokens of 5, or up to 4 tokens ended by 'e' or the limit."""
    import transformers as tf
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(3)
    tokens = {"pad_token": "a"} | ({"eos_token": "e"} if ends else {})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(LM_LETTERS)}, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = tf.PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    config = tf.LlamaConfig(
        vocab_size=5,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=None,
        eos_token_id=LM_END if ends else None,
    )
    model = tf.LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 0.05)  # no completion is so rare that it is never drawn
    if not ends:
        return model, tokenizer, list(itertools.product(range(5), repeat=3))
    ended = [(*head, LM_END) for n in range(4) for head in itertools.product(range(LM_END), repeat=n)]
    return model, tokenizer, ended + list(itertools.product(range(LM_END), repeat=4))


@torch.no_grad()
def log_probs(model: nn.Module, words: Sequence[tuple[int, ...]]) -> Tensor:
    """(n,) exact log-prob of each completion after the prompt 'a', by plain transformers."""
    longest = max(map(len, words))
    ids = torch.tensor([[0, *word, *[0] * (longest - len(word))] for word in words])
    logps = model(ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    real = torch.arange(longest) < torch.tensor([len(word) for word in words])[:, None]
    return logps.where(real, 0.0).sum(1)


class World:
    """P prompts, each with all completions over a few letters: all of ``longest`` letters, or ``ends``: ended by letter
    0 or by that limit. Every tensor is fp64; n completions of a prompt, those of the first prompt first.

    Args:
        spread: standard deviation of the base model's logits.
        end_bias: added to the logit of letter 0.
        seed: of the base model and of ``rewards``, one uniform number for each completion.
    """

    def __init__(
        self,
        *,
        ends: bool,
        letters: int = 4,
        longest: int = 3,
        prompts: int = 1,
        spread: float = 1.0,
        end_bias: float = 0.0,
        seed: int = 1,
    ):
        g = torch.Generator().manual_seed(seed)
        words = [
            word
            for length in range(1, longest + 1)
            for word in itertools.product(range(letters), repeat=length)
            if (END not in word[:-1] and (word[-1] == END or length == longest) if ends else length == longest)
        ]
        self.prompts, self.words = prompts, words * prompts
        prefixes = sorted({word[:k] for word in words for k in range(len(word))})
        at = {prefix: i for i, prefix in enumerate(prefixes)}
        rows = torch.tensor([at[w[:k]] for w in words for k in range(len(w))])
        self.rows = torch.cat([rows + p * len(prefixes) for p in range(prompts)])
        self.letters = torch.tensor([letter for w in self.words for letter in w])
        self.lengths = torch.tensor([len(w) for w in self.words])
        self.cu_seqlens = torch.cat([torch.zeros(1), self.lengths.cumsum(0)]).int()
        self.group_ids = torch.arange(prompts).repeat_interleave(len(words))
        shape = (prompts * len(prefixes), letters)
        bias = torch.tensor([end_bias] + [0.0] * (letters - 1), dtype=torch.float64)
        self.base = (spread * torch.randn(shape, generator=g, dtype=torch.float64) + bias).log_softmax(1)
        self.rewards = torch.rand(len(self.words), generator=g, dtype=torch.float64)

    # Distributions, (P n,), each prompt's part with a sum of 1

    def tokens(self, table: Tensor) -> Tensor:
        """(N,) log-prob of every token of every completion."""
        return table.log_softmax(1)[self.rows, self.letters]

    def logp(self, table: Tensor) -> Tensor:
        """(P n,) exact log-prob of every completion, without a gradient."""
        tokens = self.tokens(table.detach())
        sums = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])[self.cu_seqlens.long()]
        return sums.diff()

    def power(self, alpha: float, bonus: Tensor | float = 0.0) -> Tensor:
        """p_base^α · exp(bonus) / Z."""
        return (alpha * self.logp(self.base) + bonus).view(self.prompts, -1).softmax(1).flatten()

    def tilted(self, alpha: float, bonus: Tensor | float = 0.0) -> Tensor:
        """p_base^α · exp(bonus − λ|y|) with the λ of each prompt that normalises it."""
        scores = (alpha * self.logp(self.base) + bonus).view(self.prompts, -1)
        lengths = self.lengths.double().view(self.prompts, -1)
        return tilted(scores, lengths).flatten()

    def tokenwise(self, alpha: float) -> Tensor:
        """p_base(token|state)^α normalised at every state."""
        return self.logp(alpha * self.base).exp()

    def mean(self, probabilities: Tensor, values: Tensor) -> float:
        """Mean of ``values`` (P n,) under each prompt's distribution, mean over the prompts."""
        return float(probabilities @ values.double()) / self.prompts

    # Training

    def batch(
        self, table: Tensor, alpha: float, drawn: Tensor | None = None, log_z: Tensor | None = None
    ) -> Trajectories:
        """The completions with the numbers ``drawn``, sampled from the table's own distribution; None: all of them.

        All completions together have behaviour probability 1/n each, so that the importance weight π(y) n turns means
        over the batch into expectations under π: on-policy, exact, without noise. (Not so for an objective whose
        importance weight is not that of whole completions, such as GRPO.)
        """
        at = self.places(drawn)
        fields: dict[str, object] = {}
        if drawn is None:
            drawn = torch.arange(len(self.words))
            fields["old_logps"] = -torch.repeat_interleave(
                math.log(len(self.words) / self.prompts) / self.lengths.double(), self.lengths
            )
            fields["clip"] = (0.0, 1e9)
        return Trajectories(
            logps=table.log_softmax(1)[self.rows[at], self.letters[at]],
            base_logps=self.base[self.rows[at], self.letters[at]],
            cu_seqlens=torch.cat([drawn.new_zeros(1), self.lengths[drawn].cumsum(0)]).int(),
            alpha=alpha,
            log_z=log_z,
            group_ids=self.group_ids[drawn],
            rewards=self.rewards[drawn],
            **fields,
        )

    def places(self, drawn: Tensor | None) -> Tensor:
        """Where in ``rows`` and ``letters`` the tokens of these completions are; None: of all."""
        if drawn is None:
            return torch.arange(len(self.rows))
        lengths = self.lengths[drawn]
        ends = lengths.cumsum(0)
        return torch.arange(int(ends[-1])) + (self.cu_seqlens[drawn] - (ends - lengths)).repeat_interleave(lengths)

    def draw(self, table: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """Numbers of ``number`` completions of each prompt, sampled from the table."""
        chances = self.logp(table).exp().view(self.prompts, -1)
        drawn = torch.multinomial(chances, number, replacement=True, generator=generator)
        return (drawn + torch.arange(self.prompts)[:, None] * chances.shape[1]).flatten()

    def train(
        self,
        objective: Objective,
        alpha: float,
        *,
        steps: int = 250,
        rate: float = 0.1,
        start: Tensor | None = None,
        samples: int | None = None,
        seed: int = 0,
        log_z: Tensor | LogZTable | None = None,
        log_z_rate: float | None = None,
        warm_start: bool = False,
        log_flows: Tensor | None = None,
        decay: bool = True,
        watch: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """The table after ``steps`` of Adam from ``start``. None is the base model; at α = 1 that is the target of most
        objectives, and Adam then makes full steps of rounding errors.

        Args:
            samples: completions of each prompt in a step, drawn from the table; None: all, exactly.
            log_z: (P,) or (1,) learned along, at ``log_z_rate``; a LogZTable, read before each update; None: the
                objective's own estimate from the batch.
            warm_start: begin ``log_z`` at the mean of that estimate in the first batch, as the trainer does.
            log_flows: (P prefixes,) learned along, for subtb.
            decay: bring the rates down to zero as a cosine.
            watch: called with the number of steps made and the table, before each step and after the last.
        """
        g = torch.Generator().manual_seed(seed)
        table = (self.base if start is None else start).clone().requires_grad_()
        learned = [t for t in (log_z, log_flows) if isinstance(t, Tensor)]
        groups = [{"params": [table]}, {"params": learned, "lr": rate if log_z_rate is None else log_z_rate}]
        optimizer = torch.optim.Adam(groups if learned else groups[:1], lr=rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if log_flows is not None:
            resolve_objective(objective, {"log_flows": None})
        for step in range(steps):
            if watch is not None:
                watch(step, table.detach())
            drawn = None if samples is None else self.draw(table, samples, g)
            if log_flows is not None:  # one flow for each prefix
                flows = log_flows[self.rows[self.places(drawn)]]
                objective = dataclasses.replace(objective, bound={**objective.bound, "log_flows": flows})
            batch = self.batch(table, alpha, drawn)
            if log_z is not None:
                if warm_start and step == 0 and isinstance(log_z, Tensor):
                    log_z.data.fill_(objective(batch).log_z.mean())
                batch = dataclasses.replace(batch, log_z=self._log_z(objective, batch, log_z))
            optimizer.zero_grad()
            objective(batch).loss.backward()
            optimizer.step()
            if decay:
                schedule.step()
        if watch is not None:
            watch(steps, table.detach())
        return table.detach()

    def _log_z(self, objective: Objective, batch: Trajectories, log_z: Tensor | LogZTable) -> Tensor:
        """(B,) of each completion's prompt."""
        if isinstance(log_z, Tensor):
            return log_z.expand(self.prompts)[batch.group_ids]
        own = objective(dataclasses.replace(batch, logps=batch.logps.detach())).log_z
        keys = batch.group_ids.tolist()
        values = log_z.get(keys, own)
        log_z.update(keys, own)
        return values
