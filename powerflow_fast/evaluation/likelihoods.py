"""Log-probs of the completions of an evaluation, under the model and its base."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..data import PromptRow, encode_prompt
from ..errors import ConfigError, ModelError
from ..models.adapters import is_peft
from ..models.batches import PaddedBatch, pad_batch, runs
from ..models.loading import load_model, max_positions, pad_token_id, weights_fingerprint
from ..models.logprob_model import BaseScorer, CausalLMScorer, ScorerOutput
from ..models.modes import evaluating
from ..ops.segments import segment_sum
from .store import CompletionStore, weights_digest


def scored_batches(
    scorer: CausalLMScorer,
    prompts: Sequence[list[int]],
    completions: Sequence[list[int]],
    *,
    temperature: float,
    pad_id: int,
    batch_size: int,
) -> Iterator[tuple[Sequence[int], PaddedBatch, ScorerOutput]]:
    """Completions in their order, ``batch_size`` at once: their places, the batch, and its scores with ``stats``."""
    for part in runs(len(prompts), batch_size):
        batch = pad_batch([prompts[i] for i in part], [completions[i] for i in part], pad_id)
        batch = batch.to(scorer.head.weight.device)
        with torch.no_grad(), evaluating(scorer.model):
            out = scorer(batch, temperature=temperature, need_stats=True)
        yield part, batch, out


@dataclass(frozen=True)
class BaseModel:
    """The base model that completions are compared under: its scorer, and what tells it from another."""

    scorer: BaseScorer
    name: str
    fingerprint: str
    rows: int
    """Size of its vocabulary."""
    tokenizer: Any = None
    """Its own, where it was loaded here; None: that of the policy."""


def resolve_base(base: str | Path | nn.Module, policy: nn.Module | None, *, dtype: Any = "auto") -> BaseModel:
    """``base`` as a loaded model, a name or folder, or "adapter_off": ``policy``, a PeftModel, without its adapter."""
    if isinstance(base, str) and base == "adapter_off":
        if policy is None or not is_peft(policy):
            got = "model=None" if policy is None else f"a {type(policy).__name__}"
            raise ConfigError(
                f"evaluate: base='adapter_off' needs a PeftModel as the model, got {got}; pass the base model itself"
            )
        scorer = BaseScorer(CausalLMScorer(policy), mode="adapter_off", frozen=policy.disable_adapter)
        return BaseModel(scorer, "adapter off", weights_fingerprint(policy), len(scorer.scorer.head.weight))
    device = None if policy is None else next(policy.parameters()).device
    if isinstance(base, nn.Module):
        name, model, tokenizer = getattr(base, "name_or_path", "") or type(base).__name__, base, None
    else:
        loaded = load_model(base, dtype=dtype, device=device)
        name, model, tokenizer = loaded.name, loaded.model, loaded.tokenizer
    scorer = BaseScorer(CausalLMScorer(model), mode="copy")
    return BaseModel(scorer, Path(name).name, weights_digest(model), len(scorer.scorer.head.weight), tokenizer)


def fill_likelihoods(
    store: CompletionStore,
    rows: Sequence[PromptRow],
    model: nn.Module,
    tokenizer: Any,
    *,
    base: BaseModel | None,
    temperature: float,
    batch_size: int,
    use_chat_template: bool | Literal["auto"] = "auto",
    system_prompt: str | None = None,
) -> None:
    """Give each record its "logp" (nats, all tokens of the completion), its "entropy" (mean over the tokens, nats; None
    without tokens), and its "base_logp" where there is a base, all of softmax(logits / temperature).

    Records that have them are passed over. What is done when something fails is kept; a number that is not finite is a
    ModelError.
    """
    todo = [r for r in store.records if r.get("logp") is None or (base is not None and r.get("base_logp") is None)]
    if not todo:
        return
    if missing := [r for r in todo if r.get("ids") is None]:
        raise ConfigError(
            f"evaluate: measures of log-probs need token ids; the completion {missing[0]['sample']} of problem "
            f"{missing[0]['problem']} has none: pass tokenizer="
        )
    scorer, largest = CausalLMScorer(model), max((max(r["ids"], default=0) for r in todo), default=0)
    if largest >= (vocabulary := len(scorer.head.weight)):
        raise ConfigError(f"evaluate: 'ids' of the completions hold the token {largest}, the model has {vocabulary}")
    device, pad = scorer.head.weight.device, pad_token_id(tokenizer, model)
    options = {"use_chat_template": use_chat_template, "system_prompt": system_prompt}
    prompts = {i: encode_prompt(rows[i], tokenizer, **options) for i in sorted({r["problem"] for r in todo})}
    if base is not None:
        check_vocabulary(base, tokenizer, {*chain(*prompts.values()), *chain(*(r["ids"] for r in todo))})
    positions = max_positions(model)
    for record in todo if positions is not None else ():
        if (length := len(prompts[record["problem"]]) + len(record["ids"])) > positions:
            raise ConfigError(
                f"evaluate: the completion {record['sample']} of problem {record['problem']} has {length} tokens "
                f"with its prompt, but the model has positions for {positions}; leave the measures of log-probs out"
            )
    # Alike lengths waste little padding, and the longest come first: where memory does not do, it shows at once.
    todo.sort(key=lambda r: len(prompts[r["problem"]]) + len(r["ids"]), reverse=True)
    try:
        new = [r for r in todo if r.get("logp") is None]
        texts = [prompts[r["problem"]] for r in new], [r["ids"] for r in new]
        for part, batch, out in scored_batches(
            scorer, *texts, temperature=temperature, pad_id=pad, batch_size=batch_size
        ):
            entropy = segment_sum(out.stats.entropy, out.cu_seqlens) / batch.completion_lengths
            found = {"logp": segment_sum(out.logps, out.cu_seqlens).tolist(), "entropy": entropy.tolist()}
            _fill([new[i] for i in part], found, "the model")
        new = [] if base is None else [r for r in todo if r.get("base_logp") is None]
        for part in runs(len(new), batch_size):
            records = [new[i] for i in part]
            batch = pad_batch([prompts[r["problem"]] for r in records], [r["ids"] for r in records], pad).to(device)
            logps = base.scorer.score(batch, temperature=temperature)
            _fill(records, {"base_logp": segment_sum(logps, batch.cu_seqlens).tolist()}, f"base {base.name!r}")
    finally:
        store.save()


def check_vocabulary(base: BaseModel, tokenizer: Any, used: set[int]) -> None:
    """ConfigError where the base has no token of ``used``, or reads other text in it than the model does."""
    ids = sorted(used)
    if ids and ids[-1] >= base.rows:
        raise ConfigError(
            f"evaluate: base {base.name!r} must share the model's vocabulary; token {ids[-1]} is beyond its {base.rows}"
        )
    if base.tokenizer is None:
        return
    texts = zip(tokenizer.convert_ids_to_tokens(ids), base.tokenizer.convert_ids_to_tokens(ids), strict=True)
    for token, (own, other) in zip(ids, texts, strict=True):
        if own != other:
            raise ConfigError(
                f"evaluate: base {base.name!r} must share the model's vocabulary; token {token} is {own!r} to the "
                f"model and {other!r} to the base"
            )


def _fill(records: Sequence[dict[str, Any]], found: Mapping[str, Sequence[float]], under: str) -> None:
    """``found`` into the records, if all of it is numbers; a completion without tokens has no entropy."""
    for name, values in found.items():
        for record, value in zip(records, values, strict=True):
            if record["ids"] and not math.isfinite(value):
                raise ModelError(
                    f"evaluate: {name} of the completion {record['sample']} of problem {record['problem']} is {value} "
                    f"under {under}; are its weights finite?"
                )
    for k, record in enumerate(records):
        record.update({name: values[k] for name, values in found.items()})
        if not record["ids"]:
            record["entropy"] = None
