# Two commands: `make repro` from an empty machine to the report, `make test` for the test suite.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
export PYTHONUNBUFFERED := 1

.PHONY: repro test setup lint clean

repro: setup
	@echo "== dvc repro: fetch, prepare, train, accuracy, approximate, converge, variance, report"
	dvc repro
	@python -m attnlens.report

test: setup
	@echo "== ruff"
	ruff check .
	@echo "== pytest (two workers)"
	OMP_NUM_THREADS=1 python -m pytest -n 2

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@echo "== installing into .venv (about 1.5 GB, a few minutes)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' \
	  | sed -u -n 's/^\(Collecting [^ ]*\|Installing.*\|Successfully installed\).*/\1/p'
	.venv/bin/python -c "import torch, pytorch_lightning, dvc, wandb, datasets; print('== ready: torch', torch.__version__)"
	@touch $@

lint: setup
	ruff check .
	python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[types]'
	pyright

clean:
	rm -rf .venv outputs results/approximate report
