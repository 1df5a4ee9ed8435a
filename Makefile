# make demo: installs into .venv (also the command .venv/bin/profit), trains PROFIT W4A4 on
#   scikit-learn's digits, prints the table
# make test: installs into .venv, then runs the fast tests (about six minutes on two cores)
# make test-all: also installs what the export formats qonnx and litert need and the compilers for
#   TPUs and NVIDIA GPUs, then runs all tests
# make lint: ruff, mypy (half a minute)
# make wheel: builds the package into dist/
#
# One test, in one process: .venv/bin/python -m pytest tests/test_schedule.py -k cosine
PYTHON ?= python3
RUN ?= runs/digits_w4
# Test processes. Each takes whole files, because tests of a file share what they compile.
JOBS ?= 2
PYTEST = -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=15
VENV := .venv
BIN := $(VENV)/bin

# XLA on CPU takes its working memory anew at every step. With huge pages a training step of the
# demo has 400 page faults instead of 19,800 and takes 55 ms instead of 98 ms (2 cores, no teacher,
# one measurement; glibc 2.35 and later, others ignore it).
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
export TF_CPP_MIN_LOG_LEVEL := 2

.PHONY: demo test test-all lint wheel clean

demo: $(VENV)/installed
	$(BIN)/python main.py --config configs/digits_w4.py --workdir $(RUN)

test: $(VENV)/installed
	$(BIN)/python $(PYTEST) -m "not slow"

# Wrong input is drawn 30 times a test, not 20; see tests/drawn.py.
test-all: export HYPOTHESIS_PROFILE ?= ci
test-all: $(VENV)/extras
	$(BIN)/python $(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/installed
	$(BIN)/python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation \
	  --wheel-dir dist .

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or later is needed; make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	  --editable .
	touch $@

EXTRAS := requirements-qonnx.txt requirements-litert.txt requirements-accelerators.txt
$(VENV)/extras: $(VENV)/installed $(EXTRAS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt \
	  $(addprefix --requirement ,$(EXTRAS))
	touch $@

clean:
	rm -rf $(VENV) dist .mypy_cache .pytest_cache .ruff_cache
