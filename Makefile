# demo | demo-lm | test | check | bench. Each sets up .venv by itself; the second time that takes no time.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUNS := runs/laptop_swiglu runs/laptop_qdmoa
LM_RUNS := runs/tales_swiglu runs/tales_qdmoa
TASKS := arc_challenge,hellaswag,openbookqa,winogrande

.PHONY: help demo demo-lm test check bench clean
help:
	@echo "make demo    train SwiGLU and qd-MoA masked autoencoders on photographs, compare them on one page (minutes, CPU)"
	@echo "make demo-lm train a SwiGLU and a qd-MoA language model on tales, evaluate both by lm_eval, one page (minutes, CPU)"
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

# The items that come with the tests stand where lm-eval's unmodified tasks look for their data sets.
demo-lm: $(READY)
	$(BIN)/python scripts/pretrain_lm.py --config configs/lm/tales_swiglu.yaml
	$(BIN)/python scripts/pretrain_lm.py --config configs/lm/tales_qdmoa.yaml
	for run in $(LM_RUNS); do \
		rm -rf $$run/zero_shot && cd tests/eval/items && HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 "$(CURDIR)/$(BIN)/lm_eval" \
			--model moa --model_args "pretrained=$(CURDIR)/$$run/export" --tasks $(TASKS) \
			--output_path "$(CURDIR)/$$run/zero_shot" --log_samples && cd "$(CURDIR)" || exit 1; \
	done
	$(BIN)/python scripts/compare_runs.py $(LM_RUNS) --evals "Zero-shot, 8 items a task" $(LM_RUNS:=/zero_shot) \
		--out reports/demo_lm --title "Demo: SwiGLU against qd-MoA in a language model"

# One thread a worker: the tests are many and small.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu and not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python scripts/benchmark.py all

clean:
	rm -rf .venv runs reports data/photographs data/tales .pytest_cache .ruff_cache .hypothesis
