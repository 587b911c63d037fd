"""Rollouts by ``transformers``' continuous batching: a finished sequence's place goes to the next one at once.

Its manager is built anew for every rollout. A kept one would answer from keys and values of the weights before the
last update, and its memory would stay taken while the policy trains.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from ..errors import ConfigError, RolloutError
from ..models.adapters import unwrap_peft
from ..models.modes import evaluating
from ..tools.random_state import seeded
from .engine import ModelEngine, Rollout, cast_once, checked_prompts, finished_rollout, places_of

# Keys and values are handed out in pages of so many tokens. Flash kernels read their tables in multiples of 256.
_PAGE, _FLASH_PAGE = 16, 256


class ContinuousBatchingEngine(ModelEngine):
    """Temperature sampling of the full softmax with ``transformers``' continuous batching.

    Equal prompts that all come equally often are prefilled once. The attention implementation, the training flags and
    the global random state are afterwards what they were.

    Args:
        temperature: > 0, the one that log-probs are scored at.
        max_completion_length: most tokens of a completion, end-of-sequence token included.
        batch_size: most sequences decoded at once.
        cache_tokens: tokens whose keys and values are kept at once. Bytes, in the model's dtype: ``cache_tokens *
            2 * layers * key-value heads * head size * element size``, rounded up to whole pages.
        max_batch_tokens: most tokens, prompt and new ones, of one forward. Without a flash kernel the attention mask
            takes ``max_batch_tokens * (cache_tokens + max_batch_tokens)`` elements.
        eos_ids: None finds them with :func:`powerflow_fast.rollout.engine.eos_token_ids`.
        autocast: makes the context that the model runs in.
    """

    name = "continuous"
    logps_are_free = True

    def __init__(self, *args: Any, cache_tokens: int, max_batch_tokens: int, **options: Any):
        super().__init__(*args, **options)
        self.cache_tokens, self.max_batch_tokens = cache_tokens, max_batch_tokens

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        seed: int,
        max_completion_length: int | None = None,
        return_logps: bool = False,
    ) -> Rollout:
        """See :meth:`RolloutEngine.generate`.

        Raises ConfigError where the longest sequence does not fit into ``cache_tokens``, and RolloutError, with the
        cause, where the engine fails: there is never a rollout with some of its completions missing.
        """
        prompts = checked_prompts(prompts)
        limit = max_completion_length or self.max_completion_length
        if not prompts:
            return Rollout([], [], [], [] if return_logps else None, self.weight_version)
        longest = max(map(len, prompts)) + limit
        if longest > self.cache_tokens:
            raise ConfigError(
                f"ContinuousBatchingEngine: cache_tokens={self.cache_tokens} must hold the longest prompt and its "
                f"completion, {longest} tokens; raise rollout_cache_tokens"
            )
        rows = places_of(prompts)
        if len({len(r) for r in rows.values()}) > 1:  # the manager knows one number of completions for all prompts
            requests, places = prompts, [[i] for i in range(len(prompts))]
        else:
            requests, places = [list(prompt) for prompt in rows], list(rows.values())
        lm = unwrap_peft(self.model)
        device = lm.get_input_embeddings().weight.device
        forward = _forward_in(lm, self.autocast)
        with evaluating(self.model), _attention_kept(lm), cast_once(lm), forward, seeded(seed, device):
            results = self._run(lm, requests, len(places[0]), seed, limit)
        outputs: list[Any] = [None] * len(prompts)
        for request, where in enumerate(places):
            for child, i in enumerate(where):
                outputs[i] = results[request, child]
        completions = [list(output.generated_tokens) for output in outputs]
        logps = [list(output.logprobs) for output in outputs] if return_logps else None
        return finished_rollout(self, prompts, completions, logps)

    @torch.no_grad()
    def _run(
        self, lm: Any, requests: list[list[int]], copies: int, seed: int, limit: int
    ) -> dict[tuple[int, int], Any]:
        """Outputs by (request, copy of it)."""
        from transformers import GenerationConfig

        page = _FLASH_PAGE if "flash" in lm.config._attn_implementation else _PAGE
        generation_config = GenerationConfig(
            do_sample=True,
            temperature=float(self.temperature),
            top_k=0,  # transformers' default is 50
            top_p=1.0,
            max_new_tokens=limit,
            eos_token_id=self.eos_ids or -1,  # None would stand for the model's own
            pad_token_id=self.pad_id,
            num_return_sequences=copies,
        )
        batching = batching_config(
            page,
            num_blocks=-(-self.cache_tokens // page),
            max_batch_tokens=self.max_batch_tokens,
            max_requests_per_batch=self.batch_size,
            return_logprobs=True,
            seed=seed,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        lm.destroy_cached_continuous_batching_manager()  # one that somebody kept has keys and values of older weights
        manager = lm.init_continuous_batching(generation_config=generation_config, continuous_batching_config=batching)
        # Before the start: what is drawn with which random numbers must not depend on how fast requests arrive.
        ids = manager.add_requests(requests, max_new_tokens=limit)
        # A child is the parent's id with a suffix, and may come back before it.
        keys = {name: (i, 0) for i, name in enumerate(ids)}
        keys |= {f"{name}__child#{c}": (i, c + 1) for i, name in enumerate(ids) for c in range(copies - 1)}
        results: dict[tuple[int, int], Any] = {}
        manager.start()
        try:
            while len(results) < len(keys):
                output = manager.get_result(timeout=1)
                if output is not None and output.is_finished():
                    if output.error is not None:
                        raise RolloutError(f"ContinuousBatchingEngine: a request failed: {output.error}")
                    results[keys[output.request_id]] = output
                elif output is None and not manager.is_running():
                    break
        finally:
            manager.stop(hard_stop=len(results) < len(keys))
            manager.destroy()
        if len(results) < len(keys):
            cause = manager.background_thread_status.fatal_error
            raise RolloutError(
                f"ContinuousBatchingEngine: {len(keys) - len(results)} of {len(keys)} completions did not come back "
                f"({cause or 'its thread ended'})"
            ) from cause
        return results


def batching_config(page: int, **options: Any) -> Any:
    """With pages of ``page`` tokens, by the name that this release of transformers has for them."""
    from transformers import ContinuousBatchingConfig

    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    options["page_size" if "page_size" in known else "block_size"] = page
    if "auto_switch_to_flash" in known:
        options["auto_switch_to_flash"] = False
    return ContinuousBatchingConfig(**options)


@contextmanager
def _attention_kept(lm: Any) -> Iterator[None]:
    """The manager may switch the attention implementation, and does not switch it back when it fails early.

    It is not to switch to a flash kernel: that may be downloaded, and would sample with another one than scores.
    Releases without an option for that leave alone what is called paged already.
    """
    from transformers import ContinuousBatchingConfig

    own = lm.config._attn_implementation
    if not hasattr(ContinuousBatchingConfig, "auto_switch_to_flash") and not any(w in own for w in ("flash", "paged")):
        lm.set_attn_implementation(f"paged|{own}")
    try:
        yield
    finally:
        if lm.config._attn_implementation != own:
            lm.set_attn_implementation(own)


@contextmanager
def _forward_in(lm: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Let ``lm.forward`` run in ``autocast()``, whichever thread calls it: autocast holds for one thread only.

    The cache has the weights' dtype, so what autocast makes smaller is widened again before it is stored.
    """
    patched = lm.__dict__.get("forward")  # such as accelerate's wrapper, put there on the instance
    inner = lm.forward
    threads: set[int] = set()

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs["cache"]
        if "update" not in vars(cache):
            cache.update = functools.partial(_update_in_its_dtype, cache, cache.update)
        if threading.get_ident() not in threads:
            # With its outermost context autocast drops its copies of the weights: keep one open, or every token of
            # every sequence would cast all weights anew.
            threads.add(threading.get_ident())
            torch.autocast_increment_nesting()
        with autocast():
            return inner(*args, **kwargs)

    lm.forward = forward
    try:
        yield
    finally:
        torch.clear_autocast_cache()  # the thread whose context was kept open has ended, and cannot
        if patched is None:
            del lm.forward
        else:
            lm.forward = patched


def _update_in_its_dtype(
    cache: Any, update: Callable[..., Any], key_states: Any, value_states: Any, *rest: Any, **options: Any
) -> Any:
    return update(key_states.to(cache.dtype), value_states.to(cache.dtype), *rest, **options)
