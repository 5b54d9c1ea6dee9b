# make demo     train small networks with torch.nn and with fastnorm, then time the layers; QUICK=1: a shorter one
# make test     the whole test suite; ARGS='-k groupnorm' is passed on to pytest
# make test-ptx all tests of the CUDA kernels on nvcc's PTX, of which `make test` runs a part; needs nvcc, no GPU
# make test-models  fastnorm in real models (torchvision, timm, diffusers, transformers) and under tools for them
# make bench    the full benchmark table; ARGS='--filter GroupNorm' is passed on to benchmarks/bench.py
# make bench-models  images a second and memory of whole models; ARGS is passed on to benchmarks/end_to_end.py
# make report   the figures of README and docs, and the pictures, from the runs in benchmarks/results; ARGS=--check only compares
# make studies  the studies of examples/studies, and their pages in docs/studies; QUICK=1: a short form, into build/studies
# make docs     the pages of docs/ and the API reference, into build/docs
# make lint     formatting, lint and types          make format   puts formatting right
# make build    the extension alone                 make clean    removes what was built, keeps .venv
# make check-cuda   compiles the CUDA kernels for every architecture and reads their machine code; needs nvcc, no GPU;
#               ARGS=--update saves what it counts, ARGS=--sample compiles a part and compares
# make count-instructions   counts what they execute for an element, and compares; ARGS=--update saves the counts
# make count-cpu-instructions   the same for the CPU kernels, by single steps on this processor; needs no nvcc
#
# Each makes .venv where there is none, installs requirements-dev.txt and torch into it, and builds what has changed.
#
#   TORCH=2.11.0   another torch (any from 2.10)    PYTHON=python3.12   the Python to make .venv with
#   VENV=folder    another environment              MAX_JOBS=4          compilations at a time
#   JOBS=0         tests in one process (default: as many as there are processors)

TORCH ?= 2.13.0
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?= auto

PY := $(VENV)/bin/python
READY := $(VENV)/.torch-$(TORCH)
# There is one fastnorm/_C.*.so, for the torch and the environment named here: naming others builds it anew.
BUILT := build/.built-$(TORCH)-$(subst /,_,$(VENV))
NATIVE := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(filter csrc/%,$(NATIVE))

.PHONY: demo test test-ptx test-models bench bench-models report studies docs build
.PHONY: check-cuda count-instructions count-cpu-instructions
.PHONY: lint lint-cpp lint-python lint-types format clean

demo: $(BUILT)
	$(PY) examples/train_digits.py $(if $(QUICK),--quick) $(ARGS)

test: $(BUILT)
	$(PY) -m tests.prepare $(ARGS)
	$(PY) -m pytest tests benchmarks/test_bench_results.py benchmarks/test_bench_cuda.py --ignore tests/models -n $(JOBS) $(ARGS)

test-ptx: $(BUILT)
	$(PY) -m tests.prepare --backend ptx
	$(PY) -m pytest tests --ignore tests/models --backend ptx -n $(JOBS) $(ARGS)

test-models: $(BUILT)
	$(PY) -m pip install --disable-pip-version-check --quiet torch==$(TORCH) -r requirements-models.txt
	$(PY) -m pytest tests/models -n $(JOBS) $(ARGS)

bench: $(BUILT)
	$(PY) benchmarks/bench.py $(ARGS)

bench-models: $(BUILT)
	$(PY) benchmarks/end_to_end.py $(ARGS)

report: $(BUILT)
	$(PY) benchmarks/report.py $(ARGS)

STUDIES := error_surface initialization deep_residual which_axes inference
studies: $(BUILT)
	set -e; for study in $(STUDIES); do $(PY) examples/studies/$$study.py $(if $(QUICK),--quick) $(ARGS); done

docs: $(BUILT)
	$(PY) -m pip install --disable-pip-version-check --quiet -r requirements-docs.txt
	$(PY) -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

build: $(BUILT)

check-cuda: $(READY)
	$(PY) tests/check_cuda.py $(ARGS)

count-instructions: $(BUILT)
	$(PY) benchmarks/count_instructions.py $(ARGS)

count-cpu-instructions: $(BUILT)
	$(PY) benchmarks/count_cpu_instructions.py $(ARGS)

lint: lint-cpp lint-python lint-types
lint-cpp: $(READY)
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)
lint-python: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
lint-types: $(READY)
	$(PY) -m mypy

format: $(READY)
	$(VENV)/bin/clang-format -i $(NATIVE)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

clean:
	rm -rf build dist fastnorm.egg-info fastnorm/_C.*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

# The first line compiles where one can watch, the second makes `import fastnorm` find this checkout.
$(BUILT): $(READY) $(SOURCES) setup.py setup_cuda.py setup_ninja.py pyproject.toml
	$(PY) setup.py --quiet build_ext --inplace
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	rm -f build/.built-*
	mkdir -p build && touch $@

# One call of pip, so that torch stays the one named. The stamp is torch's: naming another version installs that one.
$(READY): requirements-dev.txt | $(PY)
	rm -f $(VENV)/.torch-*
	$(PY) -m pip install --disable-pip-version-check --quiet torch==$(TORCH) -r requirements-dev.txt
	touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'fastnorm: $(PYTHON) is not Python 3.10 or newer: name one, as in `make PYTHON=python3.12`.' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
