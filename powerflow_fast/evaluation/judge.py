"""A language model as judge of quality and of strategies, behind any endpoint that speaks OpenAI's chat completions."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, JudgeError
from .judge_prompts import (
    QUALITY_REMINDER,
    STRATEGY_REMINDER,
    quality_prompt,
    read_quality,
    read_strategies,
    strategy_order,
    strategy_prompt,
)

T = TypeVar("T")
_UNFIT = (400, 413, 422)  # statuses by which an endpoint turns down one prompt: a content filter, too many tokens


class Judge:
    """Asks a model for opinions, remembers each answer, and goes on where it stopped.

    Every reply is appended to ``cache`` as it comes, one JSON object per line, under a hash of model, temperature and
    prompt. When the endpoint fails for good, :class:`JudgeError` says how many prompts are done; the same call again,
    in the same process or in another with the same cache, asks only for the others.

    Args:
        base_url: of the endpoint, as in ``http://localhost:8000/v1``.
        model: its name there.
        api_key: sent as a bearer token; None sends a placeholder, which local servers ignore.
        cache: a JSONL file, made if need be; one process at a time. None remembers for the life of this object.
        temperature: of the judge; None leaves it to the endpoint, for models that take none.
        max_retries: of one request, with growing pauses, on connection errors, time-outs and statuses 408, 409, 429
            and 5xx.
        timeout: seconds until a request counts as failed.
        concurrency: requests under way at once.

    Raises:
        ConfigError: an option out of range; openai is not installed.
        JudgeError: ``cache`` holds something else than replies.
    """

    unreadable: int
    """Opinions that are missing because no reply could be read, so far."""
    requests: int
    """Prompts that the endpoint has answered, so far: those that the cache knew are not among them."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        cache: str | Path | None = None,
        temperature: float | None = 0.0,
        max_retries: int = 4,
        timeout: float = 120.0,
        concurrency: int = 4,
    ):
        if not isinstance(base_url, str) or not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"Judge: base_url must start with http:// or https://, got {base_url!r}")
        if not isinstance(model, str) or not model:
            raise ConfigError(f"Judge: model must be a name, got {model!r}")
        if temperature is not None and not 0 <= temperature < math.inf:
            raise ConfigError(f"Judge: temperature must be at least 0, or None, got {temperature}")
        if max_retries < 0:
            raise ConfigError(f"Judge: max_retries must be at least 0, got {max_retries}")
        if not 0 < timeout < math.inf:
            raise ConfigError(f"Judge: timeout must be a positive number of seconds, got {timeout}")
        if concurrency < 1:
            raise ConfigError(f"Judge: concurrency must be at least 1, got {concurrency}")
        try:
            import openai
        except ImportError as error:
            raise ConfigError(f"Judge needs openai ({error}); run: pip install 'powerflow-fast[eval]'") from error
        self.base_url, self.model, self.concurrency = base_url, model, concurrency
        self.temperature = None if temperature is None else float(temperature)  # 0 and 0.0 are one key of the cache
        self.cache = None if cache is None else Path(cache)
        self.unreadable = self.requests = 0
        self._lock = threading.Lock()
        self._replies = {} if self.cache is None else _read_cache(self.cache)
        # None would make the client take a key from the environment and send it to whatever endpoint this is.
        key = "none" if api_key is None else api_key
        self._client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=max_retries, timeout=timeout)

    @property
    def settings(self) -> dict[str, Any]:
        """What its opinions depend on, for JSON."""
        return {"model": self.model, "temperature": self.temperature}

    def quality(self, question: str, completions: Sequence[str]) -> list[float]:
        """A grade from 1 (unusable) to 10 (hardly to be improved) for each completion, each judged by itself.

        NaN where the reply could not be read, twice; :attr:`unreadable` counts these and a warning names them. Raises
        as :meth:`ask`.
        """
        return self.quality_of_all([(question, completions)])[0]

    def quality_of_all(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """:meth:`quality` of each (question, completions), asked for all at once."""
        _checked(groups)
        prompts = [quality_prompt(question, text) for question, texts in groups for text in texts]
        scores = iter(self._opinions(prompts, [read_quality] * len(prompts), QUALITY_REMINDER))
        return [[math.nan if (s := next(scores)) is None else s for _ in texts] for _, texts in groups]

    def strategies(self, question: str, completions: Sequence[str]) -> list[int] | None:
        """The number of each completion's group, from 0 in the order of first appearance; completions of one group take
        the same approach to ``question``. Their diversity is the number of groups, ``len(set(...))``.

        The judge sees the distinct completions in an order of its own, the same for any order of ``completions``. None
        where the reply could not be read, twice; :attr:`unreadable` counts these and a warning names them. Nothing is
        asked about fewer than two different completions. Raises as :meth:`ask`.
        """
        return self.strategies_of_all([(question, completions)])[0]

    def strategies_of_all(self, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[int] | None]:
        """:meth:`strategies` of each (question, completions), asked for all at once."""
        _checked(groups)
        orders = [strategy_order(question, completions) for question, completions in groups]
        asked = [i for i, order in enumerate(orders) if len(order) > 1]
        prompts = [strategy_prompt(groups[i][0], orders[i]) for i in asked]
        readers = [functools.partial(read_strategies, count=len(orders[i])) for i in asked]
        found: dict[int, list[int] | None] = dict(
            zip(asked, self._opinions(prompts, readers, STRATEGY_REMINDER), strict=True)
        )
        return [
            _numbered(completions, order, found.get(i, [0] * len(order)))
            for i, ((_, completions), order) in enumerate(zip(groups, orders, strict=True))
        ]

    def _opinions(
        self, prompts: Sequence[str], readers: Sequence[Callable[[str], T | None]], reminder: str
    ) -> list[T | None]:
        """What each reader makes of its prompt's reply; where that is None, of the reply to prompt and reminder."""
        opinions = [read(reply) for read, reply in zip(readers, self.ask(prompts), strict=True)]
        again = [i for i, opinion in enumerate(opinions) if opinion is None]
        replies = self.ask([prompts[i] + reminder for i in again])
        for i, reply in zip(again, replies, strict=True):
            opinions[i] = readers[i](reply)
        if unread := [reply for i, reply in zip(again, replies, strict=True) if opinions[i] is None]:
            self.unreadable += len(unread)
            warnings.warn(
                f"Judge: {len(unread)} of {len(prompts)} opinions of {self.model} are missing: its replies could not "
                f"be read, asked twice. One ended with {unread[0][-200:]!r}",
                RuntimeWarning,
                stacklevel=4,
            )
        return opinions

    def ask(self, prompts: Sequence[str]) -> list[str]:
        """The model's reply to each prompt; equal prompts are asked once.

        A prompt that the endpoint turns down by itself (status 400, 413 or 422: a content filter, too many tokens)
        doesn't stop the others: its reply is empty and a warning says so, unless the endpoint has answered nothing yet.

        Raises:
            JudgeError: the endpoint can't be reached, keeps failing, refuses the key or the model, or answers in
                another format. Replies that came before, and those to requests under way, are kept.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("Judge.ask: prompts must be a list of texts")
        keys = [self._key(prompt) for prompt in prompts]
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._replies}
        errors, refused = self._run(missing)
        if refused and not self.requests:
            errors += refused.values()
        if errors:
            done = sum(key in self._replies for key in keys)
            raise self._failure(errors[0], done, len(keys)) from errors[0]
        for key, error in refused.items():
            self._keep(key, "", refused=str(error))
        if refused:
            warnings.warn(
                f"Judge: {self.base_url} turned down {len(refused)} of {len(keys)} prompts, one of them with: "
                f"{next(iter(refused.values()))}",
                RuntimeWarning,
                stacklevel=2,
            )
        return [self._replies[key] for key in keys]

    def _run(self, missing: dict[str, str]) -> tuple[list[Exception], dict[str, Exception]]:
        """Asks for all ``missing`` until the first failure; the failures, and the prompts that were turned down."""
        import openai

        refused: dict[str, Exception] = {}
        stopped = threading.Event()

        def answer(key: str, prompt: str) -> None:
            if stopped.is_set():
                return
            try:
                self._keep(key, self._request(prompt))
            except BaseException as error:
                if isinstance(error, openai.APIStatusError) and error.status_code in _UNFIT:
                    refused[key] = error
                else:
                    stopped.set()
                    raise

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(answer, *item) for item in missing.items()]
            try:
                wait(futures)
            finally:  # on Ctrl-C only the requests under way are waited for
                stopped.set()
        errors = [error for future in futures if (error := future.exception())]
        if other := [error for error in errors if not isinstance(error, (openai.OpenAIError, JudgeError))]:
            raise other[0]  # a full disk, for one
        return errors, refused

    def _failure(self, cause: Exception, done: int, total: int) -> JudgeError:
        kept = "in this object" if self.cache is None else f"in {self.cache}"
        reason = f" ({cause.__cause__})" if cause.__cause__ is not None else ""
        return JudgeError(
            f"Judge: {self.base_url} failed for model {self.model!r} with {done} of {total} prompts done: "
            f"{cause}{reason}; what it has answered is kept {kept}: the same call again asks only for the rest",
            done=done,
            total=total,
        )

    def _request(self, prompt: str) -> str:
        options = {} if self.temperature is None else {"temperature": self.temperature}
        try:
            answer = self._client.chat.completions.create(
                model=self.model, messages=[{"role": "user", "content": prompt}], **options
            )
        except json.JSONDecodeError as error:  # the client lets it through
            raise JudgeError(f"the answer is not JSON: {error.doc[:200]!r}") from error
        choices = getattr(answer, "choices", None)
        if not choices or not hasattr(choices[0], "message"):
            shown = answer if isinstance(answer, str) else answer.model_dump_json()
            raise JudgeError(f"the answer is not in the format of chat completions: {shown[:200]!r}")
        return choices[0].message.content or ""

    def _key(self, prompt: str) -> str:
        return hashlib.sha256(json.dumps([self.model, self.temperature, prompt]).encode()).hexdigest()

    def _keep(self, key: str, reply: str, **more: str) -> None:
        line = json.dumps({"key": key, "model": self.model, "reply": reply, **more})
        with self._lock:
            if self.cache is not None:
                _append(self.cache, line)
            self._replies[key] = reply
            if not more:
                self.requests += 1


def _checked(groups: Sequence[tuple[str, Sequence[str]]]) -> None:
    for question, completions in groups:
        if not isinstance(question, str):
            raise TypeError(f"Judge: question must be a text, got {type(question).__name__}")
        if isinstance(completions, str) or not all(isinstance(text, str) for text in completions):
            raise TypeError("Judge: completions must be a list of texts")


def _numbered(completions: Sequence[str], order: Sequence[str], groups: Sequence[int] | None) -> list[int] | None:
    """The group of each completion, numbered anew, from those of the distinct ones in ``order``."""
    if groups is None:
        return None
    group_of, numbers = dict(zip(order, groups, strict=True)), dict[int, int]()
    return [numbers.setdefault(group_of[text], len(numbers)) for text in completions]


def _append(path: Path, line: str) -> None:
    """Adds the whole line, or nothing where the disk is full."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        data = f"{line}\n".encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            file.truncate(end)
            raise


_START = b'{"key": "'  # of every line of a cache


def _read_cache(path: Path) -> dict[str, str]:
    """The replies in ``path``, none where it doesn't exist yet. A last line cut short by a kill is cut off."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    replies = {}
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            replies[str(row["key"])] = str(row["reply"])
        except (ValueError, KeyError, TypeError):
            raise JudgeError(f"Judge: cache {path} holds no reply in line {number}: {line[:80]!r}") from None
    if rest := data[whole:]:
        if not rest.startswith(_START[: len(rest)]):
            raise JudgeError(f"Judge: cache {path} ends with something else than a reply: {rest[:80]!r}")
        os.truncate(path, whole)
    return replies
