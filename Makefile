# Everything is run through this file: `make` lists it. Needs Python 3.11 or newer with its venv module, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check

RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(RUNTIME) ## a certificate for a pod, rotated in place, without Kubernetes and without root
	@$(BIN)/certmount demo

.PHONY: test
test: $(DEVELOPMENT) peers ## unit, integration and peer tests; says what it skips and why
	PATH="$$(scripts/install-peers --path)$$PATH" $(BIN)/python -m pytest -ra $(ARGS)

.PHONY: lint
lint: $(DEVELOPMENT) ## ruff, mypy, the layers, and the generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/generate-protos --check
	$(BIN)/python scripts/lint-prose

.PHONY: format
format: $(DEVELOPMENT) ## ruff's formatting and its safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: e2e
e2e: $(DEVELOPMENT) ## the tests on a real Kubernetes, which is installed when it is missing (root, Debian, Go)
	tests/e2e/run

.PHONY: bench
bench: $(DEVELOPMENT) ## the figures of docs/benchmarks.md that need no Kubernetes
	$(BIN)/python -m tests.bench

.PHONY: bench-e2e
bench-e2e: $(DEVELOPMENT) ## the figures that need a real Kubernetes
	tests/e2e/run bench

IMAGE ?= localhost/certmount:dev

.PHONY: image
image: ## the container image IMAGE (docker, podman or buildah)
	@if command -v docker >/dev/null; then docker build -t $(IMAGE) .; \
	elif command -v podman >/dev/null; then podman build -t $(IMAGE) .; \
	else buildah build --layers -t $(IMAGE) .; fi

.PHONY: venv
venv: $(DEVELOPMENT) ## .venv with all that development needs, as locked

.PHONY: peers
peers: ## the programs of others that the tests meet (Go)
	scripts/install-peers

.PHONY: proto
proto: $(DEVELOPMENT) ## csi_driver/_proto from proto/
	$(BIN)/python scripts/generate-protos

.PHONY: lock
lock: ## the newest dependencies that pyproject.toml allows, into the lock files (uv)
	scripts/lock

.PHONY: clean
clean: ## away with the environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build

# What certmount needs to run. An editable install: the stamp depends on what is locked, not on the sources.
$(RUNTIME): requirements.lock requirements-build.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "certmount needs Python 3.11 or newer; say which: make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock -r requirements-build.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.lock
	$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@
