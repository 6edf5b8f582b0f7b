# `make demo` and `make test` set everything up on their first run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A process for each core, with one thread; a file's tests stay together
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses=auto --dist=loadfile --no-loadscope-reorder

.PHONY: help demo test test-fast lint setup clean

help:
	@echo "make demo        quantize to 4 bits, score, write a report"
	@echo "make test        lint and tests"
	@echo "make test-fast   tests of units and consistency only"
	@echo "make setup       the virtual environment only"

demo: $(VENV)/.ready
	$(BIN)/python train.py hparams/kl_4bit.yaml --device=cpu

test: lint
	$(PYTEST)

test-fast: $(VENV)/.ready
	$(PYTEST) tests/unittests tests/consistency

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/yamllint -s .

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[simulate,evaluate,openvino,onnx,video,corpora,search,test]"
	@touch $@

clean:
	rm -rf $(VENV) results data
