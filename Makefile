# make demo    install, then fine-tune on what the package ships and print the table
# make test    install, then run the tests; make test-slow runs the long ones too
# make lint    format, docstrings, types
# make docs    the documentation, as a site in docs/_build/html; a warning is an error; GALLERY=0 runs no examples for it
# make bench   the benchmarks
# make gpu     the tests and benchmarks of a GPU, on this machine's, in under eight minutes: benchmarks/results/gpu.json
# make lock    what CI installs, at exact versions with hashes: .ci/requirements.lock, and .ci/docs.lock for the documentation;
#              LOCK=.ci/requirements.lock installs it
# make audit   known vulnerabilities of what the lock pins
LOCK ?=
GALLERY ?= 1
PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3)
VENV ?= .venv
PYTEST_JOBS ?= -n auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# Where this is set, every process would compile all that it imports once more: half a minute each, for torch and Ray.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow lint docs bench gpu lock audit clean

demo: $(VENV)/.package
	$(BIN)/kngd-ray train seeds=0,1,2 baselines=adamw

test: $(VENV)/.installed
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_JOBS)

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/.installed
ifeq ($(LOCK),)
	$(call install,-e ".[docs]")
else
	$(call install,--require-hashes --no-deps -r $(dir $(LOCK))docs.lock)
endif
	$(BIN)/python -m sphinx -W --keep-going -q -D plot_gallery=$(GALLERY) -b html docs docs/_build/html

bench: $(VENV)/.installed
	$(call install,-e ".[bench]")
	$(BIN)/python -m benchmarks.readme_table
	$(BIN)/python -m benchmarks.step_cost --out benchmarks/results
	$(BIN)/python -m benchmarks.peers
	$(BIN)/python -m benchmarks.step_cost --markdown
	$(BIN)/python -m benchmarks.peers --markdown

gpu: $(VENV)/.installed
	$(call install,-e ".[bench]")
	$(BIN)/python -m benchmarks.gpu

lock: $(VENV)/.installed
	$(BIN)/python .ci/lock

audit:
	$(PYTHON) .ci/audit

clean:
	rm -rf $(VENV) build dist docs/_build docs/gallery examples/kngd_runs examples/mlruns examples/mlflow.db examples/*.png *.egg-info

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# uv takes a fifth of pip's time. It reads no pip.conf, which may name the only index that can be reached: then pip goes on.
# Its cache is beside what it installs, so that files are linked and not copied, and goes when it is done.
UV := UV_CACHE_DIR=$(VENV)/.uv $(BIN)/uv pip install --quiet --python $(BIN)/python
install = ( $(UV) $(1) || $(PIP) $(1) ) && rm -rf $(VENV)/.uv

$(VENV)/.package: pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "make: kngd_ray needs Python 3.11 or later, and $(PYTHON) is " + sys.version.split()[0] + ": name another, make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCK),)
	$(PIP) uv
	$(call install,-e .)
else
	grep "^uv==" $(LOCK) | $(PIP) --require-hashes --no-deps -r /dev/stdin
	$(call install,--require-hashes --no-deps -r $(LOCK))
	$(PIP) --no-deps --no-build-isolation -e .
endif
	touch $@

$(VENV)/.installed: $(VENV)/.package
ifeq ($(LOCK),)
	$(call install,-e ".[test]")
endif
	touch $@
