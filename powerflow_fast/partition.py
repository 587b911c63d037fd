"""The log-partition per token, log Z'(q): learned by a small head, or estimated from a prompt's completions."""

from __future__ import annotations
