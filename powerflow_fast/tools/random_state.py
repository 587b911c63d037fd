"""Seeds, streams of random numbers, and the state of the generators."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor


def seed_of(seed: int, number: int, rank: int) -> int:
    """A seed for rollout ``number`` on device ``rank``: a resumed run draws what the first one would have drawn."""
    return int(numpy.random.SeedSequence([seed, number, rank]).generate_state(1, numpy.uint32)[0])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from ``seed`` on the CPU and ``device``; the state from before comes back."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def stream_seed(*parts: Any) -> int:
    """A 64-bit number made of ``parts`` (JSON-able) by SHA-256: the same in every process, and on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:8], "big")


def random_stream(*parts: Any) -> numpy.random.Generator:
    """The random numbers that belong to ``parts``, see :func:`stream_seed`."""
    return numpy.random.default_rng(stream_seed(*parts))


def get_rng_state() -> dict[str, Tensor]:
    """States of torch's CPU generator and of every CUDA device's, as uint8 tensors."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda.{i}": s for i, s in enumerate(cuda)}}


def set_rng_state(states: Mapping[str, Tensor]) -> None:
    """Restore :func:`get_rng_state`; states of CUDA devices that are not here are skipped."""
    torch.set_rng_state(states["cpu"])
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if f"cuda.{i}" in states:
            torch.cuda.set_rng_state(states[f"cuda.{i}"], i)
