# demo | test | check | bench. Each sets up .venv by itself; the second time that takes no time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUNS := runs/laptop_swiglu runs/laptop_qdmoa

.PHONY: help demo test check bench clean
help:
	@echo "make demo    train SwiGLU and qd-MoA masked autoencoders on photographs, compare them on one page (minutes, CPU)"
	@echo "make test    all tests that need no GPU"
	@echo "make check   ruff and pyright"
	@echo "make bench   the benchmarks of scripts/benchmark.py on this machine"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { echo "could not make .venv; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@echo "installing into .venv (once; torch is large)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv || true
	@if $(BIN)/uv --version >/dev/null 2>&1; then \
		$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'; \
	fi
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/pretrain_mae.py --config configs/mae/laptop_swiglu.yaml
	$(BIN)/python scripts/pretrain_mae.py --config configs/mae/laptop_qdmoa.yaml
	$(BIN)/python scripts/compare_runs.py $(RUNS) --out reports/demo --title "Demo: SwiGLU against qd-MoA on photographs"

# One thread a worker: the tests are many and small.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not gpu and not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python scripts/benchmark.py all

clean:
	rm -rf .venv runs reports data .pytest_cache .ruff_cache .hypothesis
