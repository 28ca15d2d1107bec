# Entry point for development; `make` lists the targets. Needs Python 3.11 or newer with its venv module.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
# Most tests wait for other processes, so run twice as many workers as there are cores. `make test WORKERS=0` runs them in one process.
WORKERS ?= $(shell echo $$((2 * $$(nproc))))

RUNTIME := $(VENV)/.runtime
DEVELOPMENT := $(VENV)/.development
FUZZING := $(VENV)/.fuzzing
SUPPLY_CHAIN := $(VENV)/.supply-chain
DOCUMENTATION := $(VENV)/.documentation

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
	scripts/test $(BIN)/python $(WORKERS) $(ARGS)

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
	$(BIN)/python scripts/generate-manifests --check
	$(BIN)/python scripts/lint-prose

.PHONY: format
format: $(DEVELOPMENT) ## format the code and apply safe fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: e2e
e2e: $(DEVELOPMENT) ## run the tests on a real Kubernetes, and build it if it is missing (root, Debian, Go, Rust)
	tests/e2e/run

SECONDS ?= 60

.PHONY: fuzz
fuzz: $(FUZZING) ## look for SECONDS for inputs that crash, hang, take too much memory or get a wrong certificate
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) $(ARGS)

MINUTES ?= 60
PAIRS ?= 10

.PHONY: chaos
chaos: $(DEVELOPMENT) ## kill and fill every part of a real Kubernetes for MINUTES, while PAIRS of pods talk mutual TLS (as e2e)
	tests/e2e/run chaos --minutes $(MINUTES) --pairs $(PAIRS) $(if $(SEED),--seed $(SEED)) $(ARGS)

.PHONY: bench
bench: $(DEVELOPMENT) ## run the benchmarks that need no Kubernetes
	$(BIN)/python -m tests.bench

.PHONY: bench-e2e
bench-e2e: $(DEVELOPMENT) ## run the benchmarks on a real Kubernetes
	tests/e2e/run bench

IMAGE ?= localhost/certmount:dev
# For example linux/amd64,linux/arm64.
PLATFORMS ?=
export PLATFORMS

.PHONY: image
image: ## build the container image IMAGE for PLATFORMS, by default for this machine (docker, podman or buildah)
	IMAGE=$(IMAGE) scripts/image build

.PHONY: image-load
image-load: ## load IMAGE into the cluster of the current context: kind, minikube, or containerd on this machine
	IMAGE=$(IMAGE) scripts/image load

.PHONY: image-push
image-push: ## push IMAGE to the registry in its name, and print its digest
	IMAGE=$(IMAGE) scripts/image push

.PHONY: sbom
sbom: $(SUPPLY_CHAIN) ## write the software bill of materials of IMAGE (CycloneDX) to dist/
	IMAGE=$(IMAGE) scripts/sbom

.PHONY: audit
audit: $(SUPPLY_CHAIN) ## look for known vulnerabilities of the locked packages; fails if the database cannot be reached
	scripts/audit

.PHONY: venv
venv: $(SUPPLY_CHAIN) ## create .venv with the locked development dependencies

.PHONY: docs
docs: $(DOCUMENTATION) peers ## build the documentation site in dist/docs, and check its links
	$(BIN)/python scripts/docs-site

.PHONY: screenshots
screenshots: docs ## draw the pictures of the documentation site in docs/images (chromium)
	$(BIN)/python scripts/screenshots

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

$(FUZZING): $(DEVELOPMENT) requirements-fuzz.lock
	$(PIP) --require-hashes -r requirements-fuzz.lock
	@touch $@

$(SUPPLY_CHAIN): $(DEVELOPMENT) requirements-supply-chain.lock
	$(PIP) --require-hashes -r requirements-supply-chain.lock
	@touch $@

$(DOCUMENTATION): $(DEVELOPMENT) requirements-docs.lock
	$(PIP) --require-hashes -r requirements-docs.lock
	@touch $@
