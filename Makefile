# One command for people, hooks and CI: `make check`. `make help` lists the targets.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
KERNELS := $(VENV)/.kernels
PRESET ?= gemma3_270m
HOST ?= 127.0.0.1
PORT ?= 8000
# Test files run beside each other in this many processes; 0 runs them in one. Some wait for clocks and
# other processes, so two cores have work for three.
TEST_PROCESSES ?= 3

.PHONY: help install serve test nightly bench check static lint openapi lock format clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make .venv, install everything locked into it, build the kernels
	$(BUILD_KERNELS)

$(INSTALLED): requirements.lock requirements-dev.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is needed; set PYTHON to another 3.11 or later" >&2; exit 1; }
	@echo "Installing the locked packages into $(VENV) (2 to 3 minutes on a fresh machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-dev.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(INSTALLED)

INSTALL_COMPILER := $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements-kernels.lock

# The compiler in the third lock file is fetched only where no other one works: it takes 100 MB.
define BUILD_KERNELS
@$(BIN)/python -m model.kernels.build --require || test $$? -ne 69 || { \
	echo "Installing a C++ compiler into $(VENV); its first build takes minutes" >&2; \
	$(INSTALL_COMPILER); \
	$(BIN)/python -m model.kernels.build; }
@touch $(KERNELS)
endef

$(KERNELS): $(INSTALLED) $(wildcard model/kernels/*.py model/kernels/source/*)
	$(BUILD_KERNELS)

serve: $(KERNELS) ## serve PRESET (gemma3_270m, tiny, or a path) on HOST:PORT
	@exec $(BIN)/gemma-service serve --preset "$(PRESET)" --host "$(HOST)" --port "$(PORT)"

test: static $(KERNELS) ## everything CI runs: import contracts, types, tests (ARGS="-k top_p -x")
	$(BIN)/pytest -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: $(KERNELS) ## long campaigns: answers in company against alone, compilations in a fuzz
	$(INSTALL_COMPILER)
	GEMMA_NIGHTLY=1 GEMMA_CAMPAIGN_ANSWERS=20000 GEMMA_CAMPAIGN_REAL_ANSWERS=500 GEMMA_CAMPAIGN_KILLS=3 GEMMA_FUZZ_REQUESTS=2000 $(BIN)/pytest --timeout 4800 tests/test_company.py tests/test_compilations.py tests/test_kernel_build.py tests/test_self_test.py tests/test_service_training.py $(ARGS)

bench: $(KERNELS) ## measure the engine beside other implementations, in 40 minutes (ARGS="--quick")
	$(BIN)/python -m bench $(ARGS)

check: lint test ## format, lint, import contracts, types, tests

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

static: $(INSTALLED)
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED) ## fix what a machine can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

openapi: $(INSTALLED) ## rewrite openapi/openapi.json; read the diff before committing it
	$(BIN)/python -m service.export_openapi openapi/openapi.json

lock: ## resolve the lock files anew (needs uv)
	uv pip compile $(LOCK_OPTIONS) --extra serve --extra demo pyproject.toml -o requirements.lock
	uv pip compile $(LOCK_OPTIONS) --extra serve --extra demo --extra dev -c requirements.lock pyproject.toml -o requirements-dev.lock
	uv pip compile $(LOCK_OPTIONS) --group kernels -o requirements-kernels.lock

LOCK_OPTIONS := --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate

clean: ## remove .venv, kernels and caches of tools
	rm -rf $(VENV) model/kernels/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
