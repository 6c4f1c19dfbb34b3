# Everything a contributor or a first-time user runs. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
PREFIX ?= /opt/cri-dispatcher
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
EDITABLE := -e . $(addprefix -e ,$(PLUGINS))
PIP := $(BIN)/python -m pip --disable-pip-version-check
# In a plain chroot, container engines need a mount namespace whose root is the chroot; elsewhere this changes nothing.
WHOLE := $(BIN)/python scripts/whole_root.py
SOURCES := dispatcher $(wildcard $(addsuffix src,$(PLUGINS)) demo scripts bench tests)

# Seconds that each fuzzer runs within `make test`, and within `make fuzz`.
FUZZ_SECONDS ?= 5
FUZZ_LONG_SECONDS ?= 3600
PYTEST_ARGS ?=

.PHONY: help demo test test-pods test-vm soak fuzz bench lint types format host-demo host-test host-vm clean-host venv install lock proto

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: host-demo venv  ## Start a private engine, a registry and the endpoint, and run pods through them
	$(WHOLE) $(BIN)/python -m demo $(DEMO_ARGS)

test: host-test venv lint types  ## Everything that decides whether a change may land
	$(BIN)/python -m compileall -q dispatcher plugins  # a test starts many daemons: none has to compile again
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(WHOLE) $(BIN)/python -m pytest $(PYTEST_ARGS)

test-vm: host-vm venv  ## The tests that depend on systemd and cgroup v2, in a virtual machine of Debian 12 (VM_ARGS=...)
	$(BIN)/python -m tests.vm test $(VM_ARGS)

test-pods: host-test venv  ## Pods in virtual machines: the contract of runtimes and a whole node, on real QEMU
	$(WHOLE) $(BIN)/python -m pytest -m vm tests/vm_pods $(PYTEST_ARGS)

soak: host-test venv  ## Repetitions of what the tests show once: hundreds of kills, thousands of pods
	$(WHOLE) $(BIN)/python -m pytest -m soak --timeout=7200 $(PYTEST_ARGS)

fuzz: host-test venv  ## The fuzzers for an hour each (FUZZ_LONG_SECONDS=n)
	FUZZ_SECONDS=$(FUZZ_LONG_SECONDS) $(WHOLE) $(BIN)/python -m pytest -m fuzz --timeout=0 $(PYTEST_ARGS)

bench: host-test venv  ## Measure this endpoint beside another one (BENCH_ARGS=...)
	$(WHOLE) $(BIN)/python bench/cri.py $(BENCH_ARGS)

lint: venv  ## Style, formatting and the import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: venv  ## mypy in strict mode
	$(BIN)/mypy $(SOURCES)

format: venv  ## Let the formatter decide
	$(BIN)/ruff format .

host-demo:  # what the demo needs from Debian
	scripts/host.sh install demo

host-test:  # what the tests need from Debian
	scripts/host.sh install test

host-vm:  # what builds and runs the virtual machine
	scripts/host.sh install vm

clean-host:  ## Remove what a demo left behind, and the Debian packages that were installed for it
	if [ -x $(BIN)/python ]; then $(BIN)/python -m demo --clean; fi
	scripts/host.sh clean

venv: $(VENV)/.ready  ## Make .venv from the pinned requirements, with all our distributions in it (editable)

$(VENV)/.ready: requirements/dev.lock pyproject.toml $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements/dev.lock
	$(PIP) install --quiet --no-deps --no-build-isolation $(EDITABLE)
	touch $@

install:  ## Install the program and all plugins into PREFIX (/opt/cri-dispatcher), and nothing outside of it
	test -x $(PREFIX)/bin/python || $(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements/runtime.lock
	$(PREFIX)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-build-isolation . $(PLUGINS)

lock:  ## Write requirements/*.lock anew from the declared dependencies (needs uv; UPGRADE=1 moves versions)
	$(PYTHON) scripts/lock.py $(if $(UPGRADE),--upgrade)

proto: $(VENV)-proto/.ready  ## Compile dispatcher/cri/api.proto with the pinned generator
	$(VENV)-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. dispatcher/cri/api.proto

$(VENV)-proto/.ready: requirements/proto.lock
	test -x $(VENV)-proto/bin/python || $(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements/proto.lock
	touch $@
