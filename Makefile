# Each target does all its own set-up in .venv.
#
#   make generate   a video from the photograph that ships with the package, on any machine
#   make test       the whole suite, on a CPU
#   make test-gpu   what only a GPU can show
#   make check      format, lint, types, layers
#   make clean      remove .venv and what the targets made

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints/pins.txt

generate: .venv/runtime
	mkdir -p out
	$(BIN)/wanfast generate --model tiny --device cpu --image wanfast/assets/examples/cat.jpg \
		--prompt "A cat turns its head and looks at the camera." --seed 1 --contact-sheet --overwrite --output out/cat.mp4

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --ignore tests/gpu

test-gpu: .venv/dev
	$(BIN)/python -m pytest -s tests/gpu

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv out artifacts/runs artifacts/prompt_embeds build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("wanfast needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/pip pyproject.toml constraints/pins.txt
	$(PIP_INSTALL) -e .
	touch $@

.venv/dev: .venv/runtime
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

.PHONY: generate test test-gpu check clean
