# make train: a first training on two CPU ranks; make test: the whole test suite. Both make their own .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RANKS ?= 2
WORKERS ?= 2
# a file stays on one worker, which shares its trainings; tests/conftest.py has the order
XDIST = -n $(WORKERS) --dist loadfile --no-loadscope-reorder
MODEL_TESTS := tests/models/test_other_models.py tests/strategies/test_other_models_strategies.py \
  tests/jobs/test_other_models_jobs.py tests/trained/test_load_model.py tests/calculators/test_calculator.py \
  tests/export/test_export.py tests/jobs/test_recipes.py tests/models/test_conversion.py \
  tests/trained/test_heads.py tests/models/test_defaults.py
EXTRA_OF_sevennet := torchmd,
STRICT := fields.py schedules distributed support metrics presets.py testing

export OMP_NUM_THREADS ?= 1

.PHONY: help install environments hooks train test test-slow test-mace test-sevennet test-all lint lint-code lint-format lint-shell lint-docker types imports \
  docs benchmark dist release ci lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(VENV)/.installed  ## make .venv with the package and everything for its development

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

environments: install .venv-mace/.installed .venv-sevennet/.installed  ## all three environments of the tests

hooks: install  ## let git run what `make lint` runs before each commit
	$(BIN)/pre-commit install

train: install  ## train and test a force field on the embedded alloy, on RANKS=2 ranks; MODEL=nequip or another; ARGS="..." are Hydra overrides
	$(BIN)/torchrun --standalone --nproc-per-node $(RANKS) -m harness.train experiment=alloy $(MODEL:%=model=%) $(ARGS)

test: install  ## the test suite but for what is marked slow
	$(BIN)/python -m pytest -m 'not slow' $(XDIST)

test-slow: install  ## what is marked slow: trainings that are killed, stopped and cut off
	$(BIN)/python -m pytest -m slow $(XDIST)

test-mace: .venv-mace/.installed  ## the tests of MACE, whose e3nn is not NequIP's, in an environment of their own
	.venv-mace/bin/python -m pytest $(XDIST) $(MODEL_TESTS) \
	  -k 'mace or not (test_calculator or test_load_model)'

test-sevennet: .venv-sevennet/.installed  ## the tests of SevenNet and TorchMD-Net, which bring many packages, likewise
	.venv-sevennet/bin/python -m pytest $(XDIST) $(MODEL_TESTS) tests/models/test_bring_a_model.py \
	  -k 'sevennet or bring_a_model'

.venv-%/.installed: pyproject.toml constraints.txt
	test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --upgrade pip
	.venv-$*/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[$*,$(EXTRA_OF_$*)test-tools]'
	touch $@

test-all: install  ## every test; those of one file share their trainings, slow or not
	$(BIN)/python -m pytest $(XDIST)
	@$(MAKE) --no-print-directory test-mace test-sevennet

lint: install  ## ruff, shellcheck, hadolint
	@$(MAKE) --no-print-directory lint-code lint-format lint-shell lint-docker

# the four by themselves are what .pre-commit-config.yaml calls: they install nothing
lint-code:
	$(BIN)/ruff check .

lint-format:
	$(BIN)/ruff format --check .

lint-shell:
	PATH="$(CURDIR)/$(BIN):$$PATH" shellcheck -x launch/*.sh launch/*.sbatch launch/env/*.sh benchmarks/*.sh .ci/run

lint-docker:
	$(BIN)/hadolint Dockerfile

types: install  ## mypy, strict on the lower floors
	$(BIN)/mypy
	$(BIN)/mypy --strict $(STRICT:%=harness/%)

imports: install  ## each floor imports only lower floors
	$(BIN)/lint-imports

docs: install  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmark: install  ## cost of a loss step beside NequIP and a hand-packed minimum
	$(BIN)/python benchmarks/step.py

dist: install  ## build sdist and wheel into dist/, check them, and train from the wheel outside of this checkout
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist . > /dev/null
	$(BIN)/python .ci/check_dist.py $(CHECKS)

release: CHECKS := --release
release: dist  ## the same for a release, which also needs a clean checkout and a date in the changelog

ci:  ## everything that CI runs
	.ci/run

lock:  ## exact versions of what is in the image, into constraints-image.txt
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install --quiet --constraint constraints.txt .
	(head -n 1 constraints-image.txt; build/lock/bin/python -m pip freeze --exclude potential-harness | sed 's/+cpu//') > build/lock.txt
	mv build/lock.txt constraints-image.txt

clean:  ## remove what make has made, but not outputs/
	rm -rf $(VENV) .venv-mace .venv-sevennet build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
