# `make` lists the targets. A clean clone needs Python 3.10 or later and a package index, nothing else.
SHELL := bash
PYTHON ?= python3
# The first of these that runs: pyenv may have a python3.8 on PATH that only says that it is not chosen.
PYTHON38 ?= $(shell for python in python3.8 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.8*/bin/python; do \
	"$$python" -c "" 2>/dev/null && echo "$$python" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PROTO_BIN := .venv-proto/bin
# The generator has wheels for Python 3.8 to 3.12.
PROTO_PYTHON ?= $(PYTHON)
PROTO := proto/sft/v1/split_training.proto
# The wire as all who speak this version of the protocol know it; RELEASING.md says when it is written anew.
RELEASED := proto/released/$(shell sed -n 's/^PROTOCOL_VERSION = \(.*\)/protocol-\1.binpb/p' common/sft/wire/protocol.py)
# Tests that take longer than about five seconds run only with SLOW=1.
SLOW ?= 0
# A process for each core, which takes about a gigabyte; who has nothing left to do takes over from another. Where no
# bytecode may be written each of the hundred processes that the tests start would compile everything anew.
PYTEST = env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal
# Bandwidth of `make emulate`, in tc's units.
RATE ?= 100mbit

.DEFAULT_GOAL := help
.PHONY: help setup demo test check audit format proto released docs release-check test-jetpack lock emulate clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## install everything into .venv, at the versions of constraints.txt

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or later is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[edge,cloud,demo,dev]"
	@touch $@

demo: setup  ## fine-tune MiniLM on synthetic data in the paper's three systems, side by side
	$(BIN)/sft-edge demo

test: setup  ## run the tests; SLOW=1 adds the slow ones, SFT_DATA_DIR names the folder with the real data sets
ifeq ($(SLOW),1)
	$(PYTEST)
else
	$(PYTEST) -m "not slow"
endif

# The quick one, then the longest: with `--jobs` they run side by side.
CHECKS := check-style check-types check-generated check-security check-python38 check-rooms check-files check-alerts
check: $(CHECKS)  ## format, lint, types, import contracts, Python 3.8 in edge code, the wire, containers, alerts, generated code

.PHONY: $(CHECKS)
$(CHECKS): setup

check-types:
	$(BIN)/mypy

check-generated: $(PROTO_BIN)/.installed
	$(BIN)/buf lint
	$(BIN)/buf breaking --against $(RELEASED)
	rm -rf build/proto && mkdir -p build/proto
	$(call generate,build/proto)
	diff -rq -x __init__.py -x __pycache__ build/proto/sft/v1 common/sft/v1 || { echo "common/sft/v1 is out of date: run make proto" >&2; exit 1; }

check-security:
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive common edge_client cloud_server

check-python38:
	$(BIN)/vermin --quiet --no-tips --violations --target=3.8- common edge_client

check-rooms:
	$(BIN)/lint-imports --no-logo

check-style:
	$(BIN)/ruff format --check
	$(BIN)/ruff check

check-files:
	$(BIN)/hadolint cloud_server/Dockerfile edge_client/Dockerfile edge_client/Dockerfile.jetson
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml

check-alerts:
	@if command -v promtool >/dev/null; then \
		promtool check rules docs/grafana/alerts.yml && promtool test rules docs/grafana/alerts_test.yml; \
	else echo "alerts are not tried: promtool (apt install prometheus) is not on PATH" >&2; fi

# The tag at HEAD, if there is one.
release-check: TAG ?= $(shell git describe --tags --exact-match 2>/dev/null)
release-check:  ## whether changelog, version, citation and tag agree; TAG=vX.Y.Z names another than HEAD's
	$(PYTHON) .ci/check_release.py --tag "$(TAG)"

audit: setup  ## look up the pinned releases in the databases of known vulnerabilities; needs the network and pip-audit
	pip-audit --disable-pip --no-deps --requirement constraints.txt

format: setup  ## format the code and mend what the linter can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(PROTO_BIN)/.installed  ## generate common/sft/v1 from the .proto
	$(call generate,common)

released: setup  ## write down the wire as it is: what `make check` compares later ones with; at a release, or for a new PROTOCOL_VERSION
	$(BIN)/buf build --exclude-source-info -o $(RELEASED)

docs: setup  ## write what of docs/ is made from the code: api.md, commands.md, the rooms in architecture.md
	$(BIN)/python docs/generate.py

$(PROTO_BIN)/.installed: proto/requirements.txt
	$(PROTO_PYTHON) -m venv .venv-proto
	$(PROTO_BIN)/pip install --quiet --disable-pip-version-check -r $<
	@touch $@

define generate
$(PROTO_BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTO)
endef

test-jetpack: setup .venv-py38/.installed  ## test common and edge_client on JetPack 5's stack, then against a cloud of .venv; needs Python 3.8
	.venv-py38/bin/python tests/jetpack/run.py $(BIN)/python tests/common tests/edge tests/jetpack

.venv-py38/.installed: pyproject.toml edge_client/constraints-py38.txt
	@[[ -n "$(PYTHON38)" ]] || { echo "Python 3.8 is needed: apt install python3.8-venv, pyenv install 3.8, or make PYTHON38=PATH" >&2; exit 1; }
	$(PYTHON38) -m venv .venv-py38
	.venv-py38/bin/pip install --quiet --disable-pip-version-check -c edge_client/constraints-py38.txt torch==2.1.0 -e ".[edge,demo,test]"
	@touch $@

# Without transformers 5.24, which asks for a peft that is not released.
lock:  ## resolve both files of constraints anew; needs uv
	$(call resolve,constraints.txt,3.10 and later,--universal -c <(printf '%s\n' torch==2.13.0 'transformers<5.24') --python-version 3.10 --extra cloud --extra s3 --extra dev)
	$(call resolve,edge_client/constraints-py38.txt,3.8 on the edge,-c <(echo torch==2.1.0) --python-version 3.8 --extra test \
		--no-emit-package torch --no-emit-package triton)

# $(1) file, $(2) the Python it is for, $(3) options
define resolve
echo '# Exact versions for Python $(2). `make lock` writes this file.' > $(1)
uv pip compile --quiet --no-header --no-annotate $(3) --extra edge --extra demo pyproject.toml >> $(1)
endef

emulate: setup  ## train sl and sft through a link of RATE=100mbit between two network namespaces; needs root and iproute2
	$(BIN)/python bench/emulate.py --rate $(RATE) $(ARGS)

clean:  ## delete what the other targets made
	rm -rf $(VENV) .venv-proto .venv-py38 build dist demo-output output/emulate \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
