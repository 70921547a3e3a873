# make demo   from nothing to a converted model beside its original, in one command
# make test   what CI runs: lint, types, tests, the built wheel
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test test-long lint format docs release-check fidelity clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/orthoact convert demo --overwrite
	$(BIN)/orthoact evaluate demo-hermite

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

test: lint
	if [ "$$REAL_MODELS" = 1 ]; then $(BIN)/python tests/real_models.py; fi
	$(BIN)/python -m pytest -n auto --dist worksteal

# the tests that take minutes are left out of `make test`
test-long: $(VENV)/.dev
	$(BIN)/python -m pytest -m long

docs: $(VENV)/.dev
	$(BIN)/python -m mkdocs build --strict

# the wheel as a user gets it: built, installed with nothing of this folder on the path, and the demo run from it
release-check: $(VENV)/.dev
	rm -rf build/release dist
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build/release && bin/orthoact convert demo && bin/orthoact evaluate demo-hermite --max-kl 1e-3
	cd build/release && bin/orthoact report demo-hermite -o report.html && bin/orthoact env

fidelity: $(VENV)/.dev
	$(BIN)/python tests/real_models.py
	$(BIN)/python benchmarks/fidelity.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info demo-hermite
