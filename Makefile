# make demo and make test are all a fresh machine needs; the rest are their parts.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= .model/SmolLM2-135M-Instruct
BIN := $(VENV)/bin
READY := $(VENV)/ready
KERNELS := vllm_lsa/ops/_cpu.so

.PHONY: demo serve test check venv model clean

demo: venv model
	$(BIN)/python -m vllm_lsa.demo $(MODEL) --log build/server.log $(ARGS)

serve: venv model
	$(BIN)/python -m vllm_lsa.demo $(MODEL) --log build/server.log --serve $(ARGS)

test: venv model
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=15 $(ARGS)

check: venv
	$(BIN)/ruff check .
	$(BIN)/mypy

venv: $(READY) $(KERNELS)

model: $(MODEL)

$(READY): setup.py scripts/make_env.py
	$(PYTHON) scripts/make_env.py --venv $(VENV)
	touch $@

$(KERNELS): $(wildcard csrc/cpu/* csrc/cuda/*) vllm_lsa/ops/build.py | $(READY)
	$(BIN)/python -m vllm_lsa.ops.build

$(MODEL): | $(READY)
	$(BIN)/python scripts/prepare_model.py $@

clean:
	rm -rf $(VENV) .model build dist *.egg-info $(KERNELS) .pytest_cache .mypy_cache .ruff_cache
