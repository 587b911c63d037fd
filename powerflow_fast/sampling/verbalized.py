"""Verbalized sampling: the model writes several answers with their probabilities, and one of them is drawn.

Zhang et al., "Verbalized Sampling" (arXiv 2510.01171): a prompt that asks for a distribution gets more diverse answers
from an aligned model than one that asks for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy
from torch import nn

from ..data import PromptRow
from ..errors import ConfigError
from ..models.loading import max_positions
from ..rollout.seeded import Draw
from ..tools.random_state import random_stream
from .base import Completion, ModelSampler, check_number

INSTRUCTION = """\
Do not answer the request below just once. Write {answers} different answers to it, as though each were drawn at \
random from everything that you might say, and state for each how probable it is that you would say it, as a number \
from 0 to 1. Write every answer in this form, and nothing else:
<answer probability="...">the whole answer</answer>

The request:
{request}"""

DIRECT = "verbalized sampling: no answer could be read in two replies; the model was asked directly"

# An answer reaches to its closing tag, to the next answer, or to the end of the reply.
_ANSWER = re.compile(r"<answer\b(?P<head>[^>]*)>(?P<text>.*?)(?P<end></answer\s*>|(?=<answer\b)|\Z)", re.I | re.S)
_PROBABILITY = re.compile(
    r"prob\w*\s*[=:]\s*[\"']?\s*(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)(?![\d.])", re.I
)


def read_answers(reply: str, *, finished: bool = True) -> list[tuple[str, float | None]]:
    """The answers of a reply with their probabilities as stated, None where there is no number from 0 to
    100.

    ``30%`` is 0.3. Text around the answers is passed over, as are empty answers. A closing tag may be missing, but of
    an unfinished reply the answer that it breaks off in does not count.
    """
    answers: list[tuple[str, float | None]] = []
    for match in _ANSWER.finditer(reply):
        text = match["text"].strip()
        if not text or (not finished and match.end() == len(reply) and not match["end"]):
            continue
        found = _PROBABILITY.search(match["head"])
        probability = None
        if found:
            percent = match["head"][found.end() :].lstrip().startswith("%")
            probability = float(found["number"]) / (100 if percent else 1)
            if not 0 <= probability <= 100:  # those from 1 on may mean percent, which normalising makes no matter
                probability = None
        answers.append((text, probability))
    return answers


class VerbalizedSampler(ModelSampler):
    """Asks in one prompt for ``answers`` answers with their probabilities, and draws one by them.

    The stated probabilities are normalised. Where one of a reply's answers has none, or all are 0, the answers count
    alike. Every completion has a reply of its own, so it costs all tokens of that reply. A reply without an answer that
    can be read is asked for once more; after a second one the model is asked directly, and the completion says so in
    its ``note``.

    ``statistics`` counts over all calls: ``replies``, ``answers`` read, ``unreadable_replies``, ``uniform_draws`` (the
    probabilities could not be used), ``direct_answers`` (completions with a note) and ``generated_tokens``.

    A completion's ``ids`` are those of the drawn text by itself, with an end-of-sequence token; a text of more than
    ``max_completion_length`` tokens is cut and not finished.

    Args:
        answers: asked for in one reply, >= 2.
        temperature: that replies are decoded at, >= 0.
        reply_length: most tokens of a reply; None is ``answers * max_completion_length``, or what the model has
            positions for.
        common: as for :class:`~powerflow_fast.sampling.TemperatureSampler`.

    Raises:
        ConfigError: an argument out of range, or a tokenizer without a chat template: a model that was never taught to
            follow a request cannot be asked for a distribution.

    Source: Zhang et al. (arXiv 2510.01171), its standard form with 5 answers; the wording is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        answers: int = 5,
        temperature: float = 1.0,
        reply_length: int | None = None,
        **common: Any,
    ):
        check_number("VerbalizedSampler", "answers", answers, least=2, whole=True)
        if reply_length is not None:
            check_number("VerbalizedSampler", "reply_length", reply_length, least=1, whole=True)
        super().__init__(model, tokenizer, temperature=temperature, **common)
        if getattr(tokenizer, "chat_template", None) is None or self.prompt_options["use_chat_template"] is False:
            raise ConfigError(
                "VerbalizedSampler: needs a chat template, since the model is asked for answers in words; use a chat "
                "model, or another sampler such as 'temperature=1.5'"
            )
        self.answers, self.reply_length = answers, reply_length
        self.name = f"verbalized sampling, {answers} answers"
        self.settings |= {
            "sampler": "verbalized",
            "answers": answers,
            "reply_length": reply_length,
            "instruction": INSTRUCTION,
        }
        names = ("replies", "answers", "unreadable_replies", "uniform_draws", "direct_answers", "generated_tokens")
        self.statistics: dict[str, int] = dict.fromkeys(names, 0)

    def sample(self, rows: Sequence[PromptRow], *, num_samples: int, seed: int) -> list[list[Completion]]:
        """See :meth:`powerflow_fast.sampling.Sampler.sample`."""
        check_number("sample", "num_samples", num_samples, least=1, whole=True)
        direct, asking = self.encode(rows), self.encode([self._asking(row) for row in rows])
        places = [(row, j) for row in range(len(rows)) for j in range(num_samples)]
        done: dict[tuple[int, int], Completion] = {}
        spent = dict.fromkeys(places, 0)
        for attempt in ("reply", "retry", "direct"):
            left = [place for place in places if place not in done]
            if not left:
                break
            prompts = asking if attempt != "direct" else direct
            limits = [
                self._reply_limit(len(prompts[row])) if attempt != "direct" else self.settings["max_completion_length"]
                for row, _ in left
            ]
            streams = [random_stream("verbalized", attempt, seed, direct[row], j) for row, j in left]
            draws = self.decoder.draw(
                [prompts[row] for row, _ in left], [s.random(n) for s, n in zip(streams, limits, strict=True)]
            )
            for place, stream, one in zip(left, streams, draws, strict=True):
                spent[place] += len(one.ids)
                self.statistics["generated_tokens"] += len(one.ids)
                if attempt == "direct":
                    self.statistics["direct_answers"] += 1
                    done[place] = self.completion(one.ids, one.finished, spent[place], DIRECT)
                elif (found := self._drawn(one, stream, spent[place])) is not None:
                    done[place] = found
        return [[done[row, j] for j in range(num_samples)] for row in range(len(rows))]

    def check(self, rows: Sequence[PromptRow]) -> None:
        """As the base class; of the prompts that ask for answers too."""
        super().check(rows)
        limit = self.reply_length or 1  # without one it is what there is room for
        self._check_room(rows, self.encode([self._asking(row) for row in rows]), limit, "reply_length")

    def _asking(self, row: PromptRow) -> PromptRow:
        """The row with its last message put into the instruction."""
        messages = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt
        content = INSTRUCTION.format(answers=self.answers, request=messages[-1]["content"])
        return PromptRow([*messages[:-1], {**messages[-1], "content": content}], where=row.where)

    def _reply_limit(self, prompt_length: int) -> int:
        if self.reply_length is not None:
            return self.reply_length
        wanted = self.answers * self.settings["max_completion_length"]
        positions = max_positions(self.decoder.model)
        return wanted if positions is None else max(1, min(wanted, positions - prompt_length))

    def _drawn(self, reply: Draw, stream: numpy.random.Generator, spent: int) -> Completion | None:
        """One of the reply's answers, or None where it has none."""
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        answers = read_answers(text, finished=reply.finished)
        self.statistics["replies"] += 1
        self.statistics["answers"] += len(answers)
        if not answers:
            self.statistics["unreadable_replies"] += 1
            return None
        weights = [p for _, p in answers if p is not None]
        if len(weights) < len(answers) or sum(weights) == 0:
            self.statistics["uniform_draws"] += 1
            weights = [1.0] * len(answers)
        chosen = answers[int(stream.choice(len(answers), p=numpy.divide(weights, sum(weights))))][0]
        limit = self.settings["max_completion_length"]
        ids = self.tokenizer(chosen, add_special_tokens=False)["input_ids"]
        ids = ids + (reply.ids[-1:] if reply.finished else list(self.decoder.eos_ids[:1]))
        if len(ids) > limit:
            return self.completion(ids[:limit], False, spent)
        return Completion(chosen, ids, True, spent)
