"""Recorded metrics: names, meanings and units."""

from __future__ import annotations

# Columns of history.jsonl with their meaning and unit: those that the progress line and the plots read, and the gap.
METRICS = {
    "step": "optimizer steps made",
    "loss": "the objective; la_tb: mean w * delta^2 over the step's sequences, (nats/token)^2",
    "alpha": "exponent that this step trained to, where alpha='auto:...' looks for it",
    "policy_alpha": "exponent that the policy has come to: slope of log pi(y|q) / |y| over log p_base(y|q) / |y|",
    "delta_abs": "mean |delta|, nats/token",
    "policy_logp": "mean over sequences of log pi(y|q) / |y|, nats/token",
    "base_logp": "mean over sequences of log p_base(y|q) / |y|, nats/token",
    "log_z": "mean log-partition: log Z' in nats/token, or log Z in nats where the objective is of whole sequences",
    "entropy": "mean entropy of the policy's next-token distribution, nats",
    "length": "mean completion length, tokens",
    "rollout_logp_gap_mean": "mean |log-prob by the sampling engine - by our scorer| per token, nats",
    "rollout_logp_gap_max": "largest |log-prob by the sampling engine - by our scorer| of a token, nats",
    "tokens_per_second": "prompt and completion tokens trained on per second of the whole run, over all devices",
    "share/rollout": "share of the time that went into sampling",
    "share/score": "share of the time that went into scores under p_base and the old policy",
    "share/update": "share of the time that went into gradients and the optimizer",
    "mfu": "model FLOP of the update per second of it, over the device's dense bf16 peak",
}
