"""Scripts of tests that run in a process of their own."""

from __future__ import annotations

import os
from pathlib import Path

HELPERS = Path(__file__).resolve().parent


def environment() -> dict[str, str]:
    """The environment in which a script finds the helpers, and Triton compiles: its interpreter is for this process."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, [str(HELPERS), os.environ.get("PYTHONPATH")]))}
