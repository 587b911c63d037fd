"""Tests against verl itself, which needs an environment of its own: ``make test-verl``."""

from __future__ import annotations

import importlib.util

import torch

torch.set_num_threads(1)  # on matrices this small, threads only wait for each other

collect_ignore_glob = [] if importlib.util.find_spec("verl") else ["test_*.py"]


def pytest_report_header() -> list[str]:
    return (
        ["tests/integrations_verl: left out, verl isn't installed here (make test-verl)"] if collect_ignore_glob else []
    )
