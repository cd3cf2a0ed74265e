# Each target sets up what it needs in its own virtual environment, starting from Python and make alone.
PYTHON ?= python3
PIP := -m pip --quiet --disable-pip-version-check
ARGS ?=

.PHONY: demo test lint bench docs clean

# The main job on real data that a dependency ships: DAGNN beside GCN and an MLP on handwritten digits.
demo: .venv/demo
	.venv/bin/python experiments/dagnn.py --dataset digits $(ARGS)

test: lint
	.venv/bin/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: .venv/test
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

# Every benchmark beside its peer; needs PyTorch, which the library itself never does.
bench: .venv-bench/bench
	.venv-bench/bin/python -m benchmarks $(ARGS)

docs: .venv-docs/docs
	.venv-docs/bin/mkdocs build --strict

.venv/demo: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install --editable .
	touch $@

.venv/test: pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) install --editable '.[test]'
	touch $@ .venv/demo

.venv-bench/bench: pyproject.toml
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python $(PIP) install --editable '.[bench]'
	touch $@

.venv-docs/docs: pyproject.toml
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python $(PIP) install --editable '.[docs]'
	touch $@

clean:
	rm -rf .venv .venv-bench .venv-docs site
