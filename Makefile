# Entry point for development; `make` lists the targets. Needs Python 3.11 or newer with its venv module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Most tests wait for other processes, so run twice as many workers as there are cores. `make test WORKERS=0` runs them in one process.
WORKERS ?= $(shell echo $$((2 * $$(nproc))))

RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-12s %s\n", $$1, $$2 }'

.PHONY: demo
demo: $(RUNTIME) ## show a pod's certificate and its rotation, without Kubernetes and without root
	@$(BIN)/certmount demo

.PHONY: test
test: $(DEVELOPMENT) peers ## run unit, integration and peer tests; prints the skipped tests with reasons
	PATH="$$(scripts/install-peers --path)$$PATH" $(BIN)/python -m pytest -ra -n $(WORKERS) --dist worksteal $(ARGS)

.PHONY: test-debian
test-debian: ## run the tests on the Python of Debian SUITE (bookworm, trixie or forky) as an ordinary user (root, mmdebstrap)
	scripts/test-on-debian $(SUITE) $(if $(ARGS),ARGS='$(ARGS)')

.PHONY: lint
lint: $(DEVELOPMENT) ## check code, types, imports, generated code and prose
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/generate-protos --check
	$(BIN)/python scripts/lint-prose

.PHONY: format
format: $(DEVELOPMENT) ## format the code and apply safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: e2e
e2e: $(DEVELOPMENT) ## run the tests on a real Kubernetes, and build it if it is missing (root, Debian, Go)
	tests/e2e/run

.PHONY: bench
bench: $(DEVELOPMENT) ## run the benchmarks that need no Kubernetes
	$(BIN)/python -m tests.bench

.PHONY: bench-e2e
bench-e2e: $(DEVELOPMENT) ## run the benchmarks on a real Kubernetes
	tests/e2e/run bench

IMAGE ?= localhost/certmount:dev

.PHONY: image
image: ## build the container image IMAGE (docker, podman or buildah)
	@if command -v docker >/dev/null; then docker build -t $(IMAGE) .; \
	elif command -v podman >/dev/null; then podman build -t $(IMAGE) .; \
	else buildah build --layers -t $(IMAGE) .; fi

.PHONY: venv
venv: $(DEVELOPMENT) ## create .venv with the locked development dependencies

.PHONY: peers
peers: ## build the third-party programs that the tests use (Go)
	scripts/install-peers

.PHONY: proto
proto: $(DEVELOPMENT) ## generate csi_driver/_proto from proto/
	$(BIN)/python scripts/generate-protos

.PHONY: lock
lock: ## upgrade all dependencies in the lock files (uv)
	scripts/lock

.PHONY: clean
clean: ## delete .venv and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist build

# An editable install, so the stamp depends on the lock files and not on the sources.
$(RUNTIME): requirements.lock requirements-build.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "certmount needs Python 3.11 or newer; run make PYTHON=python3.13 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) --require-hashes -r requirements.lock -r requirements-build.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(DEVELOPMENT): $(RUNTIME) requirements-dev.lock
	$(PIP) --require-hashes -r requirements-dev.lock
	@touch $@
