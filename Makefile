# Everything a developer of sessiond runs. Needs CPython 3.11 or newer with its headers, pip, gcc and make; the rest is
# installed into .venv by the first target that needs it. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# Targets share .venv and build/; each step uses the cores by itself.
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The first of these that is new enough. To choose: make PYTHON=/path/to/python3.12 ...
NEW_ENOUGH := import sys; sys.exit(not (sys.version_info >= (3, 11) and sys.implementation.name == "cpython"))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13 python3.14 python; do \
	"$$p" -c '$(NEW_ENOUGH)' 2>/dev/null && { echo "$$p"; break; }; done)

VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
LOG := $(VENV)/install.log
RUNS := build/run
EXT := $(wildcard ext/*.pyx ext/*.pxd ext/*.pxi ext/*.h ext/*.c)

# A debug build and a release build each have a stamp, so that going from one to the other builds again.
STAMP := $(VENV)/.installed$(if $(filter-out 0,$(SESSIOND_DEBUG)),-debug)
export SESSIOND_DEBUG ?=

# Where Python is told to write no bytecode, each of the many processes that the tests start would compile what the one
# before it did: a third of what a daemon's start takes.
unexport PYTHONDONTWRITEBYTECODE

PROTOS := $(sort $(wildcard proto/sessiond/v1/*.proto))
RELEASED := proto/released/sessiond.v1.binpb
# grpcio-tools is pinned in pyproject.toml: another version writes other bytes.
protoc = $(PY) -m grpc_tools.protoc -Iproto --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1) $(PROTOS)

# Tools call each other by name (cython-lint calls pycodestyle), and tests call buf, helm and weed.
run test torture bench bench-quick bench-nodes soak coverage check: private export PATH := $(CURDIR)/$(BIN):$(PATH)

# say,<what happens>: the line before a step.   fail,<what went wrong>,<remedy>: the lines after one that failed.
# Bold only on a terminal, where make says that there is one.
B := $(if $(NO_COLOR),,$(if $(MAKE_TERMOUT),\033[1m))
N := $(if $(B),\033[0m)
say = printf '$(B)==>$(N) %s\n' "$(1)"
fail = { printf '\n$(B)Failed:$(N) %s\n$(B)Remedy:$(N) %s\n' "$(1)" "$(2)" >&2; exit 1; }

.PHONY: help
help: ## Lists the targets
	@echo 'make TARGET, where TARGET is one of'
	@awk -F':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'Variables: PYTHON=python3.12  SESSIOND_DEBUG=1 (debug build of the core)  FILES=a.jsonl (run)  ARGS=... (run, test, bench)'

# ---------------------------------------------------------------------------------------------- environment and build

.PHONY: venv
venv: $(VENV)/.created ## Makes .venv, empty but for pip

$(VENV)/.created:
	@[ -n "$(PYTHON)" ] || $(call fail,no CPython 3.11 or newer on the PATH.,install one (Debian: apt install python3 python3-dev) or name it: make PYTHON=/path/to/python3.11 ...)
	@"$(PYTHON)" -c '$(NEW_ENOUGH)' || $(call fail,$(PYTHON) is older than CPython 3.11 or does not run.,name a newer one: make PYTHON=/path/to/python3.11 ...)
	@$(call say,Making $(VENV) with $$("$(PYTHON)" --version) ($$(command -v "$(PYTHON)")))
	@rm -rf $(VENV)
	@# Debian splits ensurepip off into python3-venv; the pip outside can then fill the environment.
	@"$(PYTHON)" -m venv $(VENV) >/dev/null 2>&1 \
	|| { rm -rf $(VENV); "$(PYTHON)" -m venv --without-pip $(VENV) && "$(PYTHON)" -m pip --python $(PY) install --quiet pip; } \
	|| $(call fail,no virtual environment could be made in $(VENV).,see the lines above; on Debian: apt install python3-venv python3-pip)
	@touch $@

.PHONY: build
build: $(STAMP) ## Installs sessiond and its tools into .venv and builds the compiled core

$(STAMP): $(VENV)/.created pyproject.toml setup.py $(EXT)
	@command -v "$${CC:-gcc}" >/dev/null || $(call fail,no C compiler ($${CC:-gcc}): the compiled core cannot be built.,install one (Debian: apt install gcc) or name it: CC=clang make ...)
	@[ -e "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] \
	|| $(call fail,the C headers of $$($(PY) --version) are missing.,install them (Debian: apt install python3-dev; Fedora: dnf install python3-devel))
	@rm -f $(VENV)/.installed*
	@$(call say,Installing sessiond with its test and development tools; compiling the core$(if $(findstring debug,$(STAMP)), for debugging))
	@# Build requirements go in first, so that the core is built without a second, isolated environment.
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' > $(VENV)/build-requires.txt
	@{ $(PY) -m pip install --disable-pip-version-check --progress-bar off -r $(VENV)/build-requires.txt \
	&& $(PY) -m pip install --disable-pip-version-check --progress-bar off --no-build-isolation -e '.[dev]'; } 2>&1 \
	| tee $(LOG) | awk '/^(Collecting|  Building|Building|Installing|Successfully)/ { print "    " substr($$0, 1, 110); fflush() }' \
	|| { echo; { grep -E -A3 '\.(pyx|pxd|h|c):[0-9]+:' $(LOG) | head -20; echo; tail -15 $(LOG); } >&2 || true; \
	$(call fail,pip could not install the dependencies or build the core; the whole output is in $(LOG).,without a network: PIP_INDEX_URL or PIP_FIND_LINKS must name a mirror; a compiler error: see the log; a broken environment: rm -rf $(VENV)); }
	@touch $@

# -------------------------------------------------------------------------------------------------- run, test, measure

.PHONY: run
run: build ## Shows it: import, kill -9 under load, recover, lose the disk, recover (FILES="a.jsonl" for your own conversations)
	@$(call say,Running the demonstration)
	@$(PY) -m sessiond.demo $(FILES) $(ARGS)

.PHONY: test
test: build ## Runs the tests: the whole suite on the compiled core, tests/core also on its pure twin
	@$(call say,The whole suite on the compiled core)
	@# A file stays on one worker, with its daemons; most of the time goes into waiting for fsyncs and timeouts.
	@$(PY) -m pytest tests -q -m "not torture" -n 2 --dist loadfile -p no:benchmark $(ARGS) \
	|| $(call fail,tests failed on the compiled core.,one test alone: $(PY) -m pytest tests/FILE.py::NAME -x; if a daemon misbehaves only when compiled: SESSIOND_DEBUG=1 make test)
	@$(call say,tests/core on the pure twin)
	@SESSIOND_PURE=1 $(PY) -m pytest tests/core -q -m "not torture" -n 2 --dist loadfile -p no:benchmark $(ARGS) \
	|| $(call fail,tests failed on the pure twin.,one test alone: SESSIOND_PURE=1 $(PY) -m pytest tests/core/FILE.py::NAME -x)

# How long `make torture` runs simulated worlds.
MINUTES ?= 60

.PHONY: torture
torture: build ## Runs the tests that take hours: kills and faults by the hundred, simulated worlds for MINUTES=60
	@$(call say,The torture tests)
	@$(PY) -m pytest tests -m torture -o faulthandler_timeout=0 $(ARGS) \
	|| $(call fail,a torture test failed.,the failure names its seed; run that test alone with it)
	@mkdir -p build/sim
	@$(call say,Simulated worlds for $(MINUTES) minutes, on from where the last run stopped)
	@$(PY) -m tests.sim --torture --state build/sim/torture.json --minutes $(MINUTES) \
	|| $(call fail,a simulated world broke an invariant.,the lines above name the seed and the command that replays it)

BENCH := $(PY) -m pytest bench -s -o faulthandler_timeout=0 --benchmark-only --benchmark-sort=name \
	--benchmark-columns=min,median,max,ops,rounds
# Only to see that the cases work.
BENCH_QUICK := --quick --benchmark-min-rounds=1 --benchmark-max-time=0.1 --benchmark-warmup=off --benchmark-disable-gc
FIGURES := build/bench/ratios.json
PEERS := build/bench/peers

# The peers have an environment of their own: what they bring must not meet what the daemon or its tests use. Without
# them (no network) the benchmarks run, and say of each peer that it is missing.
$(PEERS)/.installed: $(VENV)/.created pyproject.toml
	@$(call say,Installing the peers that sessiond is compared with into $(PEERS))
	@mkdir -p build/bench && rm -rf $(PEERS)
	@$(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")' > build/bench/peers.txt
	@{ { $(PY) -m venv --without-pip $(PEERS) \
	&& $(PY) -m pip --python $(PEERS)/bin/python install --disable-pip-version-check --quiet -r build/bench/peers.txt; } \
	> build/bench/peers.log 2>&1 && touch $@; } \
	|| { rm -rf $(PEERS); tail -3 build/bench/peers.log; printf '    the peers could not be installed: the benchmarks run without them\n'; }

# A whole run writes bench/RESULTS.md, RESULTS.json and plots, also where a case failed; a part of it only prints.
.PHONY: bench
ifdef SMOKE
bench: bench-quick
else
bench: build $(PEERS)/.installed ## Runs the benchmarks with their peers, half an hour, and writes bench/RESULTS.md and its plots
	@$(call say,The benchmarks)
	@mkdir -p build/bench
	@failed=; $(BENCH) -m "not nodes" --benchmark-json=build/bench/latest.json $(ARGS) || failed=yes; \
	$(if $(ARGS),,if [ -x $(PEERS)/bin/python ]; then PYTHONPATH=. $(PEERS)/bin/python -m bench.plots $(FIGURES) bench/plots; fi; \
	$(PY) -m bench.report $(FIGURES) bench;) \
	[ -z "$$failed" ] || $(call fail,a benchmark failed.,one alone: make bench ARGS=-kNAME)
endif

.PHONY: bench-quick
bench-quick: build ## Runs every benchmark briefly, only to see that it works: no threshold, and its figures mean nothing
	@$(call say,The benchmarks - briefly: the figures mean nothing)
	@mkdir -p build/bench
	@failed=; $(BENCH) $(BENCH_QUICK) $(ARGS) || failed=yes; \
	$(PY) -m bench.report build/bench/ratios-quick.json build/bench/quick; \
	[ -z "$$failed" ] || $(call fail,a benchmark failed.,one alone: make bench-quick ARGS=-kNAME)

.PHONY: bench-nodes
bench-nodes: build ## Runs the benchmarks of several nodes, crowds and watchers: a quarter of an hour
	@$(call say,Benchmarks of several nodes and thousands of watchers)
	@mkdir -p build/bench
	@$(BENCH) -m nodes --ratios build/bench/nodes.json $(ARGS) \
	|| $(call fail,a benchmark failed.,one alone: make bench-nodes ARGS=-kNAME)

.PHONY: soak
soak: build ## Mixed load for 30 minutes (MINUTES=5 for five): are memory, file size and latency flat?
	@$(call say,Mixed load)
	@mkdir -p build/bench
	@$(PY) -m bench.soak --minutes $(if $(filter file,$(origin MINUTES)),30,$(MINUTES)) --out build/bench/soak.json $(ARGS) \
	|| $(call fail,the soak run failed.,the lines above say which call or check)
	@if [ -x $(PEERS)/bin/python ]; then PYTHONPATH=. $(PEERS)/bin/python -m bench.plots build/bench/soak.json build/bench; fi

.PHONY: profile
profile: build ## Shows where the time of a resume and of an append goes
	@$(call say,Where the time goes)
	@$(PY) -m bench.where $(ARGS)

.PHONY: coverage
coverage: build ## Measures which lines the tests reach, daemons that they start included
	@$(call say,The suite under coverage)
	@mkdir -p build/coverage && rm -f build/coverage/data*
	@$(PY) -m coverage run -m pytest tests -q -m "not torture" $(ARGS) \
	&& SESSIOND_PURE=1 $(PY) -m coverage run -m pytest tests/core -q -m "not torture" $(ARGS) \
	|| $(call fail,tests failed under coverage.,make test tells whether they fail without it)
	@$(PY) -m coverage combine -q && $(PY) -m coverage html -q && $(PY) -m coverage report
	@$(call say,Line by line: build/coverage/html/index.html)

.PHONY: annotate
annotate: build ## Makes Cython's annotated HTML of the core: how much Python each line calls
	@mkdir -p build/annotate
	@$(BIN)/cython -3 --annotate -I ext -o build/annotate/_kernel.c ext/_kernel.pyx
	@$(call say,build/annotate/_kernel.html: the yellower a line the more Python it calls)

# ------------------------------------------------------------------------------------------------------------- checks

# Every step runs even if one before it failed; the last line names those that did.
.PHONY: check
check: build ## Runs every check that is not a test: lint, types, layers, the contract
	@failed=(); \
	step() { $(call say,$$1); shift; "$$@" || failed+=("$$*"); }; \
	step "ruff: lint" $(BIN)/ruff check .; \
	step "ruff: format" $(BIN)/ruff format --check --diff .; \
	step "mypy --strict" $(BIN)/mypy --strict; \
	step "stubtest: _kernel.pyi against the compiled core" $(BIN)/stubtest sessiond.core._kernel; \
	step "cython-lint" $(BIN)/cython-lint ext; \
	step "import-linter: the layers" $(BIN)/lint-imports --no-cache; \
	step "buf lint: the contract" $(BIN)/buf lint proto; \
	step "buf breaking: against the released contract" $(MAKE) proto-breaking; \
	step "generated code: drift from the contract" $(MAKE) proto-drift; \
	[ $${#failed[@]} = 0 ] && { $(call say,All checks passed); exit 0; }; \
	printf '    failed: %s\n' "$${failed[@]}" >&2; \
	$(call fail,$${#failed[@]} of the checks.,each command above runs by itself; what ruff can mend: $(BIN)/ruff check --fix . && $(BIN)/ruff format .)

.PHONY: proto
proto: build ## Generates src/sessiond/v1 from proto/
	@$(call say,Generating src/sessiond/v1)
	@rm -f src/sessiond/v1/*_pb2*.py*
	@$(call protoc,src) || $(call fail,protoc did not accept the contract.,the line above names file and line)

.PHONY: proto-drift
proto-drift: build
	@tmp=$$(mktemp -d); trap 'rm -rf "$$tmp"' EXIT; \
	$(call protoc,"$$tmp"); \
	diff -rq -x __init__.py -x __pycache__ "$$tmp/sessiond/v1" src/sessiond/v1 >"$$tmp/diff" \
	|| { cat "$$tmp/diff" >&2; $(call fail,src/sessiond/v1 is not what proto/ generates.,make proto and commit both together); }

.PHONY: proto-breaking
proto-breaking: build
	@[ -e $(RELEASED) ] || $(call fail,$(RELEASED) is missing: nothing to compare the contract with.,restore it from git)
	@$(BIN)/buf breaking proto --against $(RELEASED) \
	|| $(call fail,the contract no longer serves clients of the last release.,add fields and methods; never change or remove them)

# The reference that `buf breaking` compares with is the contract of the last release, as one image without comments.
# It moves at a release, and only forward: a change that breaks a client needs FORCE=1 and a major version.
.PHONY: proto-freeze
proto-freeze: build ## At a release: makes the contract as it is now the one that later ones may not break
	@[ -n "$(FORCE)" ] || [ ! -e $(RELEASED) ] || $(BIN)/buf breaking proto --against $(RELEASED) \
	|| $(call fail,this contract breaks clients of the one released before.,mend it; or if it was never released: make proto-freeze FORCE=1)
	@mkdir -p $(dir $(RELEASED))
	@$(BIN)/buf build proto --exclude-source-info -o $(RELEASED)
	@$(call say,$(RELEASED) is the contract of this release; commit it)

.PHONY: clean
clean: ## Removes .venv and everything that was built
	rm -rf $(VENV) build dist src/*.egg-info src/sessiond/core/*.so
