"""One page over several evaluations."""

from .page import Comparison, write_comparison

__all__ = ["Comparison", "write_comparison"]
