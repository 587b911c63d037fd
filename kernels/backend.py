"""The Triton backend: its functions are those of `HeadBackend`."""

from __future__ import annotations

from .linear_logprob_bwd import linear_logprob_bwd, linear_logprob_bwd_exps
from .linear_logprob_exps import kept_dtype, linear_logprob_fwd_d_hidden, linear_logprob_fwd_exps
from .linear_logprob_fwd import linear_logprob_fwd
from .scale import scaled

__all__ = [
    "kept_dtype",
    "linear_logprob_bwd",
    "linear_logprob_bwd_exps",
    "linear_logprob_fwd",
    "linear_logprob_fwd_d_hidden",
    "linear_logprob_fwd_exps",
    "scaled",
]
