# make demo: everything on real speech, about a quarter of an hour on two cores.
# make test: the tests. Both build their own environment first; a second call reuses it.

PYTHON ?= python3
VENV := .venv
VENV_XLA := .venv-xla
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo test test-xla lint clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Building $(VENV) (about two minutes the first time)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV_XLA)/.ready: pyproject.toml constraints-tpu.txt
	@echo "Building $(VENV_XLA) with torch_xla (about two minutes the first time)"
	$(PYTHON) -m venv $(VENV_XLA)
	$(VENV_XLA)/bin/python -m pip install -q --disable-pip-version-check -c constraints-tpu.txt -e '.[tpu]' pytest
	@touch $@

demo: $(VENV)/.ready ## train all four stages on real speech, generate two minutes, write the report
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" bash experiments/demo/run.sh

test: $(VENV)/.ready ## run the tests on two processes
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 --dist loadfile

test-xla: $(VENV_XLA)/.ready ## train under real torch_xla on the PJRT CPU device
	$(VENV_XLA)/bin/python -c "import torch_xla"  # without it the tests would only be skipped
	PJRT_DEVICE=CPU $(VENV_XLA)/bin/python -m pytest -q tests/xla

lint: $(VENV)/.ready ## ruff, lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

clean: ## remove runs and caches, keep the environments
	rm -rf runs outputs .pytest_cache .ruff_cache
