"""powerflow_fast: fused log-probs, the LA-TB loss, and a trainer that samples from p_base(y|q)^alpha."""

from __future__ import annotations

__version__ = "0.1.0"


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
