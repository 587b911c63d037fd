"""powerflow_fast: fused log-probs, the LA-TB loss, and a trainer that samples from p_base(y|q)^alpha."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


def _mount_kernels() -> None:
    """Make ``powerflow_fast.kernels`` importable from a checkout, where the Triton sources lie in ``../kernels``.

    A wheel has them inside the package. They are no top-level package: Hugging Face's ``kernels`` has that name.
    """
    import importlib.machinery
    import importlib.util
    import sys
    from pathlib import Path

    here = Path(__file__).resolve().parent
    name = f"{__name__}.kernels"
    sources = here.parent / "kernels"
    if name in sys.modules or (here / "kernels").is_dir() or not sources.is_dir():
        return
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(sources)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    globals()["kernels"] = module


_mount_kernels()

from .config.options import PowerFlowConfig  # noqa: E402  (the kernels are mounted first)
from .models.patching import patch_causal_lm  # noqa: E402
from .objectives.log_z import LogZHead  # noqa: E402
from .objectives.registry import resolve_objective  # noqa: E402
from .objectives.trajectories import ObjectiveOutput, Trajectories  # noqa: E402
from .ops.la_tb import LATBOutput, group_log_z, la_tb_loss  # noqa: E402
from .ops.linear_la_tb import linear_la_tb_loss  # noqa: E402
from .ops.logprobs import LogprobStats, linear_logprob_stats, linear_logprobs, sequence_logprobs  # noqa: E402
from .ops.torch_products import compiled_products_run  # noqa: E402
from .version import __version__ as __version__  # noqa: E402

compiled_products_run()  # It asks by running one, which the fake tensors of a compiler that traces us could not.

if TYPE_CHECKING:
    from .evaluation.evaluate import evaluate
    from .evaluation.result import Evaluation
    from .training.result import StepReport, TrainResult
    from .training.train import train

__all__ = [
    "Evaluation",
    "LATBOutput",
    "LogZHead",
    "LogprobStats",
    "ObjectiveOutput",
    "PowerFlowConfig",
    "StepReport",
    "TrainResult",
    "Trajectories",
    "evaluate",
    "group_log_z",
    "la_tb_loss",
    "linear_la_tb_loss",
    "linear_logprob_stats",
    "linear_logprobs",
    "patch_causal_lm",
    "resolve_objective",
    "sequence_logprobs",
    "train",
]


# Imported when they are first asked for: who wants the kernels only should not wait for transformers.
_LAZY = {
    "Evaluation": "evaluation",
    "StepReport": "training",
    "TrainResult": "training",
    "evaluate": "evaluation",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
