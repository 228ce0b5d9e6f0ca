# make serve | make test | make check | make install
#   make serve PORT=8123 MODEL=path-or-name ARGS="--threads 4"
#   TORCH=cpu takes torch's CPU build (on Linux, pip's default build is for CUDA and several GB)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu
PORT ?= 8000
MODEL ?=
ARGS ?=
TORCH ?=

.PHONY: install serve test check format clean

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@$(BIN)/ryzanstein serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "Python 3.11 or 3.12 is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)
ifeq ($(TORCH),cpu)
	$(PIP) install --index-url $(CPU_INDEX) 'torch>=2.11,<2.14'
endif
	@touch $@

NATIVE := CMakeLists.txt $(wildcard kernels/cpu/native/*)

$(VENV)/.installed: pyproject.toml $(NATIVE) | $(VENV)/.created
	$(PIP) install --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(NATIVE) | $(VENV)/.created
	$(PIP) install --editable '.[test]'
	@touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info
