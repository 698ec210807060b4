# `make demo` and `make test` do all their own set-up in .venv; a second call costs seconds.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt

# Threads that spin while they wait slow one another down several times over where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

# Stamps: the environment that builds, and the package built and installed in it with all that uses it.
ENVIRONMENT := .venv/environment.stamp
INSTALLED := .venv/installed.stamp
ZOO := .venv/zoo.stamp

.PHONY: build demo test zoo bench results lint sanitize gpu clean

build: $(INSTALLED)

# The main job: a report, then float against low precision on real images that come with scikit-learn.
demo: $(INSTALLED)
	$(BIN)/python tools/report.py convnet --input-size 8 --channels 1 --recipe "bfp4[0]"
	$(BIN)/python tools/train.py --dataset digits --recipe "bfp4[0]"

# A process a core, four at most, and a file a process at a time. A test that hangs for 20 minutes says where, and fails.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --durations=30 \
	-o faulthandler_timeout=1200 -o faulthandler_exit_on_timeout=true

# The packages whose models the tests of the zoo try, 213 MB: without them `make test` skips those tests by name.
zoo: $(ZOO)

bench: $(INSTALLED)
	$(BIN)/python tools/benchmark.py op

# The figures and tables of README.md, docs/results.md and docs/gallery.md: some hours; a second call goes on.
results: $(INSTALLED)
	$(BIN)/python tools/results.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy swalp_fx

# The op tests on a CPU module built with the address and undefined-behaviour sanitizers, which python must preload.
SANITIZED := build/sanitized
sanitize: $(INSTALLED)
	SWALP_FX_SANITIZE=1 SWALP_FX_CUDA=0 $(BIN)/python setup.py -q build --build-base $(SANITIZED)-objects --build-lib $(SANITIZED)
	PYTHONPATH=$(SANITIZED) LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libstdc++.so) \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/pytest tests/test_ops.py tests/test_laws.py tests/test_one_pass.py

# What a GPU shows, in ten minutes at most, stage by stage. It uses the compiled modules that are there, or builds them
# with the python and torch that are there, and installs nothing.
gpu:
	PYTHONPATH=$(CURDIR) $(PYTHON) tools/gpu.py

clean:
	rm -rf .venv build dist *.egg-info swalp_fx/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(ENVIRONMENT): constraints.txt
	@echo "installing torch into .venv (some minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) setuptools ninja torch
	touch $@

$(INSTALLED): $(ENVIRONMENT) pyproject.toml setup.py $(shell find csrc -type f)
	@echo "building swalp_fx (some minutes with nvcc) and installing what its tools and tests use"
	$(PIP) --no-build-isolation --editable ".[test,dev]"
	touch $@

# swalp_fx is there already, so that this adds the packages of its extra and builds nothing.
$(ZOO): $(INSTALLED)
	@echo "installing the packages of the zoo (a minute or two)"
	$(PIP) "swalp_fx[zoo]"
	touch $@
