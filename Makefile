# Each target sets up .venv first; the second time that takes no time.
PYTHON ?= python3
TORCH ?= $(shell cat .venv/.torch 2>/dev/null)
BIN := .venv/bin
LOCK := requirements.lock
READY := .venv/.ready
UV = $$(command -v uv || echo $(BIN)/uv)
# Where Python may not write bytecode, every process would compile the libraries anew.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

RUNS := $(foreach seed,0 1,runs/laptop_swiglu_s$(seed) runs/laptop_qdmoa_s$(seed))
LM_RUNS := runs/tales_swiglu runs/tales_qdmoa
TASKS := arc_challenge,hellaswag,openbookqa,winogrande

PYTEST := -m pytest -n auto --dist worksteal
# Beside the locked versions a library's own deprecation is reported, not a failure.
TOLERANT := -W default::DeprecationWarning -W default::PendingDeprecationWarning -W default::FutureWarning

.PHONY: help demo demo-lm test test-slow test-lowest test-latest check docs bench gpu lock clean
help:
	@echo "make demo        pre-train SwiGLU and qd-MoA masked autoencoders on photographs and compare them (minutes, CPU)"
	@echo "make demo-lm     pre-train SwiGLU and qd-MoA language models, evaluate both with lm_eval, compare them (minutes, CPU)"
	@echo "make test        fast tests (minutes, CPU)"
	@echo "make test-slow   slow tests: kills, two processes, compilation, fuzzing, installation (less than an hour, CPU)"
	@echo "make test-lowest fast tests with the lowest versions of pyproject.toml, in .venv-lowest"
	@echo "make test-latest fast tests with the newest versions, in .venv-latest"
	@echo "make check       ruff, pyright and make docs"
	@echo "make docs        the documentation with the API reference, into site/"
	@echo "make bench       benchmarks of this machine"
	@echo "make gpu         what a GPU can confirm, in 12 minutes; docs/gpu, README.md and docs/benchmarks.md"
	@echo "make lock        renew requirements.lock"
	@echo "Options: PYTHON=python3.12 chooses the interpreter, TORCH=cpu (or cu128, ...; needs uv) a build of torch."

# $(call venv,DIR): create a virtual environment with uv in it, unless uv is on the PATH.
define venv
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; choose one with: make PYTHON=python3.12 ...")'
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) || { echo "could not create $(1); on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	@command -v uv >/dev/null || test -x $(1)/bin/uv || $(1)/bin/python -m pip install --quiet --disable-pip-version-check uv || true
endef

ifneq ($(TORCH),$(shell cat .venv/.torch 2>/dev/null))
.PHONY: $(READY)
endif
$(READY): $(LOCK) pyproject.toml
	$(call venv,.venv)
	@echo "installing into .venv (once; torch is large)"
ifneq ($(TORCH),)
	@$(UV) pip install --quiet --python $(BIN)/python $(COMPILE) --torch-backend $(TORCH) \
		--reinstall-package torch --reinstall-package torchvision --no-verify-hashes --constraint $(LOCK) -e '.[dev]'
else
	@if $(UV) --version >/dev/null 2>&1; then \
		$(UV) pip install --quiet $(COMPILE) --python $(BIN)/python --require-hashes -r $(LOCK) && \
		$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .; \
	else \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r $(LOCK) && \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .; \
	fi
endif
	@echo "$(TORCH)" > .venv/.torch && touch $@

demo: $(READY)
	$(BIN)/python -m moa_vision.photographs --out data/photographs
	for seed in 0 1; do for ffn in swiglu qdmoa; do \
		$(BIN)/python scripts/pretrain_mae.py --config configs/mae/laptop_$$ffn.yaml \
			--seed $$seed --name laptop_$${ffn}_s$$seed || exit 1; \
	done; done
	$(BIN)/python scripts/compare_runs.py $(RUNS) --out reports/demo --title "Demo: SwiGLU against qd-MoA on photographs"

# One line of progress from the harness; the page has its table.
QUIET := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_DATASETS_DISABLE_PROGRESS_BARS=1 LMEVAL_LOG_LEVEL=WARNING TQDM_DISABLE=1

# The items that come with the tests stand where lm-eval's unmodified tasks look for their data sets.
demo-lm: $(READY)
	$(BIN)/python -m moa_lm tales
	$(BIN)/python scripts/pretrain_lm.py --config configs/lm/tales_swiglu.yaml
	$(BIN)/python scripts/pretrain_lm.py --config configs/lm/tales_qdmoa.yaml
	@for run in $(LM_RUNS); do \
		echo "lm_eval --model moa --model_args pretrained=$$run/export --tasks $(TASKS)" && \
		rm -rf $$run/zero_shot && cd tests/eval/items && $(QUIET) "$(CURDIR)/$(BIN)/lm_eval" \
			--model moa --model_args "pretrained=$(CURDIR)/$$run/export" --tasks $(TASKS) \
			--output_path "$(CURDIR)/$$run/zero_shot" --log_samples >/dev/null && cd "$(CURDIR)" || exit 1; \
	done
	$(BIN)/python scripts/compare_runs.py $(LM_RUNS) --evals "Zero-shot, 8 items a task" $(LM_RUNS:=/zero_shot) \
		--out reports/demo_lm --title "Demo: SwiGLU against qd-MoA in a language model"

test: $(READY)
	$(BIN)/python $(PYTEST) -m "not gpu and not slow"

test-slow: $(READY)
	$(BIN)/python $(PYTEST) -m "slow and not gpu"

test-lowest: RESOLUTION := lowest-direct
test-latest: RESOLUTION := highest
test-lowest test-latest: test-%:
	$(call venv,.venv-$*)
	$$(command -v uv || echo .venv-$*/bin/uv) pip install --quiet $(COMPILE) --upgrade --resolution $(RESOLUTION) --python .venv-$*/bin/python -e '.[dev]'
	.venv-$*/bin/python $(PYTEST) -m "not gpu and not slow" $(TOLERANT)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	@$(MAKE) --no-print-directory docs

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python -m benchmarks all

gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py --out docs/gpu; code=$$?; \
	test $$code = 2 || $(BIN)/python benchmarks/gpu.py --publish --out docs/gpu && exit $$code

lock: $(READY)
	$(UV) pip compile --quiet --upgrade --universal --python-version 3.11 --extra dev --generate-hashes --no-annotate \
		--no-emit-index-url --custom-compile-command "make lock" --output-file $(LOCK) pyproject.toml

clean:
	rm -rf site .venv .venv-lowest .venv-latest runs reports data/photographs data/tales .pytest_cache .ruff_cache .hypothesis
