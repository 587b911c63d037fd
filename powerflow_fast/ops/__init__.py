"""Tensors in, tensors out: log-probs of a head and the LA-TB loss, by Triton, CUDA, C++ or torch."""

from .la_tb import LATBOutput, group_log_z, la_tb_loss
from .linear_la_tb import linear_la_tb_loss
from .logprobs import LogprobStats, linear_logprob_stats, linear_logprobs, sequence_logprobs
from .segments import segment_sum

__all__ = [
    "LATBOutput",
    "LogprobStats",
    "group_log_z",
    "la_tb_loss",
    "linear_la_tb_loss",
    "linear_logprob_stats",
    "linear_logprobs",
    "segment_sum",
    "sequence_logprobs",
]
