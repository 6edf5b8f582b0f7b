# `make demo` and `make test` set everything up on their first run.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# A process for each core, with one thread; a file's tests stay together
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses=auto --dist=loadfile --no-loadscope-reorder

# Where pip finds PyTorch's CPU builds, which are smaller: README, Installing
TORCH_INDEX ?=

.PHONY: help demo test test-fast lint docs setup clean

help:
	@echo "make demo        quantize to 4 bits, score, write a report"
	@echo "make test        lint and tests"
	@echo "make test-fast   tests of units and consistency only"
	@echo "make docs        the documentation as a site, in site/"
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

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[docs]"
	@touch $@

setup: $(VENV)/.ready

$(VENV)/.ready: setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), once, for some minutes: PyTorch,"
	@echo "SpeechBrain, engines, the corpus's tools and the tests'."
ifeq ($(TORCH_INDEX),)
	@echo "It takes 5.7 GiB where PyTorch comes with its CUDA libraries, as on"
	@echo "Linux with x86-64 processors, GPU or not. 'Installing' in README.md"
	@echo "says how to take PyTorch's CPU build instead (2 GiB in all)."
endif
	$(PYTHON) -m venv $(VENV)
ifneq ($(TORCH_INDEX),)
	$(BIN)/python -m pip install --quiet -c constraints.txt \
		--index-url "$(TORCH_INDEX)" torch torchaudio
endif
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable ".[simulate,evaluate,openvino,onnx,fast,video,corpora,search,decode,test]"
	@touch $@

clean:
	rm -rf $(VENV) results data site
