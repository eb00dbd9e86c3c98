# Four words for the project, two for everybody. Each does all its own set-up in .venv.
#
#   make generate   a video from the photograph that ships with the package, on any machine
#   make test       the whole suite, on a CPU
#   make check      format, lint, types, layers
#   make clean      remove .venv and what the targets made

PYTHON ?= python3
BIN := .venv/bin
# Without a GPU, pin torch so that pip can take a CPU-only build; with one, any supported torch does.
CONSTRAINTS := $(if $(wildcard /dev/nvidiactl),constraints/base.txt,constraints/cpu.txt)
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

generate: .venv/runtime
	$(BIN)/wanfast generate --model tiny --image wanfast/assets/examples/cat.jpg \
		--prompt "A cat turns its head and looks at the camera." --seed 1 --contact-sheet --overwrite --output out/cat.mp4

test: .venv/dev
	$(BIN)/python -m pytest -n 2

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv out build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("wanfast needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/pip pyproject.toml constraints/base.txt constraints/cpu.txt
	$(PIP_INSTALL) -e .
	mkdir -p out
	touch $@

.venv/dev: .venv/runtime
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

.PHONY: generate test check clean
