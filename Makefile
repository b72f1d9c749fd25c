# make demo    the whole pipeline on the embedded digits, from nothing
# make test    all tests, in the same environment
# make test-fast  the inner loop: without pipelines, servers, browser, real data and the tests of tests/slow_tests.txt
# make lint    formatting, lint, types, layers
# make docs    the documentation, as a site in site/; warnings and broken links are errors
# make bench   every benchmark once, in its quick form
# make server  PostgreSQL, a Prefect and an MLflow server as plain processes; make server-down ends them
# make worker  the worker of one GPU: make worker GPU=1
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

GPU ?= 0
BENCHMARKS := $(subst /,.,$(basename $(filter-out benchmarks/lib/% %/__init__.py, $(wildcard benchmarks/*/*.py))))

.PHONY: demo test test-fast lint docs bench server server-down worker install clean

demo: install
	vitprune run

test: install
	pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

test-fast: install
	pytest --numprocesses auto --dist loadscope --no-loadscope-reorder -m 'not (pipeline or team or browser or real or slow)'

lint: install
	ruff format --check .
	ruff check .
	mypy
	lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet

bench: install
	for module in $(BENCHMARKS); do python -m $$module --quick || exit 1; done

server: install
	deploy/servers up

server-down: install
	deploy/servers down

worker: install
	deploy/worker $(GPU)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,server,export,dev,docs]'
	touch $@

clean:
	rm -rf out metrics plots data/*.parquet dvc.lock .dvc/cache .dvc/tmp mlflow.db mlartifacts .vitprune
