# Each target does all its own set-up in .venv.
#
#   make generate   two videos from the images that ship with the package, on any machine
#   make test       the whole suite, on a CPU
#   make test-long  tests that take too long for every change, on a CPU
#   make test-gpu   what only a GPU can show
#   make bench      all recipes side by side, with the tiny model or MODEL=a14b: out/bench/report.html
#   make bench-gpu  speed on one GPU: a forward, quantized, with skips; each prints its JSON
#   make tiny-quality   every quality figure of the tiny model, at 128x128
#   make tiny-quality-256   the same at 256x256, on a GPU
#   make tiny-magcache  what skipping forwards saves and costs on the tiny model
#   make check      format, lint, types, layers
#   make clean      remove .venv and what the targets made

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints/pins.txt

generate: .venv/runtime
	mkdir -p out
	$(BIN)/wanfast generate --model tiny --device cpu --jobs wanfast/assets/examples/jobs.jsonl --seed 1 \
		--contact-sheet --overwrite

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/gpu

test-long: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/gpu -m long

test-gpu: .venv/dev
	$(BIN)/python -m pytest -s tests/gpu

tiny-quality: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality --photographs training/photographs.zip --output benchmarks/results/tiny-quality.json

tiny-quality-256: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality --photographs training/photographs.zip --side 256 --frames 33 --device cuda \
		--processes 4 --output benchmarks/results/tiny-quality-256.json

# Debian's packages hold most of them, so this needs apt-get.
training/photographs.zip: | .venv/dev
	$(BIN)/python -m training.photographs

tiny-magcache: .venv/dev
	$(BIN)/python -m wanfast.quality.skipping --output benchmarks/results/tiny-magcache.json

# A CPU lacks FlashAttention-3, which the published recipes name: each row of the report says that auto replaced it.
MODEL ?= tiny
bench: .venv/dev
	$(BIN)/wanfast bench --model $(MODEL) $(if $(filter tiny,$(MODEL)),--device cpu --attention auto) --output out/bench

bench-gpu: .venv/dev
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/quantized.py
	$(BIN)/python benchmarks/magcache.py

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv out artifacts/runs artifacts/prompt_embeds artifacts/inductor build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit("wanfast needs Python 3.11 or newer: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/pip pyproject.toml constraints/pins.txt
	$(PIP_INSTALL) -e .
	touch $@

.venv/dev: .venv/runtime
	$(PIP_INSTALL) -e '.[dev]'
	touch $@

.PHONY: generate test test-long test-gpu bench bench-gpu tiny-quality tiny-quality-256 tiny-magcache check clean
