# make demo   raw text to perplexity in one command
# make test   the whole test suite
# make check  style and types
# make torture  the full forms of the longest tests, and a table of what was kept (docs/reliability.md); an hour
# Each sets up .venv first; PYTHON names the interpreter to make it with (3.11 or 3.12).

PYTHON ?= python3
BIN := .venv/bin
DEMO := outputs/demo

.PHONY: demo test torture check clean
.DEFAULT_GOAL := demo

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
	  || { echo "error: $$($(PYTHON) --version) is not supported: use Python 3.11 or 3.12, as make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up .venv (once; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# On a GPU machine 1, 2, 4 or 8 GPUs train, which share the demo's 8 sequences a step evenly, or those that
# CUDA_VISIBLE_DEVICES names; elsewhere up to two CPU ranks of one thread each.
ifeq ($(shell nvidia-smi -L 2>/dev/null),)
RANKS := $(shell n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 2 ] && n=2; echo $$n)
DEVICE := DS_ACCELERATOR=cpu OMP_NUM_THREADS=1
COUNT := --num_accelerators $(RANKS)
else ifeq ($(CUDA_VISIBLE_DEVICES),)
COUNT := --num_gpus $(shell n=$$(nvidia-smi -L | grep -c ^GPU); c=8; while [ $$c -gt $$n ] && [ $$c -gt 1 ]; do c=$$((c / 2)); done; echo $$c)
endif
LAUNCH = $(DEVICE) $(BIN)/deepspeed $(COUNT) --master_port $(FREE_PORT)
# A port that is free now, so that two jobs of this machine don't meet.
FREE_PORT = $$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')

demo: .venv/installed
	$(LAUNCH) train.py experiment=demo run_dir=$(DEMO)
	$(BIN)/python eval.py checkpoint=$(DEMO) seq_lens=[128,512,2048]
	$(BIN)/python -m scripts.generate checkpoint=$(DEMO) prompt="class Reader:" temperature=0.6 max_tokens=200
	$(BIN)/python -m scripts.report run_dir=$(DEMO)

# On each of up to four cores, with one thread: two wait for each other more than they gain.
test: .venv/installed
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$(n=$$(nproc 2>/dev/null || echo 1); [ $$n -gt 4 ] && n=4; echo $$n) --dist worksteal \
	  || { echo 'the failed tests again, alone: some have deadlines'; $(BIN)/python -m pytest --last-failed; }

torture: .venv/installed
	@$(BIN)/python -m pytest -m torture -v --no-header

check: .venv/installed
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

clean:
	rm -rf .venv .cache outputs
