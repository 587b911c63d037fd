"""Evaluation: completions of a problem set, what they are worth and how they differ, each number with an interval."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy
import torch
from torch import nn

from ..data import PromptRow, encode_prompt
from ..errors import ConfigError, JudgeError, OutputDirError, ScorerError
from ..models.batches import runs
from ..models.loading import load_model
from ..models.modes import evaluating
from ..sampling.base import ModelSampler, Sampler
from ..sampling.registry import resolve_sampler
from ..tools.files import finite_or_none
from ..tools.progress import ProgressLine
from ..tools.provenance import git_commit
from ..tools.random_state import get_rng_state, set_rng_state
from ..version import __version__
from .diversity import Encoder, minilm_encoder, self_bleu
from .given_completions import read_completions
from .judge import Judge
from .likelihoods import check_vocabulary, fill_likelihoods, resolve_base
from .measures import (
    MEASURES,
    accuracy_measures,
    correct_counts,
    judge_measures,
    length_measures,
    lexical_measures,
    likelihood_measures,
    semantic_measures,
    tilt_measures,
)
from .problems import ProblemSet, load_problems
from .result import Evaluation, summed_statistics
from .scorers import Scorer, check_columns, fill_scores
from .statistics import mean_interval, pass_at_k
from .store import CompletionStore, weights_digest, write_result

logger = logging.getLogger(__name__)

# The groups that `measures` takes, and what they measure.
MEASURE_GROUPS = {
    "accuracy": ("accuracy", "majority", "distinct_answers"),
    "length": ("length", "finished"),
    "lexical": ("distinct_1", "distinct_2", "self_bleu", "repetition"),
    "semantic": ("semantic_diversity",),
    "judge": ("quality", "strategies"),
    "likelihood": ("entropy", "logp", "base_logp", "inversion_rate", "alpha", "tilt"),
}


def evaluate(
    model: str | Path | nn.Module | None,
    problems: Any,
    *,
    num_samples: int = 16,
    sampler: str | Sampler = "temperature=1",
    scorer: str | Scorer | None = "auto",
    ks: Sequence[int] | None = None,
    measures: Sequence[str] = ("accuracy", "length", "lexical"),
    encoder: Encoder | None = None,
    judge: Judge | None = None,
    base: str | Path | nn.Module | None = None,
    alpha: float | None = None,
    tokenizer: Any = None,
    completions: str | Path | Sequence[Mapping[str, Any]] | None = None,
    max_completion_length: int = 1024,
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    score_temperature: float = 1.0,
    name: str | None = None,
    output_dir: str | Path | None = None,
    confidence: float = 0.95,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    use_chat_template: bool | Literal["auto"] = "auto",
    system_prompt: str | None = None,
    progress: bool = False,
) -> Evaluation:
    """Sample completions of ``problems``, score and measure them, and give each mean its interval.

    A measure is one number for each prompt, of its ``num_samples`` completions; its mean over the prompts comes with a
    percentile bootstrap interval that resamples prompts. pass@k is the unbiased estimate (:func:`pass_at_k`) from the
    completions with a score of 1 or more.

    With ``output_dir`` every chunk of completions is on disk when the next one is drawn. A second call with the same
    folder, weights and settings of sampling goes on where the first was stopped, and only scores where all is sampled;
    what is sampled does not depend on where it was stopped. Scorer, measures, base and judge may be others.

    The model's train or eval mode and the states of all random generators are what they were before.

    Args:
        model: hub name, folder, or a loaded model. None where ``completions`` are given.
        problems: as for :func:`powerflow_fast.evaluation.load_problems`.
        num_samples: completions of each problem; of given completions their own number.
        sampler: "temperature=1", "power:alpha=4", "verbalized:answers=5", or an object
            (:mod:`powerflow_fast.sampling.registry`).
        scorer: a name, a function, None, or "auto" for the problem set's own.
        ks: the k of pass@k; None takes the powers of two up to ``num_samples``.
        measures: groups: "accuracy" (where there is a scorer), "length", "lexical", "semantic", "judge", "likelihood".
            An ``encoder``, a ``judge`` and a ``base`` add theirs.
        encoder: texts to embeddings (n, d), for "semantic"; None takes all-MiniLM-L6-v2.
        judge: a :class:`powerflow_fast.evaluation.Judge`.
        base: the model that log-probs are compared with: loaded, a name or folder, or "adapter_off".
        alpha: the exponent that the length tilt is estimated for; None estimates it too.
        tokenizer: instead of the one beside the model.
        completions: a .jsonl file or a list of completions made elsewhere
            (:func:`powerflow_fast.evaluation.given_completions.read_completions`); nothing is sampled.
        max_completion_length: tokens.
        batch_size: sequences at once.
        limit: at most so many problems, always the same ones.
        seed: of the sampling.
        score_temperature: log-probs and entropies are of softmax(logits / score_temperature).
        name: of the result, as tables show it; None takes the model's and the sampler's.
        confidence: of the intervals.
        dtype, trust_remote_code: of a model that is loaded here.
        use_chat_template, system_prompt: as in :func:`powerflow_fast.data.encode_prompt`.
        progress: a line on stderr.

    Raises:
        ConfigError: an argument out of range, k above ``num_samples``, measures without what they need.
        DataError: bad problems, or without a column that the scorer needs: before anything is sampled.
        OutputDirError: ``output_dir`` has an evaluation with other settings; what differs is named.
        ScorerError, JudgeError: nothing that was sampled is lost: it is in ``output_dir``, else in the error's
            ``completions``; a second call scores it.
    """
    groups = _checked_groups(measures, encoder, judge, base)
    _check_number("confidence", confidence, 0, 1)
    _check_number("score_temperature", score_temperature, 0, math.inf)
    if alpha is not None:
        _check_number("alpha", alpha, -math.inf, math.inf)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"evaluate: seed must be an integer, got {seed!r}")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"evaluate: name must be a text, got {name!r}")
    problem_set = load_problems(problems, limit=limit, scorer=scorer)
    if problem_set.scorer is None:
        if "accuracy" in groups and scorer is not None:
            logger.warning("%s: nothing says which answer is right, accuracy is not measured", problem_set.name)
        groups = tuple(g for g in groups if g != "accuracy")
    elif "accuracy" in groups:
        check_columns(problem_set.scorer, problem_set.rows)
    if completions is None:
        if model is None:
            raise ConfigError("evaluate: model must be a name, a folder or a model, got None without completions=")
        ks = _checked_ks(ks, num_samples)
    lm, model_name = None, None
    if model is not None:
        device = None if isinstance(model, nn.Module) else "cuda" if torch.cuda.is_available() else None
        loaded = load_model(model, tokenizer=tokenizer, dtype=dtype, trust_remote_code=trust_remote_code, device=device)
        lm, tokenizer, model_name = loaded.model, loaded.tokenizer, Path(loaded.name).name
    if "likelihood" in groups and lm is None:
        raise ConfigError("evaluate: measures of log-probs need a model, got model=None")
    if "lexical" in groups:
        self_bleu([])  # says now how to install what it needs
    if "semantic" in groups and encoder is None:
        encoder = minilm_encoder()
    base_model = None if base is None else resolve_base(base, lm, dtype=dtype)
    prompt_options = {"use_chat_template": use_chat_template, "system_prompt": system_prompt}
    ready, drawn_by = None, None
    if completions is not None:
        ready = read_completions(completions, problem_set.rows, tokenizer=tokenizer)
        num_samples, seed = len(ready) // len(problem_set), 0
        ks = _checked_ks(ks, num_samples)
        if "length" in groups and any(r["tokens"] is None for r in ready):
            raise ConfigError("evaluate: the length of given completions needs tokenizer=, or leave 'length' out")
    else:
        common = {"max_completion_length": max_completion_length, "batch_size": batch_size, **prompt_options}
        drawn_by = resolve_sampler(sampler, lm, tokenizer, **common)
        _check_sampler(drawn_by, problem_set.rows)
    if base_model is not None:
        prompts = (encode_prompt(row, tokenizer, **prompt_options) for row in problem_set.rows)
        check_vocabulary(base_model, tokenizer, {token for prompt in prompts for token in prompt})
    settings = {
        "model": model_name,
        "weights": None if lm is None else weights_digest(lm),
        "problems": problem_set.description,
        "problems_fingerprint": problem_set.fingerprint,
        "sampler": "given completions" if drawn_by is None else drawn_by.name,
        "sampler_settings": {"sha256": _digest(ready)} if drawn_by is None else drawn_by.settings,
        "num_samples": num_samples,
        "seed": seed,
        "scorer": None if problem_set.scorer is None else problem_set.scorer.name,
        "measures": list(groups),
        "base": None if base_model is None else base_model.name,
        "base_weights": None if base_model is None else base_model.fingerprint,
        "alpha": alpha,
        "score_temperature": score_temperature,
        "confidence": confidence,
        "version": __version__,
        "commit": git_commit(),
    }
    with CompletionStore(output_dir).begun(settings) as store, _unchanged(lm):
        if ready is not None:
            _take(store, ready)
        else:
            _sample(store, problem_set, drawn_by, num_samples, seed, batch_size, progress)
        if "accuracy" in groups:
            fill_scores(store, problem_set.rows, problem_set.scorer)
        if "likelihood" in groups:
            likelihood = {"base": base_model, "temperature": score_temperature, "batch_size": batch_size}
            fill_likelihoods(store, problem_set.rows, lm, tokenizer, **likelihood, **prompt_options)
        result = _measured(
            Evaluation(
                name=name or ", ".join(filter(None, (model_name, settings["sampler"]))),
                problems=problem_set.name,
                settings=finite_or_none(settings),
                measures={},
                per_prompt={},
                pass_at_k={},
                completions=store.records,
                tokens_generated=sum(r["generated_tokens"] or 0 for r in store.records),
                seconds=sum(r.get("seconds") or 0.0 for r in store.records),
                statistics=summed_statistics(store.records),
            ),
            problem_set,
            groups,
            ks,
            encoder=encoder,
            judge=judge,
            alpha=alpha,
            confidence=confidence,
            kept=store.kept,
        )
        if store.folder is not None:
            write_result(store.folder, result.to_dict())
    return result


def during_training(
    problems: Any, *, num_samples: int = 4, ks: Sequence[int] = (), limit: int | None = None, **options: Any
) -> Callable[[Any, Any, int], dict[str, float]]:
    """An ``eval_fn`` for :func:`powerflow_fast.train`: ``eval_fn(model, tokenizer, step) -> {measure: mean}``.

    The same problems, seed and settings at every step, so that the numbers of ``history.jsonl`` ("eval/accuracy",
    "eval/length", "eval/pass@4", ...) differ by the weights alone. ``options`` are those of :func:`evaluate`, with
    "accuracy" and "length" as the usual measures; with ``output_dir`` each step gets a folder ``step-N`` in it.
    OutputDirError at step 0 where there are such folders of an earlier run.
    """
    options.setdefault("measures", ("accuracy", "length"))
    fixed = load_problems(problems, limit=limit, scorer=options.pop("scorer", "auto"))
    folder = options.pop("output_dir", None)
    # Now rather than in the run, which has loaded its model by then.
    inspect.signature(evaluate).bind(None, fixed, **options)
    _checked_groups(options["measures"], *(options.get(name) for name in ("encoder", "judge", "base")))
    ks = _checked_ks(ks, num_samples)

    def eval_fn(model: Any, tokenizer: Any, step: int) -> dict[str, float]:
        if step == 0 and folder is not None:  # else a later step would end the run
            earlier = sorted(path.name for path in Path(folder).glob("step-*") if path.name != "step-0")
            if earlier:
                raise OutputDirError(
                    f"during_training: output_dir {folder} holds evaluations of an earlier run, such as {earlier[0]}; "
                    "remove them, or choose another output_dir"
                )
        place = None if folder is None else Path(folder) / f"step-{step}"
        given = {"tokenizer": tokenizer, "num_samples": num_samples, "ks": ks, "output_dir": place, **options}
        result = evaluate(model, fixed, **given)
        passed = {f"pass@{k}": m.value for k, m in result.pass_at_k.items()}
        return {name: m.value for name, m in result.measures.items()} | passed

    return eval_fn


def _checked_groups(measures: Sequence[str], encoder: Any, judge: Any, base: Any) -> tuple[str, ...]:
    """The groups that are asked for, in the order of MEASURE_GROUPS."""
    if isinstance(measures, str) or not isinstance(measures, Collection):
        raise ConfigError(f"evaluate: measures must be a list of groups, such as ['accuracy'], got {measures!r}")
    for group in measures:
        if group not in MEASURE_GROUPS:
            raise ConfigError(f"evaluate: measures must be among {', '.join(MEASURE_GROUPS)}, got {group!r}")
    if "judge" in measures and judge is None:
        raise ConfigError("evaluate: measures 'judge' needs judge=powerflow_fast.evaluation.Judge(base_url, model)")
    if judge is not None and not all(hasattr(judge, name) for name in ("quality_of_all", "strategies_of_all")):
        raise ConfigError(f"evaluate: judge must be a powerflow_fast.evaluation.Judge, got {judge!r}")
    if encoder is not None and not callable(encoder):
        raise ConfigError(f"evaluate: encoder must be a function of a list of texts, got {encoder!r}")
    if base is not None and not isinstance(base, (str, Path, nn.Module)):
        raise ConfigError(f"evaluate: base must be a model, a name, a folder or 'adapter_off', got {base!r}")
    wanted = set(measures)
    wanted |= {g for g, given in (("semantic", encoder), ("judge", judge), ("likelihood", base)) if given is not None}
    return tuple(group for group in MEASURE_GROUPS if group in wanted)


def _checked_ks(ks: Sequence[int] | None, num_samples: int) -> list[int]:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
        raise ConfigError(f"evaluate: num_samples must be a positive integer, got {num_samples!r}")
    if ks is None:
        return [2**i for i in range(num_samples.bit_length())]
    for k in ks if isinstance(ks, Collection) else [ks]:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ConfigError(f"evaluate: ks must be positive integers, got {k!r}")
        if k > num_samples:
            raise ConfigError(
                f"evaluate: pass@{k} needs at least {k} completions of each problem, num_samples is {num_samples}; "
                f"raise num_samples or lower k"
            )
    if not isinstance(ks, Collection):
        raise ConfigError(f"evaluate: ks must be a list of integers, such as [{ks}], got {ks!r}")
    return sorted(set(ks))


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low < value < high:
        limits = (
            f"between {low} and {high}" if high < math.inf else f"above {low}" if low > -math.inf else "that is finite"
        )
        raise ConfigError(f"evaluate: {name} must be a number {limits}, got {value!r}")


def _check_sampler(sampler: Sampler, rows: Sequence[PromptRow]) -> None:
    """What would stop it later, after other problems have been sampled."""
    try:
        json.dumps(sampler.settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"evaluate: settings of the sampler {sampler.name!r} must be JSON-able: {error}") from error
    if isinstance(sampler, ModelSampler):
        sampler.check(rows)


def _digest(records: Sequence[Mapping[str, Any]]) -> str:
    keys = ("problem", "sample", "completion", "ids")
    text = json.dumps([[r.get(key) for key in keys] for r in records])
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _unchanged(model: nn.Module | None) -> Iterator[None]:
    """The modes of the model's modules and the states of the random generators afterwards are those from before."""
    states, python, arrays = get_rng_state(), random.getstate(), numpy.random.get_state()
    try:
        if model is None:
            yield
        else:
            with evaluating(model):
                yield
    finally:
        set_rng_state(states)
        random.setstate(python)
        numpy.random.set_state(arrays)


_EMPTY = {"score": None, "answer": None, "logp": None, "base_logp": None, "entropy": None}


def _take(store: CompletionStore, ready: list[dict[str, Any]]) -> None:
    known = {(r["problem"], r["sample"]) for r in store.records}
    store.add([{**r, **_EMPTY, "seconds": 0.0} for r in ready if (r["problem"], r["sample"]) not in known])


def _sample(
    store: CompletionStore,
    problems: ProblemSet,
    sampler: Sampler,
    num_samples: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> None:
    """Sample what the store lacks. The chunks are always the same ones, so that a resumed run has the same batches."""
    done = {(r["problem"], r["sample"]) for r in store.records}
    line = ProgressLine(len(problems)) if progress else None
    for chunk in runs(len(problems), max(1, batch_size // num_samples)):
        wanted = {(i, j) for i in chunk for j in range(num_samples)}
        if missing := wanted - done:
            started = time.perf_counter()
            before = _statistics(sampler)
            drawn = sampler.sample([problems.rows[i] for i in chunk], num_samples=num_samples, seed=seed)
            if [len(group) for group in drawn] != [num_samples] * len(chunk):
                raise ConfigError(
                    f"evaluate: the sampler {sampler.name!r} must give {num_samples} completions for each of "
                    f"{len(chunk)} problems, got {[len(group) for group in drawn]}"
                )
            counted = {key: value - before.get(key, 0) for key, value in _statistics(sampler).items()}
            seconds = (time.perf_counter() - started) / len(wanted)
            new = [
                {
                    "problem": i,
                    "sample": j,
                    "prompt": problems.rows[i].prompt,
                    "completion": one.text,
                    "tokens": len(one.ids),
                    "generated_tokens": one.generated_tokens,
                    "finished": one.finished,
                    **_EMPTY,
                    "seconds": seconds,
                    "note": getattr(one, "note", ""),
                    "ids": list(one.ids),
                }
                for i, group in zip(chunk, drawn, strict=True)
                for j, one in enumerate(group)
                if (i, j) in missing
            ]
            # With the first record of the chunk: there they are as safe as the chunk, and counted once.
            if counted and not any(r.get("statistics") for r in store.records if r["problem"] in chunk):
                new[0]["statistics"] = counted
            store.add(new)
        if line is not None:
            line.update({"step": chunk[-1] + 1})
    if line is not None:
        line.close()
    store.save()


def _statistics(sampler: Sampler) -> dict[str, float]:
    """What the sampler has counted so far, where it counts."""
    return dict(getattr(sampler, "statistics", None) or {})


def _measured(
    result: Evaluation,
    problems: ProblemSet,
    groups: Sequence[str],
    ks: Sequence[int],
    *,
    encoder: Encoder | None,
    judge: Judge | None,
    alpha: float | None,
    confidence: float,
    kept: str,
) -> Evaluation:
    """``result`` with its measures filled in."""
    records: list[list[dict[str, Any]]] = [[] for _ in problems.rows]
    for record in result.completions:
        records[record["problem"]].append(record)
    found: dict[str, list[float]] = {}
    if "accuracy" in groups:
        found |= accuracy_measures(records, problems.scorer)
        correct, sizes = correct_counts(records), [len(group) for group in records]
        result.pass_at_k = {k: mean_interval(pass_at_k(correct, sizes, k), confidence=confidence) for k in ks}
    if "length" in groups:
        found |= length_measures(records)
    if "lexical" in groups:
        found |= lexical_measures(records)
    if "semantic" in groups:
        try:
            found |= semantic_measures(records, encoder)
        except Exception as error:  # whatever a user's encoder raises, or what its vectors lack
            reason = f"{type(error).__name__}: {error}"
            message = f"the encoder failed ({reason}). Nothing is lost: {kept}"
            raise ScorerError(message, completions=result.completions) from error
    if "likelihood" in groups:
        found |= likelihood_measures(records)
    if "judge" in groups:
        try:
            found |= judge_measures(records, problems.rows, judge)
        except JudgeError as error:
            message = f"{str(error).rstrip('.')}. Nothing is lost: {kept}"
            raise JudgeError(message, done=error.done, total=error.total, completions=result.completions) from error
    means = {measure: mean_interval(values, confidence=confidence) for measure, values in found.items()}
    if "inversion_rate" in found:
        means |= tilt_measures(records, alpha=alpha, confidence=confidence)
    result.per_prompt = {measure: found[measure] for measure in MEASURES if measure in found}
    result.measures = {measure: means[measure] for measure in MEASURES if measure in means}
    return result
