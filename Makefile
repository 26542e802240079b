# Two commands: `make demo` and `make test`. Both make what they need: a virtual environment in .venv with the
# requirements of requirements.txt, and (the demo) the embedded data set in data/.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := runs/demo
# Two devices with half the batch each: 13 % faster than one device on a Xeon, 10 % slower on an EPYC. None on a GPU.
TWO_DEVICES := XLA_FLAGS="$$XLA_FLAGS --xla_force_host_platform_device_count=2"

.DEFAULT_GOAL := help
.PHONY: help demo test bench lint clean

help:
	@echo "make demo   train a small FPN Faster R-CNN on generated scenes, score it and draw what it sees"
	@echo "make test   run all tests"
	@echo "make bench  measure speed and memory, against torchvision if it is installed in $(VENV)"
	@echo "make lint   check the style"
	@echo "make clean  remove what these made, the virtual environment too"

$(INSTALLED): requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; install one, or say make PYTHON=/path/to/python"; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version); about a minute"
	@$(PYTHON) -m venv $(VENV) || { echo "error: $(PYTHON) -m venv failed; install its venv module (Debian: python3-venv)"; exit 2; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@

demo: $(INSTALLED)
	@$(BIN)/python -m fpn_jax.prepare --source=scenes --data_dir=data
	@$(TWO_DEVICES) $(BIN)/python -m fpn_jax.train --config=experiments/demo.py --workdir=$(DEMO)
	@echo "next: $(BIN)/python -m fpn_jax.predict --workdir=$(DEMO) YOUR.jpg --output=found   or your own data: README.md"

test: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check --quiet .
	@$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile

# Quarter of an hour on two cores; nothing else should run. Leaves benchmarks/results/*.json and benchmarks/RESULTS.md.
bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.run

lint: $(INSTALLED)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache data runs *.egg-info
