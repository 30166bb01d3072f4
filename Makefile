# What people, hooks and CI run. A bare clone needs git, make and python3 (3.11 or newer), nothing else.

PYTHON ?= python3
VENV ?= .venv
INSTALLED := $(VENV)/.installed
ACTIVATE := . "$(VENV)/bin/activate"
ARGS ?=
export MLFLOW_DISABLE_TELEMETRY ?= true

.DEFAULT_GOAL := help
.PHONY: help setup repro test slow faults browser kill-test verify doctor audit lint ui tune serve seeds pooling overhead bench bench-training bench-tuning lock

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): requirements.lock
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv "$(VENV)"
	$(ACTIVATE) && python -m pip install --disable-pip-version-check --requirement requirements.lock
	touch "$@"

setup: $(INSTALLED)  ## make .venv and install everything that requirements.lock names

repro: $(INSTALLED)  ## run the whole workflow: prepare, train, evaluate, visualize
	$(ACTIVATE) && dvc repro
	@$(ACTIVATE) && echo && python -m pipeline.results

# Two processes, each with the files that it is given: what a file's tests share is then made once. PyTorch's threads
# that have nothing to do must sleep meanwhile, or those of the one process take the cores from the other.
IN_TWO := OMP_WAIT_POLICY=passive python -m pytest -n 2 --dist loadfile

test: $(INSTALLED)  ## run the test suite, without the slow tests
	$(ACTIVATE) && $(IN_TWO) -m 'not slow' $(ARGS)

slow: $(INSTALLED)  ## run the slow tests
	$(ACTIVATE) && $(IN_TWO) -m slow $(ARGS)

faults: $(INSTALLED)  ## what goes wrong in real use, set off for real: signals, full disks, closed ports, damaged files
	$(ACTIVATE) && $(IN_TWO) -m faults $(ARGS)

browser: $(INSTALLED)  ## what MLflow's pages show, in a real browser: Chromium has to be there
	$(ACTIVATE) && python -m pytest -m browser $(ARGS)

kill-test: $(INSTALLED)  ## kill `dvc repro` at 40 random moments; half an hour. Writes the table of docs/reliability.md
	$(ACTIVATE) && python -m bench.kill_test $(ARGS)

verify: $(INSTALLED)  ## build everything twice from nothing, and compare
	$(ACTIVATE) && exec python -m pipeline.verify

doctor: $(INSTALLED)  ## look at everything that can be wrong here, and say what mends it
	$(ACTIVATE) && python -m pipeline.doctor

audit: $(INSTALLED)  ## ask OSV's database whether anything in requirements.lock is known to be vulnerable
	$(ACTIVATE) && python .ci/audit.py $(ARGS)

lint: $(INSTALLED)  ## check style and types
	$(ACTIVATE) && ruff check . && ruff format --check . && mypy

ui: $(INSTALLED)  ## open MLflow at http://127.0.0.1:5000, for this machine only
	$(ACTIVATE) && MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		mlflow ui --host 127.0.0.1 --allowed-hosts 'localhost:*,127.0.0.1:*' $(ARGS)

tune: $(INSTALLED)  ## the tuning study of params.yaml; ARGS=--apply writes what it found into the file
	$(ACTIVATE) && dvc repro --quiet prepare && python -m pipeline.tune $(ARGS)

serve: $(INSTALLED)  ## answer for the champion at http://127.0.0.1:5002, for this machine only
	$(ACTIVATE) && python -m pipeline.serve $(ARGS)

seeds: $(INSTALLED)  ## train the recipe of params.yaml over ten seeds: mean and deviation of the test figures
	$(ACTIVATE) && dvc repro prepare && python -m bench.seeds $(ARGS)

pooling: $(INSTALLED)  ## accuracy on shifted images with pooling and without it, five trainings each; half an hour
	$(ACTIVATE) && dvc repro --quiet prepare && python -m bench.pooling $(ARGS)

overhead: $(INSTALLED)  ## the time that checkpoints and live images take of an epoch; five minutes
	$(ACTIVATE) && dvc repro --quiet prepare && python -m bench.overhead $(ARGS)

# Keras has an environment of its own; Lightning, a folder beside this project's environment, whose PyTorch it uses.
bench/.keras/.installed: bench/requirements-keras.txt
	$(PYTHON) -m venv bench/.keras
	bench/.keras/bin/python -m pip install --disable-pip-version-check --quiet --requirement $<
	touch "$@"

bench/.lightning/.installed: bench/requirements-lightning.txt $(INSTALLED)
	$(ACTIVATE) && python -m pip install --disable-pip-version-check --quiet --no-deps --upgrade \
		--target bench/.lightning --requirement $<
	touch "$@"

# Arguments are those of the training's program; --quick looks at the epochs alone.
bench: bench-training $(if $(ARGS),,bench-tuning)  ## time the training and the study beside what people would use instead

bench-training: $(INSTALLED) bench/.keras/.installed bench/.lightning/.installed  ## Keras, a DataLoader loop, Lightning
	$(ACTIVATE) && dvc repro --quiet prepare && python -m bench.speed $(ARGS)

bench-tuning: $(INSTALLED)  ## a plain Optuna study
	$(ACTIVATE) && dvc repro --quiet prepare && python -m bench.tuning $(ARGS)

lock: $(INSTALLED)  ## write requirements.lock anew from pyproject.toml, keeping the versions that still fit
	$(ACTIVATE) && python -m pip install --quiet uv && uv pip compile pyproject.toml --all-extras --universal \
		--python-version 3.11 --generate-hashes --no-annotate --no-header --output-file requirements.lock
