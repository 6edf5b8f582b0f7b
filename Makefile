# `make demo` and `make test` set everything up on their first run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Large buffers stay in the process instead of going back to the system after
# every batch: half as long a training step on a CPU with glibc.
export MALLOC_MMAP_THRESHOLD_ ?= 1000000000
export MALLOC_TRIM_THRESHOLD_ ?= 10000000000
export MALLOC_TOP_PAD_ ?= 200000000

.PHONY: help demo test lint setup clean

help:
	@echo "make demo   quantize the separator to 4 bits, score it, write a report"
	@echo "make test   lint and tests"
	@echo "make setup  the virtual environment only"

demo: $(VENV)/.ready
	$(BIN)/python train.py hparams/kl_4bit.yaml --device=cpu

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint -s .

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[simulate,evaluate,openvino,onnx,video,corpora,test]"
	@touch $@

clean:
	rm -rf $(VENV) results data
