# Each target does all its own set-up in .venv.
#
# The journey to a video. Each target prints the wanfast line that it runs. MODEL=tiny is the default and ships with the
# package; MODEL=a14b takes the published weights. OPTIONS adds words to the line: make generate OPTIONS='--steps 8'.
#
#   make download   the published weights, 126 GB, only with MODEL=a14b
#   make quantize   experts in 8 bits, for OPTIONS='--quantize fp8-rowwise'; SCHEME names another scheme
#   make calibrate  a curve for OPTIONS='--magcache artifact'
#   make warmup     what the first video of a shape would compile
#   make generate   two videos from the images that ship with the package, on any machine
#   make bench      all recipes side by side: out/bench/report.html
#   make doctor     what is installed, what fits, what to type next
#
# Work on wanfast itself:
#
#   make test       the whole suite, on a CPU
#   make test-long  tests that take too long for every change, on a CPU
#   make test-gpu   what only a GPU can show
#   make bench-gpu  speed on one GPU: a forward, quantized, with skips; each prints its JSON
#   make projection     whole videos on 8 GPUs, projected from the results of 1 and 2: docs/projection.md
#   make readme-table   README's table of published lines, from the reports of `wanfast bench`
#   make tiny-quality   every quality figure of the tiny model, at 128x128
#   make tiny-quality-256   the same at 256x256, on a GPU
#   make tiny-kinds     last images and joined clips on the tiny model, and the table of docs/kinds.md
#   make tiny-magcache  what skipping forwards, gates of guidance and the hybrid save and cost on the tiny model
#   make tiny-few-steps the distilled pair of LoRAs against 40 steps and against plain weights in 4 steps
#   make tiny-attention what sparse and fp8 attention cost on the tiny model, and the table of docs/sparse-attention.md
#   make tiny-tables    every table, plot, curve and picture that was judged on other weights than the tiny model's
#   make check      format, lint, types, layers
#   make clean      remove .venv and what the targets made, except weights, experts in 8 bits and curves

PYTHON ?= python3
BIN := .venv/bin
PIP_INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints/pins.txt

MODEL ?= tiny
SCHEME ?= fp8-rowwise
OPTIONS =
ON_CPU := $(if $(filter tiny,$(MODEL)),--device cpu)

PUBLISHED := a14b t2v-a14b
EXAMPLES := wanfast/assets/examples/$(if $(filter t2v-a14b,$(MODEL)),texts,jobs).jsonl

ifneq ($(filter $(PUBLISHED),$(MODEL)),)
download: .venv/runtime
	$(BIN)/wanfast download --model $(MODEL) $(OPTIONS)
else
download:
	@echo 'Nothing to download for MODEL=$(MODEL). `make download MODEL=a14b` runs `wanfast download --model a14b`, 126 GB.'
endif

quantize: .venv/dev
	$(BIN)/wanfast quantize --model $(MODEL) --scheme $(SCHEME) $(ON_CPU) $(OPTIONS)

calibrate: .venv/dev
	$(BIN)/wanfast calibrate-magcache --model $(MODEL) $(ON_CPU) $(OPTIONS)

warmup: .venv/runtime
	$(BIN)/wanfast warmup --model $(MODEL) $(ON_CPU) $(OPTIONS)

generate: .venv/runtime
	mkdir -p out
	$(BIN)/wanfast generate --model $(MODEL) $(ON_CPU) --jobs $(EXAMPLES) --seed 1 \
		--contact-sheet --overwrite $(OPTIONS)

# A CPU lacks FlashAttention-3, which the published recipes name: each row of the report says that auto replaced it.
bench: .venv/dev
	$(BIN)/wanfast bench --model $(MODEL) $(if $(ON_CPU),$(ON_CPU) --attention auto) --output out/bench $(OPTIONS)

doctor: .venv/runtime
	$(BIN)/wanfast doctor --model $(MODEL) $(OPTIONS)

test: .venv/dev
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/gpu

test-long: .venv/ray
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/gpu -m long

test-gpu: .venv/dev
	$(BIN)/python -m pytest -s tests/gpu

tiny-quality: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality --photographs training/photographs.zip --output benchmarks/results/tiny-quality.json

tiny-quality-256: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality --photographs training/photographs.zip --side 256 --frames 33 --device cuda \
		--processes 16 --output benchmarks/results/tiny-quality-256.json

tiny-kinds: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality.kinds --photographs training/photographs.zip \
		--output benchmarks/results/tiny-kinds.json $(OPTIONS)
	$(BIN)/python benchmarks/kinds_table.py

# Debian's packages hold most of them, so this needs apt-get.
training/photographs.zip: | .venv/dev
	$(BIN)/python -m training.photographs

tiny-quality-int8-weight-only tiny-quality-int8-dynamic tiny-quality-fp8-rowwise: tiny-quality-%: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality --photographs training/photographs.zip --pairs 50 --empty 0 --last 0 \
		--quantize $* --output out/$@.json
	cp out/$@.json benchmarks/results/

tiny-magcache: .venv/dev
	$(BIN)/python -m wanfast.quality.skipping --output benchmarks/results/tiny-magcache.json

tiny-magcache-extrapolated: .venv/dev
	$(BIN)/python -m wanfast.quality.skipping --pairs 8 --only-magcache --output out/$@.json
	cp out/$@.json benchmarks/results/

tiny-few-steps: .venv/dev training/photographs.zip
	$(BIN)/python -m wanfast.quality.few_steps --photographs training/photographs.zip \
		--output benchmarks/results/tiny-few-steps.json $(OPTIONS)

tiny-lossy: .venv/dev
	$(BIN)/python benchmarks/tiny_lossy.py --output benchmarks/results/tiny-lossy.json

tiny-preset: .venv/dev
	$(BIN)/python benchmarks/tiny_preset.py

tiny-examples: generate
	cp out/star.png out/cat.png docs/

# It needs Chromium, which takes the picture of the page.
tiny-bench: bench
	chromium --headless --no-sandbox --hide-scrollbars --window-size=1480,1092 --screenshot=docs/bench.png out/bench/report.html

# training/README.md lists what these are, and how long each one takes.
tiny-tables: .venv/dev training/photographs.zip
	$(BIN)/python benchmarks/tiny_tables.py

tiny-attention: .venv/dev
	$(BIN)/python -m wanfast.quality.attention --output benchmarks/results/tiny-attention.json
	$(BIN)/python benchmarks/attention_table.py

bench-gpu: .venv/dev
	$(BIN)/python benchmarks/forward.py
	$(BIN)/python benchmarks/quantized.py
	$(BIN)/python benchmarks/magcache.py

projection: .venv/runtime
	$(BIN)/python benchmarks/projection.py

readme-table: .venv/runtime
	$(BIN)/python benchmarks/readme_table.py

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

.venv/ray: .venv/dev
	$(PIP_INSTALL) -e '.[ray]'
	touch $@

.PHONY: download quantize calibrate warmup generate bench doctor test test-long test-gpu bench-gpu projection readme-table check clean \
	tiny-quality tiny-quality-256 tiny-kinds tiny-quality-int8-weight-only tiny-quality-int8-dynamic tiny-quality-fp8-rowwise \
	tiny-attention tiny-magcache tiny-magcache-extrapolated tiny-few-steps tiny-lossy tiny-preset tiny-examples tiny-bench tiny-tables
