# make demo: hear the whole path on this machine.    make test: run every test and every notebook.
# Both make their own environment in .venv first. (.ci/run also installs the system programs that a few tests use.)

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
EXTRAS := dev,codecs,lyrics,quant
# constraints.txt holds the versions tested on Python 3.11; a few of them have no release for Python 3.10.
PINNED = $$($(BIN)/python -c 'import sys; print("-c constraints.txt" * (sys.version_info >= (3, 11)))')

# No test reaches the network. Torch's own threads would only fight with the test workers for the cores.
test: export HF_HUB_OFFLINE ?= 1
test: export OMP_NUM_THREADS ?= 1
# Idle threads sleep: where other programs want the cores too, spinning ones make small steps a hundred times slower.
demo test: export OMP_WAIT_POLICY ?= PASSIVE
demo test: export GOMP_SPINCOUNT ?= 0
test: export MUSICLAB_PARITY ?= $(realpath ../shared/parity)
test: export MUSICLAB_TEST_DATA ?= $(realpath ../shared/data)

.PHONY: setup demo test export lint

setup: $(READY)

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing torch into .venv, the largest part"
	@$(BIN)/python -m pip install --quiet $(PINNED) torch
	@echo "Installing musiclab and the rest"
	@$(BIN)/python -m pip install --quiet $(PINNED) -e ".[$(EXTRAS)]"
	@touch $@

demo: setup
	@$(BIN)/musiclab demo

# A file stays with one worker, which makes once what its tests share; the files with the most tests come first, single notebooks last.
test: setup
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

# After a change to a notebook: write the modules anew, and strip what a run leaves in notebooks.
export: setup
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

lint: setup
	$(BIN)/ruff check
