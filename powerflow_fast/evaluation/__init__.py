"""``evaluate``: sample, score, measure."""

from .evaluate import during_training, evaluate
from .judge import Judge
from .problems import ProblemSet, load_problems
from .result import Evaluation
from .scorers import SCORERS
from .statistics import Measure, mean_interval, paired_change, pass_at_k

__all__ = [
    "SCORERS",
    "Evaluation",
    "Judge",
    "Measure",
    "ProblemSet",
    "during_training",
    "evaluate",
    "load_problems",
    "mean_interval",
    "paired_change",
    "pass_at_k",
]
