# Every target does the set-up it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-clients test-all bench bench-attention bench-inference bench-training extrapolate test-gpu test-tpu test-cpu bench-gpu docs wheel lint types mutants clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/stamp  ## make .venv with the pinned packages

.venv/stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## train, convert, verify and plot on real text
	$(BIN)/alibi demo --output demo --overwrite

test: setup  ## the parity tests
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slow'

test-clients: setup  ## programs of other libraries on our models, and adapters that peft trains
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[clients]'
	$(BIN)/pytest parity_tests/clients

test-all: setup mutants  ## the parity tests, the longer proofs and the planted faults
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tpu-aot,gpu-aot]'
	$(BIN)/pytest -n 2 --dist worksteal

mutants: setup  ## plant faults one by one and see the tests catch each
	$(BIN)/python -m parity_tests.meta.mutants

bench: setup  ## how fast and in how much memory 8 GB convert; results in benchmarks/results
	$(BIN)/python -m benchmarks.conversion

bench-attention: setup  ## attention of both backends beside its peers, on the CPU; with pictures
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.training_torch
	$(BIN)/python -m benchmarks.training_flax
	$(BIN)/python -m benchmarks.attention_torch
	$(BIN)/python -m benchmarks.attention_flax
	$(BIN)/python -m benchmarks.plot benchmarks/results/attention_torch.json benchmarks/results/attention_flax.json

bench-inference: setup  ## reading and continuing prompts beside transformers and CTranslate2, on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.inference

bench-training: setup  ## steps of training beside transformers and jaketae/alibi, on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.training

extrapolate: setup  ## how far beyond their training length models of any positions read, on the CPU
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[extrapolate]'
	$(BIN)/alibi extrapolate --output docs/extrapolation --overwrite

# No set-up: a machine with a GPU has its own builds of torch and jax; PYTHON is where they are.
REPORTS := benchmarks/results/devices

test-gpu:  ## the tests of whatever GPU torch and jax see, with the packages of PYTHON; a report
	$(PYTHON) -m pytest -k 'cuda or gpu' -m 'not slow' --report $(REPORTS)/gpu.json parity_tests

test-tpu:  ## the same of a TPU
	$(PYTHON) -m pytest -k 'tpu and not output' -m 'not slow' --report $(REPORTS)/tpu.json parity_tests

test-cpu: setup  ## the same of the CPU, for comparison
	$(BIN)/pytest --report $(REPORTS)/cpu.json parity_tests/test_devices.py -k cpu

bench-gpu:  ## attention on a CUDA device beside its peers, with the packages of PYTHON
	$(PYTHON) -m benchmarks.attention_gpu_torch
	$(PYTHON) -m benchmarks.attention_gpu_flax

docs: setup  ## the site of the documents, in site/; any warning is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: setup  ## sdist and wheel, in dist/, and README's examples run from the wheel
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m parity_tests.wheel dist

lint: setup  ## style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## static types
	$(BIN)/basedpyright --level error

clean:  ## remove what set-up and demo made
	rm -rf .venv demo
