# PPO and GRPO on CERT r4.2: the commands a person types. `make` alone lists them.

DATA    ?=
PROFILE ?= laptop
SEED    ?= 0
ONLY    ?=
FROM    ?=
SWEEP   ?= arms
ARGS    ?=
RUNS    ?= runs
JOBS    ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
# 3.11 comes first: the pins were measured on it.
PYTHON  ?= $(shell for candidate in python3.11 python3 python3.12 python3.13 python; do \
	$$candidate -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	2>/dev/null && { command -v $$candidate; break; }; done)
STAMP   := $(VENV)/installed-$(shell cat requirements.txt pyproject.toml | cksum | cut -d' ' -f1)
# Nothing asks the network, unless a profile names a model of the hub: then HF_HUB_OFFLINE=0.
OFFLINE  = HF_HUB_OFFLINE=$${HF_HUB_OFFLINE:-1}
PYTEST   = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help study test test-slow test-gpu lab bench bench-data bench-rl learn-check credit-check sweep lint clean

help: ## list these targets
	@echo "make study  [DATA=/path/to/r4.2] [PROFILE=smoke|laptop|gpu|gpu-large] [SEED=0] [ONLY=05_ppo_training] [FROM=...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

study: $(STAMP) ## run the whole study and write runs/<study>/report.html
	@$(BIN)/ueba study --profile "$(PROFILE)" --seed "$(SEED)" --data "$(DATA)" --runs "$(RUNS)" \
		$(if $(ONLY),--only "$(ONLY)") $(if $(FROM),--from "$(FROM)") \
		$(if $(filter-out file,$(origin JOBS)),--jobs "$(JOBS)") $(ARGS)

test: $(STAMP) ## run the suite on a CPU, offline
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: $(STAMP) ## run the slow tests: kills, ranks, fuzzing
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

test-gpu: $(STAMP) ## run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m gpu $(ARGS)

lab: $(STAMP) ## open JupyterLab on the notebooks
	@JUPYTER_PREFER_ENV_PATH=1 $(OFFLINE) $(BIN)/jupyter lab --notebook-dir=notebooks $(ARGS)

bench: bench-data bench-rl ## measure everything that benchmarks/README.md reports

bench-data: $(STAMP) ## measure simulating, ingesting and building windows
	@$(BIN)/python benchmarks/bench_data.py $(ARGS)

bench-rl: $(STAMP) ## measure rollouts and updates
	@$(BIN)/python benchmarks/bench_rl.py $(ARGS)

learn-check: $(STAMP) ## check over six seeds that PPO and GRPO learn
	@$(OFFLINE) $(BIN)/python benchmarks/learn_check.py $(ARGS)

credit-check: $(STAMP) ## hold critic and group against exact advantages on a finished study
	@$(OFFLINE) $(BIN)/python benchmarks/credit_check.py --profile "$(PROFILE)" --seed "$(SEED)" \
		--data "$(DATA)" --runs "$(RUNS)" $(ARGS)

sweep: $(STAMP) ## sweep a setting from a study's cold start (SWEEP=group_size|kl_coef|lam|critic_warmup_steps|arms)
	@$(OFFLINE) $(BIN)/python benchmarks/sweep.py "$(SWEEP)" --profile "$(PROFILE)" --seeds $(SEED) \
		--data "$(DATA)" --runs "$(RUNS)" $(ARGS)

lint: $(STAMP) ## check the style
	@$(BIN)/ruff check

clean: ## remove the environment and caches (runs/ stays)
	@rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, made anew when requirements.txt or pyproject.toml change. torch comes first and
# by its exact version: asked for otherwise, it may bring several GB of CUDA packages.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with the module venv found." \
		"Install one (on Debian and Ubuntu also python3-venv), or name it:" \
		"make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { echo \
		"$(PYTHON) is not Python 3.11, 3.12 or 3.13." >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual" \
		"environments (on Debian and Ubuntu: apt install python3-venv)." >&2; exit 2; }
	@echo "Installing the environment into $(VENV) (a few minutes, once) ..."
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null \
		|| "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.txt
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		--no-build-isolation -e .
	@$(BIN)/python -m pip check > /dev/null || $(BIN)/python -m pip check
	@touch $@
