# make demo and make test need nothing but Python ≥ 3.11 and a C++20 compiler; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# The environment's own CMake and ninja come first: a system's may be too old.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: install demo test check cpp-test bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel pybind11 ninja cmake
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: install
	$(BIN)/e2e-fast demo

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

check: install cpp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/* tests/cpp/*
	$(BIN)/pyright --pythonpath $(BIN)/python

# The C++ core by itself, under the address and undefined-behaviour sanitizers.
cpp-test: install
	cmake -S . -B build/cpp-test -G Ninja \
	  -DE2E_FAST_TESTS=ON -DE2E_FAST_SANITIZE=ON > /dev/null
	cmake --build build/cpp-test
	ctest --test-dir build/cpp-test --output-on-failure

bench: install
	$(BIN)/python -m pytest --benchmark

clean:
	rm -rf build $(VENV) out e2e_fast/_C*.so
