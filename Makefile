# make demo   quantise examples/models/leaf and show what each method keeps of it
# make test   GoogleTest and pytest
# make docs   the site of the documentation, to build/docs/index.html
#
# Each sets everything up in .venv first. TORCH_INDEX names another index for torch where the usual one would serve a build for CUDA:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=

# Tests that run side by side.
JOBS ?= 2

BUILD := build/make
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# Build requirements live in the environment too, so that a second build is incremental.
INSTALL := $(PIP) --no-build-isolation --config-settings=build-dir=$(BUILD)
BUILD_NEEDS := scikit-build-core pybind11 cmeel-eigen cmake ninja
SOURCES := CMakeLists.txt pyproject.toml constraints.txt $(shell find csrc python/mrgptq -name '*.h' -o -name '*.cc' -o -name '*.py' -o -name '*.pyi')

# torch brings an OpenMP runtime of its own: threads of the one that wait by spinning would take the cores from the other.
export OMP_WAIT_POLICY ?= passive
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo docs test
# The demo and the site build the core for this machine alone, the tests for every level, as a wheel has it.
demo: $(VENV)/.demo
	$(VENV)/bin/python examples/demo.py

docs: $(VENV)/.docs
	$(VENV)/bin/python python/docs/build.py build/docs

test: $(VENV)/.test
	ctest --test-dir $(BUILD) --output-on-failure --parallel $(JOBS)
	$(VENV)/bin/python -m pytest --numprocesses $(JOBS) --dist worksteal

$(VENV)/.demo: $(VENV)/.made $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.MRGPTQ_ISA=native '.[hf,plot]'
	touch $@

$(VENV)/.docs: $(VENV)/.made $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.MRGPTQ_ISA=native '.[hf,plot,docs]'
	touch $@

$(VENV)/.test: $(VENV)/.made $(SOURCES) $(wildcard tests/cpp/*.cc)
	sh .ci/system-packages googletest
	$(INSTALL) --config-settings=cmake.define.MRGPTQ_ISA=all --config-settings=cmake.define.MRGPTQ_TESTS=ON '.[hf,plot,bench,dev,docs]'
	touch $@

$(VENV)/.made: constraints.txt
	PYTHON=$(PYTHON) sh .ci/system-packages compiler python
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) $(BUILD_NEEDS)
	touch $@
