# make demo and make test set up everything they need; make setup makes .venv.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Any torch from 2.11 on will do. Where none is installed, this release has a CPU build.
TORCH ?= torch==2.13.0


help: ## what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready ## .venv with the tool and what develops it

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed"'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1' 'setuptools>=77'
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[cpu,kernels]' --group dev
# TensorRT-RTX builds engines anywhere, and has packages for Linux on x86-64 and for Windows only.
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[rtx]' || echo 'no TensorRT-RTX here: bundles without engines' >&2
	touch $@

# One GPU generation: compiling the kernels of four takes minutes. Without TensorRT-RTX, the graph alone.
RTX = import sys; from importlib.util import find_spec as found; sys.exit(not found("tensorrt_rtx"))
demo: TARGET = $(shell $(BIN)/python -c '$(RTX)' && echo --runtime tensorrt-rtx --sm 89 || echo --runtime onnx)
demo: setup ## build a bundle from the example checkpoint, and let it write
	rm -rf demo && mkdir demo
	$(BIN)/nemo-export build examples/tiny --output demo/tiny $(TARGET)
	$(BIN)/nemo-export generate demo/tiny --prompt 'The for statement is used to' --max-new-tokens 40
	$(BIN)/nemo-export inspect demo/tiny

test: setup ## the tests that need no GPU
	$(BIN)/python -m pytest -n 2

lint: setup ## format and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup ## mypy, strict
	mkdir -p build/typing/nemotrt
	for name in exporter plugins model; do ln -sfn ../../../$$name build/typing/nemotrt/$$name; done
	$(BIN)/mypy -p nemotrt.exporter -p nemotrt.model -p nemotrt.plugins

imports: setup ## the layers of the architecture
	$(BIN)/lint-imports

snapshots: setup ## write anew what tests compare with code: docs/cli.md, docs/reliability.md, tests/snapshots
	$(BIN)/python tests/snapshots/texts.py

dist: setup ## the source distribution and the wheel, both looked through, the wheel tried without the checkout
	$(BIN)/python scripts/check_packages.py

bench: setup ## the figures of docs/performance.md
	$(BIN)/python scripts/bench.py

gpu-check: setup ## every op on this machine's GPU against the reference: kernels, then plugins; writes build/gpu_check*.json
	$(BIN)/python scripts/gpu_check.py
	$(BIN)/python scripts/gpu_check.py --plugins --output build/gpu_check_plugins.json

gpu-bench: setup ## every op on this machine's GPU against the roofline and peers; writes build/gpu_bench.json
	$(BIN)/python scripts/gpu_bench.py

engine-check: setup ## build, run and judge engines on this machine's GPU; writes engine-check.json
	$(BIN)/python scripts/engine_check.py

wheel: setup ## the wheel that carries the plugin library, in dist; ARCH=aarch64 for the other kind of machine
	$(BIN)/python -m pip install --quiet --group wheel
	$(BIN)/python scripts/make_wheel.py $(if $(ARCH),--arch $(ARCH))

clean: ## remove what make made
	rm -rf $(VENV) build dist demo
