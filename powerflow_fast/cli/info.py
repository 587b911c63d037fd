"""What is installed here and what of it runs: `powerflow-fast info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
from typing import Any

from ..version import __version__


def add_command(commands: Any) -> None:
    """The subcommand ``info`` of argparse's ``commands``."""
    parser = commands.add_parser("info", help="show versions, devices and what can run here")
    parser.set_defaults(run=_info)


def _info(arguments: argparse.Namespace) -> int:
    import torch

    from ..ops.extension import extension_status
    from ..ops.torch_products import bf16_is_fast, compiled_products_run

    print(f"powerflow_fast  {__version__}")
    print(f"python          {platform.python_version()} on {platform.platform()}")
    for name in ("torch", "triton", "transformers", "accelerate", "datasets", "peft"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{name:15} {version}")
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        memory = f"{device.total_memory / 2**30:.0f} GiB"
        print(f"cuda:{k:<10} {device.name}, {memory}, compute capability {device.major}.{device.minor}")
    if not torch.cuda.is_available():
        print("cuda            no device" + ("" if torch.version.cuda else " (torch is built without CUDA)"))
    fast = [d for d in ("cuda", "cpu") if bf16_is_fast(d)]
    print(f"fast bfloat16   {', '.join(fast) or 'no'}")
    status = extension_status()
    print(f"extension       {'loaded' if status.available else 'missing'}: {status.reason}")
    compiled = compiled_products_run()
    print(f"CPU products    {'compiled: oneDNN blocks, AVX-512' if compiled else 'of torch'}")
    if importlib.util.find_spec("triton") is None:
        triton = "no: triton is not installed"
    elif torch.cuda.is_available():
        triton = "yes"
    else:
        triton = "no: needs a CUDA device (TRITON_INTERPRET=1 runs them slowly, for tests)"
    print(f"triton kernels  {triton}")
    return 0
