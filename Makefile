# Everything a contributor or a first-time user runs. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PLUGINS := $(sort $(dir $(wildcard plugins/*/pyproject.toml)))
EDITABLE := -e . $(addprefix -e ,$(PLUGINS))
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help venv lock proto

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV)/.ready  ## Make .venv from the pinned requirements, with all our distributions in it (editable)

$(VENV)/.ready: requirements/dev.lock pyproject.toml $(wildcard plugins/*/pyproject.toml)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --require-hashes -r requirements/dev.lock
	$(PIP) install --quiet --no-deps --no-build-isolation $(EDITABLE)
	touch $@

lock:  ## Write requirements/*.lock anew from the declared dependencies (needs uv; UPGRADE=1 moves versions)
	$(PYTHON) scripts/lock.py $(if $(UPGRADE),--upgrade)

proto: $(VENV)-proto/.ready  ## Compile dispatcher/cri/api.proto with the pinned generator
	$(VENV)-proto/bin/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. dispatcher/cri/api.proto

$(VENV)-proto/.ready: requirements/proto.lock
	test -x $(VENV)-proto/bin/python || $(PYTHON) -m venv $(VENV)-proto
	$(VENV)-proto/bin/python -m pip --disable-pip-version-check install --quiet --require-hashes -r requirements/proto.lock
	touch $@
