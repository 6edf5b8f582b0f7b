# `make demo` and `make test` set everything up on their first run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

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
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[simulate,evaluate,openvino,onnx,video,corpora,search,test]"
	@touch $@

clean:
	rm -rf $(VENV) results data
