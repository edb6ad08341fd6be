# Every target sets itself up: a virtual environment in .venv, bi_ops installed in it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test verify demo lint docs clean

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# Two processes for two cores: more threads in each would wait for one another.
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Every operator against the contract, at the quick level; without a GPU in the interpreter.
verify: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/bi-ops verify

# A tiny Qwen3 learns to repeat a symbol, every rollout log-probability compared with training's, bit for bit.
demo: $(VENV)/.ready
	rm -rf runs/demo
	$(BIN)/bi-ops train --preset demo --output runs/demo

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) runs site
