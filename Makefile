# make demo: train and evaluate QIPO on a dataset recorded here.   make test: the tests.   make lint: ruff, pyright.
# make wheel: sdist and wheel in dist/, and a training from them.   make docs: the site.
PYTHON ?= python3
BIN := .venv/bin
NEEDS := requirements.lock requirements.txt setup.py

.PHONY: demo test lint wheel docs

demo: .venv/.installed
	$(BIN)/python -m launch.train

# What the tests compile is kept for their next run, without what none has read for a week.
test: .venv/.installed-test
	mkdir -p .venv/programs
	find .venv/programs -type f -atime +7 -delete
	JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.venv/programs $(BIN)/python -m pytest -n 2 --dist worksteal

# pyright[nodejs] brings checker and node in its wheels, so a fresh machine downloads nothing more.
lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

# The sdist makes the wheel. Its environment sees .venv's packages, which would take minutes to
# install again, but not the checkout, which is no folder of them.
wheel: .venv/.installed-test
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m venv --without-pip --clear .venv/wheel
	$(BIN)/python -m pip --python .venv/wheel/bin/python install --quiet --no-deps dist/*.whl
	packages=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		folder=$$(mktemp -d) && cd $$folder && export PYTHONPATH=$$packages MINARI_DATASETS_PATH=$$folder && \
		$(CURDIR)/.venv/wheel/bin/efm-train --config=quick --config.behavior_steps=1 --config.critic_steps=1 \
			--config.policy_steps=1 --config.eval_every=0 && \
		rm -r $$folder

docs: .venv/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo site/index.html

.venv/.installed-docs: $(NEEDS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[docs]'
	touch $@ .venv/.installed

.venv/.installed: $(NEEDS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c requirements.lock -e .
	touch $@

.venv/.installed-test: $(NEEDS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[test]'
	touch $@ .venv/.installed

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later is needed; name one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
