# bar_ray: what to type. ARGS="..." goes on to the command; ACCELERATOR=cpu|gpu overrides what is found.
PYTHON ?= python3
IN_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"

.PHONY: help demo test bench docs lint setup lock
help:
	@echo 'make demo   train four experts, merge, route, evaluate and report, on two CPU cores'
	@echo 'make test   run the tests, e.g. make test ARGS="-m '"'not slow'"' tests/test_graph.py"'
	@echo 'make bench  measure against peers, e.g. make bench ARGS="--what sandbox"'
	@echo 'make docs   build the documentation into site/'
	@echo 'make lint   check style'
	@echo 'make lock   resolve pyproject.toml into requirements/*.txt again'
	@echo 'The first four set up what is missing (.venv, bubblewrap) by themselves.'

demo: setup
	@$(IN_VENV) .venv/bin/python jobs/train_all.py conf/tiny.yaml $(ARGS)

test: setup
	@$(IN_VENV) .venv/bin/python -m pytest $(ARGS)

bench: setup
	@$(IN_VENV) .venv/bin/python jobs/bench.py conf/tiny.yaml $(ARGS)

docs: setup
	@.venv/bin/python -m bar_ray.reference docs/reference.md
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet && echo 'docs: site/index.html'

lint: setup
	@.venv/bin/ruff check . && .venv/bin/ruff format --check .

setup:
	@PYTHON="$(PYTHON)" requirements/install.sh $(ACCELERATOR)

lock:
	@PYTHON="$(PYTHON)" requirements/lock.sh $(ARGS)
