# make demo | make test | make lint: each makes .venv on a fresh machine; a second call installs nothing.
# make bench-gpu installs nothing: the Python of a machine with a GPU has its own torch.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; call make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

.PHONY: demo bench-gpu test test-all lint clean

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash bench/demo.sh

bench-gpu:
	PYTHON="$(PYTHON)" bash bench/gpu.sh --output "$(or $(OUTPUT),gpu.json)"

test: .venv/installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder -m 'not exhaustive'

test-all: .venv/installed
	$(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs
