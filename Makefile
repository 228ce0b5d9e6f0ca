# make serve | make test | make clients | make check | make install
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

.PHONY: install serve test clients check format clean

install: $(VENV)/.installed

serve: $(VENV)/.installed
	@$(BIN)/ryzanstein serve --port $(PORT) $(if $(MODEL),--model $(MODEL)) $(ARGS)

test: $(VENV)/.installed-test
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

# Other people's clients against a real server; they leak, so they have a process of their own.
clients: $(VENV)/.installed-clients
	$(BIN)/python -m pytest -q -W ignore -o python_files='client_*.py' \
	  -o asyncio_default_test_loop_scope=session -o asyncio_default_fixture_loop_scope=session \
	  tests/server/clients

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

$(VENV)/.installed-clients: $(VENV)/.installed-test tests/server/clients/package.json
	$(PIP) install --editable '.[test,clients]'
	if command -v npm >/dev/null; then npm install --prefix tests/server/clients --no-audit --no-fund; fi
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
