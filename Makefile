# What people, hooks and CI run. A bare clone needs git, make and python3 (3.11 or newer), nothing else.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
ACTIVATE := . "$(VENV)/bin/activate"
ARGS ?=
REPRO := python -m pipeline.recover && dvc repro
LOG_AGAIN := dvc repro --force --single-item evaluate visualize
export MLFLOW_DISABLE_TELEMETRY ?= true

.DEFAULT_GOAL := help
.PHONY: help setup repro test slow many-pictures faults browser kill-test verify doctor audit lint ui tune label-check serve seeds pooling overhead bench bench-training bench-networks bench-tuning lock

help:  ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv "$(VENV)"
	$(ACTIVATE) && python -m pip install --disable-pip-version-check --requirement requirements.lock
	touch "$@"

setup: $(INSTALLED)  ## create .venv and install the packages in requirements.lock

# DVC needs a Git repository, which a downloaded source archive is not. Said before gigabytes are installed.
.PHONY: repository
repository:
	@git rev-parse --git-dir >/dev/null 2>&1 || grep -qs 'no_scm = true' .dvc/config.local || { \
		printf '%s\n' "error: this folder is not a Git repository, which DVC needs: git init && git add -A && git commit -m Start" \
			"       or, without Git: make setup && .venv/bin/dvc config --local core.no_scm true" >&2; exit 2; }

# pipeline.results exits 3 where the store lacks what DVC finds up to date: it is new, or a stage was killed.
repro: repository $(INSTALLED)  ## run the whole workflow: prepare, train, evaluate, visualize
	$(ACTIVATE) && $(REPRO)
	@$(ACTIVATE) && echo && { python -m pipeline.results || { [ $$? = 3 ] && $(LOG_AGAIN) && python -m pipeline.results; }; }

# Two processes, each running whole test files, so that the fixtures of a file are created once. Their threads share the
# cores: one that waits must not spin.
PYTEST := OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist loadfile

test: $(INSTALLED)  ## run the test suite without the slow tests: real DVC, MLflow and digits, no network
	$(ACTIVATE) && $(PYTEST) -m 'not slow and not page' $(ARGS)

slow: $(INSTALLED)  ## run the slow tests, and those of the changes shown in docs/make-it-yours.md
	$(ACTIVATE) && $(PYTEST) -m 'slow or page' $(ARGS)

many-pictures: $(INSTALLED)  ## prepare 100,000 pictures and train with them: speed and memory; a quarter of an hour with nothing else running
	$(ACTIVATE) && MANY_PICTURES=100000 python -m pytest -s tests/test_many_pictures.py $(ARGS)

faults: $(INSTALLED)  ## run the tests that cause real faults: signals, full disks, closed ports, damaged files
	$(ACTIVATE) && $(PYTEST) -m faults $(ARGS)

browser: $(INSTALLED)  ## run the tests that open MLflow's pages in Chromium, which must be installed
	$(ACTIVATE) && python -m pytest -m browser $(ARGS)

kill-test: $(INSTALLED)  ## kill `dvc repro` at 40 random moments, half an hour; writes docs/reliability.md
	$(ACTIVATE) && python -m bench.kill_test $(ARGS)

verify: repository $(INSTALLED)  ## run the pipeline twice from scratch, and compare the outputs with each other and with dvc.lock
	$(ACTIVATE) && exec python -m pipeline.verify

doctor: $(INSTALLED)  ## check this repository, and say how to fix what is wrong
	$(ACTIVATE) && python -m pipeline.recover && python -m pipeline.doctor

audit: $(INSTALLED)  ## check the packages in requirements.lock for known vulnerabilities; needs a network
	$(ACTIVATE) && python .ci/audit.py $(ARGS)

lint: $(INSTALLED)  ## check style and types with ruff and mypy
	$(ACTIVATE) && ruff check . && ruff format --check . && mypy

ui: $(INSTALLED)  ## show MLflow at http://127.0.0.1:5000, for this machine only
	$(ACTIVATE) && exec python -m pipeline.ui $(ARGS)

tune: repository $(INSTALLED)  ## run the Optuna study of params.yaml; ARGS=--apply writes the winner into the file
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m pipeline.tune $(ARGS)

label-check: repository $(INSTALLED)  ## find training images whose label may be wrong; writes reports/label_check.html
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m pipeline.label_check $(ARGS)

serve: $(INSTALLED)  ## serve the champion at http://127.0.0.1:5002, for this machine only
	$(ACTIVATE) && python -m pipeline.serve $(ARGS)

# The measurements write bench/*.json, and the page that shows them.
WRITE_PAGE := python -m bench.benchmarks_page

seeds: repository $(INSTALLED)  ## train the recipe of params.yaml with ten seeds: mean and standard deviation of the test scores
	$(ACTIVATE) && $(REPRO) prepare && python -m bench.seeds $(ARGS) && $(WRITE_PAGE)

pooling: repository $(INSTALLED)  ## compare pooling and no pooling on shifted images; half an hour
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m bench.pooling $(ARGS) && $(WRITE_PAGE)

overhead: repository $(INSTALLED)  ## measure the overhead of live images and checkpoints; five minutes
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m bench.overhead $(ARGS) && $(WRITE_PAGE)

# Keras has its own environment; Lightning is installed into a folder and uses this project's PyTorch.
bench/.keras/.installed: bench/requirements-keras.txt
	$(PYTHON) -m venv bench/.keras
	bench/.keras/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch "$@"

bench/.lightning/.installed: bench/requirements-lightning.txt $(INSTALLED)
	$(ACTIVATE) && python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
		--target bench/.lightning --requirement $<
	touch "$@"

# ARGS go to bench.speed; --quick times only the epochs.
bench: bench-training $(if $(ARGS),,bench-networks bench-tuning)  ## compare the speed of training and tuning with other tools; an hour with nothing else running

bench-training: repository $(INSTALLED) bench/.keras/.installed bench/.lightning/.installed  ## compare training with Keras, a DataLoader loop and Lightning
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m bench.speed $(ARGS) && $(WRITE_PAGE)

bench-networks: repository $(INSTALLED)  ## compare networks of several kinds with a plain loop in PyTorch
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m bench.networks $(ARGS) && $(WRITE_PAGE)

bench-tuning: repository $(INSTALLED)  ## compare tuning with a plain Optuna study
	$(ACTIVATE) && $(REPRO) --quiet prepare && python -m bench.tuning $(ARGS) && $(WRITE_PAGE)

lock: $(INSTALLED)  ## update requirements.lock from pyproject.toml, keeping versions that still fit
	$(ACTIVATE) && python -m pip install --quiet uv && uv pip compile pyproject.toml --all-extras --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-header --output-file requirements.lock
