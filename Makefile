# make test | lint | demo | demo-continual | bench | sanitize | fuzz | aarch64 | oldest | gpu | clean: each does its own set-up.
#   PYTHON=python3.12   interpreter the virtual environment is made with (3.10 or newer)
#   VENV=.venv          where it is
#   PYTEST_ARGS=...     further arguments for pytest
PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PY := $(abspath $(BIN))/python
# A change of what is installed gives the stamp another name, so only that reinstalls.
INSTALLED := $(VENV)/.installed-$(shell cat constraints.txt pyproject.toml setup.py | sha256sum | cut -c1-16)
SOURCES := $(wildcard csrc/*/*) setup.py
COMPILED := build/.compiled
CXX_FILES = $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/csrc/*.cpp)
# The release for constraints.txt's PyTorch. Its wheel is for CUDA: where others find it beside a PyTorch for the CPU, the
# imports of transformers break, so it lies apart for a test that imports it on its own.
TORCHVISION := torchvision==0.28.0
# Test processes; each of them runs PyTorch on one or two threads.
JOBS ?= 2

.PHONY: all venv build test lint format demo demo-continual bench sanitize fuzz aarch64 oldest cmake gpu clean

all: build

venv: $(INSTALLED)

$(INSTALLED): constraints.txt pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt setuptools ninja pybind11 torch numpy
	LANCE_BUILD_EXT=0 $(PY) -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	rm -f $(VENV)/.installed-*
	touch $@

build: $(COMPILED)

$(COMPILED): $(INSTALLED) $(SOURCES)
	LANCE_REQUIRE_EXT=1 PATH="$(abspath $(BIN)):$$PATH" $(PY) setup.py -q build_ext --inplace
	mkdir -p build && touch $@

build/torchvision: | $(INSTALLED)
	rm -rf $@.part
	$(PY) -m pip install -q --no-deps --target $@.part $(TORCHVISION)
	mv $@.part $@

build/avalanche: tests/integrations/avalanche.txt | $(INSTALLED)
	rm -rf $@ $@.part
	$(PY) -m pip install -q --no-deps --target $@.part -r $<
	mv $@.part $@
	touch $@

# Threads that wait in a spin starve the other test process.
test: build build/torchvision build/avalanche
	OMP_WAIT_POLICY=PASSIVE $(PY) -m pytest -q -n $(JOBS) $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

demo: build
	$(PY) -m benchmarks.demo

# Seven ways to learn split digits task by task, one seed.
demo-continual: build
	$(PY) -m benchmarks --suite continual --case "split digits: seed 0"

bench: build
	$(PY) -m benchmarks
	$(PY) -m pytest -q benchmarks --benchmark-enable

cmake: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/cmake -G Ninja -DPython3_EXECUTABLE=$(PY)
	cmake --build build/cmake
	ctest --test-dir build/cmake --output-on-failure

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, driven by their own tests and the operators'.
# Fresh memory is filled with 0xff bytes, which are NaN. Leaks are not looked for: Python and PyTorch keep memory until
# the process ends.
sanitize: $(INSTALLED)
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/sanitize -G Ninja -DPython3_EXECUTABLE=$(PY) \
		-DLANCE_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo
	cmake --build build/sanitize
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255 \
		UBSAN_OPTIONS=print_stacktrace=1 \
		LANCE_CPU_LIBRARY=$(abspath build/sanitize/lance_cpu.so) \
		$(PY) -m pytest -q -p no:cacheprovider -n $(JOBS) tests/csrc tests/ops $(PYTEST_ARGS)

# Hypothesis with many more examples than `make test` draws.
fuzz: build
	HYPOTHESIS_PROFILE=fuzz $(PY) -m pytest -q -n $(JOBS) tests/csrc tests/ops tests/fuzz $(PYTEST_ARGS)

aarch64: $(INSTALLED)
	.ci/aarch64 $(PY)

# The tests with the oldest PyTorch there is support for, on a clone of what is committed. Its wheel is for CUDA: gigabytes.
oldest:
	rm -rf build/oldest
	git clone -q . build/oldest
	awk -F== '!seen[$$1]++' constraints-oldest.txt constraints.txt > build/oldest/constraints.txt
	$(MAKE) -C build/oldest test TORCHVISION=torchvision==0.26.0 VENV=.venv

# On a machine with a GPU, in the system's own Python where its PyTorch sees one (nothing is installed there), else in the
# virtual environment: builds, runs the tests of the device, measures; every stage has its own time, at whose end it is
# interrupted and says how far it came. GPU_ARGS goes to
# `python -m benchmarks.gpu`, as in GPU_ARGS="--case 'projection*'" or GPU_ARGS=--models.
GPU_ARGS ?=
GPU_JOBS ?= 12
# Seconds after which no further case starts; one that has begun may take a minute more.
GPU_SECONDS ?= 200
gpu:
	@py=$$(python3 -c "import sys, torch; torch.cuda.is_available() and print(sys.executable)" 2>/dev/null); \
	if [ -z "$$py" ]; then $(MAKE) venv && py=$(PY) || exit 1; fi; \
	$$py -c "import torch; assert torch.cuda.is_available(), 'no GPU that this PyTorch can use'" || exit 1; \
	status=0; export PYTHONPATH=.; test="$$py -m pytest -q -o addopts= -p no:cacheprovider --confcutdir=tests/gpu tests/gpu"; \
	stage() { limit=$$1; shift; echo "== $$*"; \
		timeout -s INT -k 10 $$limit "$$@" || { status=1; echo "== failed, or longer than its $$limit s: $$*" >&2; }; }; \
	stage 60 env LANCE_REQUIRE_EXT=1 $$py setup.py -q build_ext --inplace; \
	test -e lance_kernels/lance_cuda.so || { status=1; echo "== no CUDA library: Grams take the reference" >&2; }; \
	stage 120 env OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $$test -rf --tb=short -n $(GPU_JOBS); \
	if command -v compute-sanitizer >/dev/null; then \
		stage 60 compute-sanitizer --error-exitcode 9 $$test -k "mode_grams and contiguous and dtype0"; fi; \
	stage $$(($(GPU_SECONDS) + 60)) $$py -m benchmarks.gpu --seconds $(GPU_SECONDS) $(GPU_ARGS); \
	exit $$status

clean:
	rm -rf build dist *.egg-info lance_kernels/*.so
