# The front door. Every target creates .venv and installs what is missing; run twice, nothing is installed twice.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# a worker for each core, at most eight: each holds torch and transformers; who is idle takes tests from who is not
PARALLEL := --numprocesses auto --maxprocesses 8 --dist worksteal
QUICK_TESTS := embstore/core tests/unit tests/format tests/oracle/test_pairwise.py tests/crash/test_order.py tests/e2e/test_build.py
FAULT_TESTS := tests/crash tests/property/test_hostile.py tests/property/test_hostile_store.py

.PHONY: demo test test-quick test-slow test-faults test-trainers lint benchmark clean

demo: $(STAMP)  ## the main job end to end, on input made on the spot
	@$(BIN)/python -m scripts.demo

test: $(STAMP) lint  ## what CI runs: lint, types, layers, tests; 20 minutes on two old cores, 10 on newer ones
	@$(BIN)/python -m pytest -m "not faults and not slow and not trainers" $(PARALLEL)

test-quick: $(STAMP)  ## for the inner loop, a minute: units, the disk format, exact search, order of system calls, a small real build
	@$(BIN)/python -m pytest -m "not faults and not slow and not trainers" $(PARALLEL) $(QUICK_TESTS)

test-slow: $(STAMP)  ## what make test leaves out, and a build with the oldest versions (6 GB in .venv-oldest); not test-faults
	@./scripts/oldest_environment.sh "$(PYTHON)" .venv-oldest || \
		{ [ $$? -eq 75 ] && echo "the package index cannot be reached: the test of the oldest versions skips"; }
	@$(BIN)/python -m pytest -m "slow and not faults and not trainers" $(PARALLEL)
	@echo "the complete fault suite, half an hour as root: make test-faults"

test-trainers: $(STAMP)  ## trainers of other versions and frameworks, each in an environment of its own, .venv-trainers/NAME
	@$(BIN)/python -m scripts.test_trainers --report benchmarks/results/trainers.json

lint: $(STAMP)
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m scripts.check_english
	@$(BIN)/lint-imports --no-cache > $(VENV)/layers.log || { cat $(VENV)/layers.log; exit 1; }
	@$(BIN)/python -m benchmarks.pages --check

# as root; needs strace, e2fsprogs, xfsprogs and btrfs-progs, and says what it skips without them
test-faults: $(STAMP)  ## half an hour: kills, power cuts, full disks, bit rot, hostile files; writes benchmarks/results/faults.json
	@$(BIN)/python -m pytest $(FAULT_TESTS) --numprocesses auto --maxprocesses 8 --dist loadfile --fault-report benchmarks/results/faults.json

benchmark: $(STAMP)  ## needs PROMPTS=file and MODEL=folder; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.acceptance --prompts "$(PROMPTS)" --model "$(MODEL)"

# torch first and alone: with a CPU build in place, what follows does not pull gigabytes of CUDA packages on Linux.
# hnswlib is compiled for AVX2 where this CPU has it, which every x86 server of the last ten years does, and not for this CPU
# alone (-march=native, its default): an environment may be copied. pip's cache does not know how a wheel was compiled.
AVX2 := $(shell grep -qsw avx2 /proc/cpuinfo && grep -qsw fma /proc/cpuinfo && echo -mavx2 -mfma)
$(STAMP): pyproject.toml
	@./scripts/check_compiler.sh "$(PYTHON)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (first time: a few minutes)"
	@$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@HNSWLIB_NO_NATIVE=1 CFLAGS="$(AVX2)" CXXFLAGS="$(AVX2)" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-cache-dir "hnswlib>=0.8,<0.9"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-oldest .venv-trainers build dist .pytest_cache .mypy_cache .ruff_cache
