# make demo and make test create the environment they need in .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any release from 2.11 on works. This one is installed if torch is missing.
TORCH ?= torch==2.13.0


help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## create .venv with the tool and its development dependencies

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=77'
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[build,cpu,kernels]' --group dev
# TensorRT-RTX builds engines without a GPU. Its packages exist for x86-64 Linux and Windows only.
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[rtx]' || echo 'TensorRT-RTX is not available: bundles will have no engines' >&2
# Editors and mypy find the package nemotrt here (pyproject.toml): a path file tells them nothing.
	mkdir -p build/typing/nemotrt
	for name in exporter plugins model; do ln -sfn ../../../$$name build/typing/nemotrt/$$name; done
	touch $@

# One GPU generation, because compiling the kernels of four takes minutes. ONNX only if TensorRT-RTX is missing.
RTX = import sys; from importlib.util import find_spec as found; sys.exit(not found("tensorrt_rtx"))
demo: TARGET = $(shell $(BIN)/python -c '$(RTX)' && echo --runtime tensorrt-rtx --sm 89 || echo --runtime onnx)
demo: setup ## build a bundle from the example checkpoint and generate text with it
	rm -rf demo && mkdir demo
	$(BIN)/nemo-export build examples/tiny --output demo/tiny $(TARGET)
	$(BIN)/nemo-export generate demo/tiny --prompt 'The for statement is used to' --max-new-tokens 40
	$(BIN)/nemo-export inspect demo/tiny

test: setup ## run the tests that take less than ten seconds each
	$(BIN)/python -m pytest -n 2 -m 'not slow'

test-slow: setup ## run the tests that take longer: statistics, whole builds, README and API examples
	$(BIN)/python -m pytest -n 2 -m slow

# The seed is printed with the command: SEED=… repeats a run. EXAMPLES=… tries more.
fuzz: EXAMPLES ?= 500
fuzz: SEED ?= $(shell echo $$RANDOM)
fuzz: setup ## try random files and arguments; files of a failing example stay in build/fuzz
	$(BIN)/python -m pytest tests/e2e/test_fuzz.py --examples $(EXAMPLES) --hypothesis-seed $(SEED) --log-cli-level INFO

PYTHONS ?= python3.12 python3.13
pythons: ## on other releases of Python, run the demo and the tests of single modules in a fresh clone; PYTHONS="python3.12"
	for python in $(PYTHONS); do \
	    copy=$$(mktemp -d); \
	    git clone --quiet . "$$copy"; \
	    $(MAKE) -C "$$copy" demo PYTHON="$$python"; \
	    (cd "$$copy" && .venv/bin/python -m pytest -n 2 -m 'not slow' tests/unit tests/conformance); \
	    rm -rf "$$copy"; \
	done

lint: setup ## check format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## run mypy in strict mode
	$(BIN)/mypy -p nemotrt.exporter -p nemotrt.model -p nemotrt.plugins

imports: setup ## check the import layers
	$(BIN)/lint-imports

snapshots: setup ## regenerate docs/cli.md, docs/reliability.md and tests/snapshots
	$(BIN)/python tests/snapshots/texts.py

dist: setup ## build the source distribution and the wheel, check their contents and test the wheel
	$(BIN)/python scripts/check_packages.py

bench: setup ## measure the figures of docs/performance.md
	$(BIN)/python scripts/bench.py

faults: setup ## inject 58 kinds of faults at three precisions; writes the tables of docs/validation.md
	$(BIN)/python scripts/fault_study.py

emulate: setup ## execute the PTX of every kernel for SM 80, 86, 89, 90 and 120 on the CPU, with every access checked
	$(BIN)/python scripts/emulate.py

gpu-check: setup ## test every op on this machine's GPU: kernels, then plugins; writes build/gpu_check*.json
	$(BIN)/python scripts/gpu_check.py
	$(BIN)/python scripts/gpu_check.py --plugins --output build/gpu_check_plugins.json

gpu-bench: setup ## time every op on this machine's GPU against the roofline and peers; writes build/gpu_bench.json
	$(BIN)/python scripts/gpu_bench.py

engine-check: setup ## build, run and validate engines on this machine's GPU; writes engine-check.json
	$(BIN)/python scripts/engine_check.py

wheel: setup ## build the wheel that contains the plugin library; ARCH=aarch64 cross-compiles
	$(BIN)/python -m pip install --quiet --group wheel
	$(BIN)/python scripts/make_wheel.py $(if $(ARCH),--arch $(ARCH))

clean: ## remove generated files
	rm -rf $(VENV) build dist demo
