# Every target works from a fresh clone, installing into .venv first; a second call installs only what changed.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Two workers on two cores: each one's maths stays on its own core.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest

.PHONY: help install demo test test-long lint bench bench-check gpu gpu-more clean

help:
	@echo "make demo        install, then teach the embedded model a word and draw demo.png with it"
	@echo "make test        install, then every test that needs no GPU"
	@echo "make test-long   the same with full counts and the slow tests; its record is benchmarks/results/test-long.json"
	@echo "make lint        ruff and mypy"
	@echo "make bench       run the benchmarks"
	@echo "make bench-check compare machine-independent counts with the committed ones, and docs/performance.md with its data"
	@echo "make gpu         on a GPU: check kernels and graphs, and time an image (500 s); RESULTS=folder"
	@echo "make gpu-more    on a GPU: measure the other budgets (270 s); STEPS=\"tune breakdown …\" selects steps by name"
	@echo "make install     the installation alone, into .venv; PYTHON=python3.12 chooses the interpreter"
	@echo "make clean       remove .venv and what was built"

install: $(STAMP)

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.10 or newer, or set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is $$($(PYTHON) -V): ragturbo needs Python 3.10 or newer; set PYTHON=" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module: install it (Debian and Ubuntu: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): $(BIN)/python pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: install
	$(BIN)/python examples/teach.py --out demo.png

test: install
	$(PYTEST) -m "not slow and not long and not gpu" -n 2 --dist worksteal -q

test-long: install
	RAGTURBO_LONG=1 RAGTURBO_COUNTS=benchmarks/results/test-long.json $(PYTEST) -m "not gpu" -n 2 --dist worksteal -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ragturbo

bench: install
	$(BIN)/python -m pytest benchmarks -q --benchmark-only

# FLOPs, bytes, launches and allocations against the committed counts, and docs/performance.md against its data. Nothing
# here depends on the machine.
bench-check: install
	$(BIN)/python -m benchmarks.check_counts
	$(PYTEST) tests/engine/test_capture.py -q -k operations
	$(BIN)/ragturbo bench report --check

# Use the interpreter as it is if it has torch: GPU images have one that fits their driver.
gpu: STEPS ?= first
gpu-more: STEPS ?= more
gpu gpu-more:
	@if $(PYTHON) -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; \
	then PYTHON=$(PYTHON) bash benchmarks/gpu.sh $(STEPS); \
	else make install && PYTHON=$(BIN)/python bash benchmarks/gpu.sh $(STEPS); fi

clean:
	rm -rf .venv build dist *.egg-info ragturbo/_native*.so ragturbo/_native_off.txt
