# make demo    the whole pipeline on the embedded digits, from nothing
# make test    all tests, in the same environment
# make test-fast  the inner loop: without pipelines, servers, browser, real data and the tests of tests/slow_tests.txt
# make fuzz    the property tests of tests/fuzz with many random examples
# make lint    formatting, lint, types, layers
# make docs    the documentation, as a site in site/; warnings and broken links are errors
# make bench   every benchmark once, in its quick form
# make server  PostgreSQL, a Prefect and an MLflow server as plain processes; make server-down ends them
# make worker  the worker of one GPU: make worker GPU=1
# make lock    constraints.txt and requirements-hashes.txt from pyproject.toml; UPGRADE=--upgrade takes newer versions
# make sbom    dist/: CycloneDX SBOM, list of licenses and their texts, of everything installed in .venv
PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
export PATH := $(BIN):$(PATH)

GPU ?= 0
BENCHMARKS := $(subst /,.,$(basename $(filter-out benchmarks/lib/% %/__init__.py, $(wildcard benchmarks/*/*.py))))

# tools that look at the environment from outside, in one of their own
TOOLS := .venv-tools
COMPILE := $(TOOLS)/bin/uv pip compile pyproject.toml --quiet --python-version 3.11.5 --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links

.PHONY: demo test test-fast fuzz lint docs bench server server-down worker lock sbom install clean

demo: install
	vitprune run

# tests start many processes: without bytecode, each compiles all modules of vitprune again
test test-fast fuzz: export PYTHONDONTWRITEBYTECODE :=

test: install
	pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

test-fast: install
	pytest --numprocesses auto --dist loadscope --no-loadscope-reorder -m 'not (pipeline or team or browser or real or slow)'

fuzz: install
	VITPRUNE_FUZZ=long pytest --numprocesses auto tests/fuzz

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

lock: $(TOOLS)/.installed
	$(COMPILE) --all-extras $(UPGRADE) --output-file constraints.txt
	$(COMPILE) --extra pipeline --extra server --extra export --constraint constraints.txt --generate-hashes \
		--output-file requirements-hashes.txt

sbom: install $(TOOLS)/.installed
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml --output-file dist/sbom.json $(VENV)
	$(TOOLS)/bin/pip-licenses --python $(VENV)/bin/python --format markdown --with-urls --output-file dist/licenses.md
	$(TOOLS)/bin/pip-licenses --python $(VENV)/bin/python --format plain-vertical --with-license-file --with-notice-file \
		--no-license-path --output-file dist/NOTICE

$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet 'uv>=0.9,<1' 'cyclonedx-bom>=7.2,<8' 'pip-licenses>=5.5,<6'
	touch $@

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[pipeline,server,export,engine,models,dev,docs]'
	touch $@

clean:
	rm -rf out metrics plots data/*.parquet dvc.lock .dvc/cache .dvc/tmp mlflow.db mlartifacts .vitprune
