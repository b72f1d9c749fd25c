# make demo    the whole pipeline on the embedded digits, from nothing
# make test    the tests, in the same environment
# make lint    formatting, lint, types, layers
# make bench   every benchmark in its quick form
# make server  PostgreSQL, a Prefect and an MLflow server as plain processes; make server-down ends them
# make worker  the worker of one GPU: make worker GPU=1
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

GPU ?= 0

.PHONY: demo test lint bench server server-down worker install clean

demo: install
	vitprune run

test: install
	pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: install
	ruff format --check .
	ruff check .
	mypy
	lint-imports

bench: install
	for script in $(filter-out %/__init__.py, $(wildcard benchmarks/[a-k]*/*.py benchmarks/[m-z]*/*.py)); do python -m $$(echo $${script%.py} | tr / .) --quick || exit 1; done

server: install
	deploy/servers up

server-down: install
	deploy/servers down

worker: install
	deploy/worker $(GPU)

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,server,export,dev]'
	touch $@

clean:
	rm -rf out metrics plots data/*.parquet dvc.lock .dvc/cache .dvc/tmp mlflow.db mlartifacts .vitprune
