"""Checks before training: is what we score what the model computes, what is sampled what we score, and packing safe?

All hold for every model this package was tested with. Where a new model, a patched one or another engine breaks
one, training would go on silently with a wrong gradient; so it is refused here, with the likely cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SelfCheckError
from ..models.adapters import unwrap_peft
from ..models.batches import Batch, PackedBatch, PaddedBatch, pack_batch, pad_batch
from ..models.head import head_inputs
from ..models.loading import pad_token_id
from ..models.logprob_model import CausalLMScorer
from ..models.modes import evaluating
from ..models.packed_attention import break_even
from ..rollout.engine import RolloutEngine

_MAX_PROMPTS = 4
_MAX_TOKENS = 32
# Least absolute tolerance, nats: fp32 leaves room for TF32 matrix products, the others for their rounded activations.
_FLOOR = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# Largest difference of two gradients relative to their norm; rounding alone made 1e-5, 7e-3 and 2e-2 of it in models
# of two layers. What leaks from one sequence into another changes a gradient by about its norm.
_GRADIENT_TOLERANCE = {torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_NEUTRAL: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0}
_PROCESSORS = (
    *_NEUTRAL,
    *("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "min_length"),
    *("min_new_tokens", "exponential_decay_length_penalty", "guidance_scale", "watermarking_config"),
)


@torch.no_grad()
def self_check(
    model: nn.Module | CausalLMScorer,
    tokenizer: Any,
    *,
    temperature: float,
    sample_prompts_ids: Sequence[Sequence[int]],
    engine: RolloutEngine | None = None,
    engine_temperature: float | None = None,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Raise SelfCheckError, naming the likely cause, unless all of this agrees on a few tokens of a few prompts:

    * the scorer's log-probs, on a padded batch, and ``log_softmax(model(ids).logits.float() / temperature)`` of each
      sequence alone;
    * the scorer in training mode and in eval mode: a policy with dropout left in is not the one that was sampled;
    * with ``engine``: the scorer's log-probs of freshly drawn tokens and those the engine says it drew them with, at
      ``engine_temperature`` if that is given.

    Pass the trainer's scorer as ``model`` to check that very object. The tolerance follows the dtype that the logits
    are computed in.
    """
    scorer = model if isinstance(model, CausalLMScorer) else CausalLMScorer(model)
    pad_id = pad_token_id(tokenizer, scorer.model)
    prompts = _few("self_check", sample_prompts_ids)
    device = scorer.head.weight.device
    batch = pad_batch([p[: len(p) // 2] for p in prompts], [p[len(p) // 2 :] for p in prompts], pad_id).to(device)
    with autocast():
        with evaluating(scorer.model):
            ours = scorer(batch, temperature=temperature).logps
            want = torch.cat([_model_logits(scorer.model, p)[len(p) // 2 - 1 : -1] for p in prompts])
        logps = (want.float() / temperature).log_softmax(-1).gather(-1, batch.labels[:, None])[:, 0]
        tolerance = _tolerance(want)
        if not torch.isfinite(want).all():
            raise SelfCheckError("self_check: the model's own logits hold infinities or NaN on ordinary prompts")
        if not _close(ours, logps, tolerance):
            cause = _explain_logits(scorer, batch, want)
            raise SelfCheckError(f"self_check: {_difference(ours, logps, tolerance, 'the model itself')}. {cause}")
        with evaluating(scorer.model):
            scorer.model.train()
            with torch.enable_grad():  # the code path of a training step
                trained = scorer(batch, temperature=temperature).logps.detach()
    if not _close(trained, ours, tolerance):
        raise SelfCheckError(
            f"self_check: {_difference(trained, ours, tolerance, 'eval mode', 'training mode')}. The model is random "
            "or different while it trains, such as by dropout, but it is sampled in eval mode; call "
            "disable_dropout(model) first"
        )
    if engine is not None:
        _check_engine(scorer, engine, prompts, pad_id, engine_temperature or temperature, tolerance, autocast)


def check_packing(
    scorer: CausalLMScorer,
    *,
    temperature: float,
    sample_prompts_ids: Sequence[Sequence[int]],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Raise SelfCheckError, naming the likely cause, unless packed sequences are scored as each of them alone.

    Compared are the log-probs, and the gradient of their sum with respect to all trained parameters together (extra
    memory: two gradients), in training mode and with the attention that the model has now. A model whose state or
    attention goes across the borders of packed sequences fails, whatever it is called.
    """
    prompts = _few("check_packing", sample_prompts_ids)
    # Prompts may be alike, and what leaks from one into its like does not show: so two of random tokens join them.
    rows, generator = unwrap_peft(scorer.model).get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    prompts += [torch.randint(rows, (n,), generator=generator).tolist() for n in (16, 6)]
    halves = [p[: len(p) // 2] for p in prompts], [p[len(p) // 2 :] for p in prompts]
    device = scorer.head.weight.device
    trained = [p for p in scorer.parameters() if p.requires_grad]

    lm = unwrap_peft(scorer.model)
    attention = lm.config._attn_implementation
    failure = f"check_packing: {type(lm).__name__} with {attention} attention cannot be packed"

    def scored(*batches: Batch) -> tuple[Tensor, Sequence[Tensor]]:
        try:
            with autocast():
                logps = torch.cat([scorer(batch.to(device), temperature=temperature).logps for batch in batches])
            return logps.detach(), torch.autograd.grad(logps.sum(), trained, materialize_grads=True) if trained else ()
        except Exception as error:  # a model says in its own way that it takes no position ids, a kernel what it lacks
            raise SelfCheckError(f"{failure}: it raises {type(error).__name__}: {error}") from error

    with evaluating(scorer.model), torch.enable_grad():
        scorer.model.train()
        want, gradient = scored(*(pad_batch([p], [c], 0) for p, c in zip(*halves, strict=True)))
        with torch.no_grad(), autocast():
            logits = _model_logits(scorer.model, prompts[0])
        # Rows of both kinds that training may make: see pack_batch.
        for kind in [None] if break_even(scorer.model, attention) is None else [None, 0.0]:
            batch = pack_batch(*halves, break_even=kind)
            got, packed_gradient = scored(batch)
            if not _close(got, want, tolerance := _tolerance(logits)):
                difference = _difference(got, want, tolerance, "a forward of its own", "the packed forward")
                raise SelfCheckError(f"{failure}: {difference}. {_explain_packing(batch, got, want, tolerance)}")
            norm = _norm(gradient)
            gap = _norm(a - b for a, b in zip(gradient, packed_gradient, strict=True))
            if not gap <= (tolerance := norm * _GRADIENT_TOLERANCE.get(logits.dtype, 1e-2)) < math.inf:  # nor NaN
                raise SelfCheckError(
                    f"{failure}: its log-probs are right, but their gradient, of norm {norm:.4g}, is off by {gap:.4g} "
                    f"(tolerance {tolerance:.2g}): the backward pass of its attention or state is wrong for packed rows"
                )


def _explain_packing(batch: PackedBatch, got: Tensor, want: Tensor, tolerance: float) -> str:
    begins = batch.prompt_positions[batch.prompt_lengths.cumsum(0) - batch.prompt_lengths]
    firsts = begins % batch.input_ids.shape[1] == 0
    firsts = firsts.repeat_interleave(batch.completion_lengths).to(got.device)
    if _close(got[firsts], want[firsts], tolerance):
        return (
            "Only the first of a row is right: the others see what lies before them, by an attention mask or a "
            "recurrent state of the model's own"
        )
    return "Even the first of a row is wrong: position ids mean something else to this model"


def _norm(tensors: Iterable[Tensor]) -> float:
    """Of all numbers together; one tensor at a time is held."""
    return math.hypot(*(float(torch.linalg.vector_norm(t, dtype=torch.float32)) for t in tensors))


def _few(name: str, sample_prompts_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """A few prompts, cut to a few tokens, at least two each."""
    prompts = [list(p[:_MAX_TOKENS]) for p in sample_prompts_ids if p][:_MAX_PROMPTS]
    if not prompts:
        raise SelfCheckError(f"{name}: sample_prompts_ids holds no prompt with a token")
    return [p if len(p) > 1 else p * 2 for p in prompts]


def _model_logits(model: nn.Module, ids: list[int]) -> Tensor:
    """(T, V) of one sequence without padding, by the model's own forward."""
    lm = unwrap_peft(model)
    tensor = torch.tensor([ids], device=lm.get_input_embeddings().weight.device)
    return lm(input_ids=tensor, attention_mask=torch.ones_like(tensor), use_cache=False).logits[0]


def _tolerance(logits: Tensor) -> float:
    # Half precision rounds each logit to one part in 1 / eps of its size; a few such steps lie between two code paths.
    return max(_FLOOR.get(logits.dtype, 5e-3), 4 * torch.finfo(logits.dtype).eps * float(logits.abs().max()))


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return bool(((a - b).abs() <= tolerance).all())  # False for NaN


def _difference(got: Tensor, want: Tensor, tolerance: float, other: str, who: str = "our scorer") -> str:
    gap = (got - want).abs().nan_to_num(nan=float("inf"))
    at = int(gap.argmax())
    return (
        f"a token's log-prob is {float(got[at]):.4f} by {who} and {float(want[at]):.4f} by {other} "
        f"(difference {float(gap[at]):.4g}, tolerance {tolerance:.2g})"
    )


def _explain_logits(scorer: CausalLMScorer, batch: PaddedBatch, want: Tensor) -> str:
    """Why the model's logits ``want`` (N, V) differ from the ones our head stands for; constants per row are free."""
    head = scorer.head
    with evaluating(scorer.model):
        states = head_inputs(scorer.model, scorer.head, batch.model_inputs())
    rows = states.flatten(0, 1)
    weight = head.weight.float()
    ours = nn.functional.linear(rows.float(), weight, None if head.bias is None else head.bias.float())
    ours = head.logit_scale * ours
    if head.logit_softcap is not None:
        ours = head.logit_softcap * torch.tanh(ours / head.logit_softcap)
    around = {k: ours.index_select(0, (batch.positions + k).clamp(0, len(rows) - 1)) for k in (-1, 0, 1)}
    ours, want = around[0], want.float()
    if not torch.isfinite(ours).all():
        return "The hidden states that reach the head hold infinities or NaN"

    def centred(x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    def explained(fit: Tensor) -> bool:  # at most rows: a shift has no neighbour at the ends
        target = centred(want)
        return float(((target - centred(fit)).norm(dim=-1) <= 0.02 * target.norm(dim=-1)).float().mean()) > 0.75

    a, b = centred(ours), centred(want)
    factor = float((a * b).sum() / (a * a).sum())
    if explained(factor * ours):
        return f"The model's logits differ from ours by a constant factor {factor:.4g}: a logit scale was missed"
    for shift in (-1, 1):
        if explained(around[shift]):
            return f"The model's logits fit our hidden states {abs(shift)} position off: predictions are misaligned"
    if explained(ours + (b - a).mean(0)):
        return "The model's logits differ from ours by an added constant per vocabulary entry: a bias was missed"
    ranks = ours.argsort(-1)
    if bool((want.gather(-1, ranks).diff() >= -1e-3 * want.abs().max()).all()):
        return (
            "The model's logits are a curved but monotone function of ours, at most "
            f"{float(want.abs().max()):.4g}: a saturating softcap was missed"
        )
    return "No scale, bias, softcap or shift explains it: the model computes its logits from something else"


def _check_engine(
    scorer: CausalLMScorer,
    engine: RolloutEngine,
    prompts: list[list[int]],
    pad_id: int,
    temperature: float,
    tolerance: float,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> None:
    device = scorer.head.weight.device

    def draw(prompts: list[list[int]]) -> tuple[PaddedBatch, Tensor]:
        rollout = engine.generate(prompts, seed=0, max_completion_length=8, return_logps=True)
        if rollout.logps is None:
            raise SelfCheckError("self_check: the engine gave no log-probs though return_logps=True")
        batch = pad_batch(rollout.prompt_ids, rollout.completion_ids, pad_id).to(device)
        return batch, torch.tensor([x for row in rollout.logps for x in row])

    def scored(batch: PaddedBatch, at: float) -> Tensor:
        with autocast(), evaluating(scorer.model):
            return scorer(batch, temperature=at).logps.cpu()

    def agree(batch: PaddedBatch, drawn: Tensor, at: float) -> bool:
        # The engine decodes token by token with a cache: other kernels, so more rounding than elsewhere. A wrong
        # distribution is wrong at most tokens, so the mean tells it apart in half precision.
        return float((scored(batch, at) - drawn).abs().mean()) <= tolerance  # False for NaN

    batch, drawn = draw(prompts)
    if agree(batch, drawn, temperature):
        return
    ours = scored(batch, temperature)
    own = getattr(unwrap_peft(scorer.model), "generation_config", None)
    left = {name: getattr(own, name, None) for name in _PROCESSORS}
    left = {k: v for k, v in left.items() if v not in (None, 0, 0.0, [], _NEUTRAL.get(k))}
    others = {1.0, float(left.get("temperature", 1.0)), 0.5 * temperature, 2 * temperature} - {temperature}
    if fits := [other for other in others if agree(batch, drawn, other)]:
        cause = f"The engine samples at temperature {fits[0]:g}, but scores are taken at {temperature:g}"
    elif all(agree(*draw([prompt]), temperature) for prompt in prompts):
        cause = (
            "Each prompt alone is sampled right: the model does not mask left padding, so prompts of different "
            "lengths cannot be decoded together; set rollout_batch_size=1"
        )
    else:
        cause = "The engine does not draw from the full softmax"
        if bool((drawn >= ours - tolerance).all()):
            cause += ": every drawn token is likelier there, as after top-k, top-p or min-p"
        if left:
            settings = ", ".join(f"{k}={v!r}" for k, v in left.items())
            cause += f"; the model's generation_config sets {settings}"
    raise SelfCheckError(f"self_check: {_difference(ours, drawn, tolerance, 'the sampling engine')}. {cause}")
