# make demo   inpaint the example photograph, with nothing installed but Python and make
# make serve  start the mask editor for a browser, with as little; the first line is its address
# make test   install what the tests need and run them
# The other targets serve development: see CONTRIBUTING.md.

PYTHON ?= python3
VENV ?= .venv
DEMO ?= .demo/venv
DEMO_IMAGE := examples/wall.jpg
DEMO_MASK := examples/wall_mask.png
DEMO_OUTPUT := outputs/wall.png
# One wheel of torch, exactly: a range may bring another build with gigabytes of GPU libraries.
TORCH := $(shell grep '^torch==' constraints.txt)
PIP_QUIET := -q --disable-pip-version-check --no-input

.PHONY: demo serve test test-slow lint types docs schemas wheel gpu clean
.DELETE_ON_ERROR:

demo: $(DEMO)/.installed
	@mkdir -p $(dir $(DEMO_OUTPUT))
	@$(DEMO)/bin/moebius-edge run $(DEMO_IMAGE) $(DEMO_MASK) --output $(DEMO_OUTPUT)

serve: $(DEMO)/.serve
	@$(DEMO)/bin/moebius-edge serve

# The tests of a file share what they make, so a process takes a whole file at a time.
PARALLEL ?= -n 2 --dist loadfile
test: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q -m "not slow and not gpu" $(PARALLEL)

SLOW ?= slow and not gpu
test-slow: $(VENV)/.installed
	$(VENV)/bin/python -m pytest -q --timeout 900 -m "$(SLOW)" $(PARALLEL) --no-loadscope-reorder

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check .

types: $(VENV)/.installed
	$(VENV)/bin/mypy -p moebius_edge

# The documentation as a site in build/site, from docs/ and the docstrings.
docs: $(VENV)/.installed
	$(VENV)/bin/mkdocs build --quiet

# docs/schemas, from the types that bundle.json and engine.json are checked with.
schemas: $(VENV)/.installed
	$(VENV)/bin/python docs/schemas/generate.py

wheel: $(VENV)/.installed
	@rm -rf build/lib build/bdist.*
	$(VENV)/bin/python -m pip wheel $(PIP_QUIET) --no-deps --no-build-isolation --wheel-dir dist .

# Ten minutes on an NVIDIA GPU, with any Python that has PyTorch with CUDA, Triton and numpy; see docs/benchmarks.md.
gpu:
	$(PYTHON) -m benchmarks.gpu.run

clean:
	rm -rf build dist $(DEMO_OUTPUT) .demo *.egg-info .mypy_cache .ruff_cache .pytest_cache

# $(1): a virtual environment made by $(PYTHON), or one line that says why not.
define make_venv
@test -x $(1)/bin/pip || { \
  $(PYTHON) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
    echo "moebius-edge needs Python 3.10 or newer with the venv module, but '$(PYTHON)' is" \
      "$$($(PYTHON) --version 2>/dev/null || echo not found). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
    exit 1; }; \
  $(PYTHON) -m venv $(1); }
endef

# Editable, so that a change of the sources needs no second installation; only these files do.
$(DEMO)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(DEMO))
	@echo "installing moebius-edge and ONNX Runtime into $(DEMO) (once)"
	@$(DEMO)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt -e ".[cpu]"
	@touch $@

$(DEMO)/.serve: $(DEMO)/.installed
	@echo "installing what moebius-edge serve needs into $(DEMO) (once)"
	@$(DEMO)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt -e ".[cpu,serve]"
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@echo "installing moebius-edge, PyTorch and the development tools into $(VENV) (once)"
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) "$(TORCH)"
	@$(VENV)/bin/python -m pip install $(PIP_QUIET) -c constraints.txt -e ".[dev]"
	@touch $@
