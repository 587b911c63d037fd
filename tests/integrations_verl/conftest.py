"""Tests against verl itself, which needs an environment of its own: ``make test-verl``."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]

if not collect_ignore_glob:
    import verl  # noqa: F401  (before anything of ours: it has to find the plugin by itself)
LOADED_BY_VERL = "powerflow_fast.integrations.verl" in sys.modules


@pytest.fixture
def loaded_by_verl() -> bool:
    return LOADED_BY_VERL


def pytest_report_header() -> list[str]:
    return (
        ["tests/integrations_verl: left out, verl isn't installed here (make test-verl)"] if collect_ignore_glob else []
    )
