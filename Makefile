# make train | test | lint. Each makes .venv first, with CUDA builds where there is a GPU.
PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
GPUS := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')
ifneq ($(GPUS),0)
ifdef CUDA_VISIBLE_DEVICES
comma := ,
GPUS := $(words $(subst $(comma), ,$(CUDA_VISIBLE_DEVICES)))
endif
endif
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)

ifeq ($(GPUS),0)
FBGEMM := fbgemm-gpu-cpu==1.8.0
PROCESSES := 2
else
FBGEMM := fbgemm-gpu==1.8.0
PROCESSES := $(GPUS)
endif
# The configs split sequences over two processes; an odd number of GPUs cannot.
ODD := $(filter 1,$(shell expr $(PROCESSES) % 2))

.PHONY: install train test lint
install: .venv/installed

# Without a GPU, torch's CPU build comes first, by itself (pip prefers 2.13.0+cpu of that index to
# 2.13.0). torchrec comes without its dependencies: it asks for the CUDA build of fbgemm everywhere.
.venv/installed: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
ifeq ($(GPUS),0)
	pip install --quiet --retries 0 --no-deps torch==2.13.0 \
	  --extra-index-url https://download.pytorch.org/whl/cpu
endif
	pip install --quiet torch==2.13.0 $(FBGEMM) --editable '.[dev]'
	pip install --quiet --no-deps torchrec==1.8.0
	touch $@

train: install
	torchx --log_level WARNING run -s local_cwd launch/components.py:train -j 1x$(PROCESSES) \
	  --config $(CONFIG) $(if $(ODD),parallel.cp=1) $(ARGS)

# Tests on a GPU have it to themselves.
test: install
	pytest $(if $(filter 0,$(GPUS)),-n auto --maxprocesses 8 --dist worksteal) $(ARGS)

lint: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports
