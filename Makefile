# make demo: set up, then render, cold start, reinforcement learning, inference on the embedded default
# make test: set up, then run the tests
# make lint: set up, then look for what ruff finds
# make test-all: the slow ones too
# make test-oldest: the tests with the oldest packages that requirements.txt allows, in .venv-oldest
# make post-train: after make demo, improve a small generator by the reward alone
PYTHON ?= python3

demo: .venv/demo
	.venv/bin/python toy/demo.py

test: lint
	.venv/bin/python -m pytest

lint: .venv/test
	.venv/bin/ruff check

test-all: lint
	.venv/bin/python -m pytest -m ""

test-oldest: .venv-oldest/test
	.venv-oldest/bin/python -m pytest

post-train: .venv/test
	.venv/bin/python experiments/post_train.py --picture runs/post_train/curves.png

.venv/demo: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q --no-compile -c constraints.txt -r requirements.txt
	@# What is used is compiled here, a third of what pip would compile.
	PYTHONDONTWRITEBYTECODE= .venv/bin/python -c "import coldstart, rl, infer"
	touch $@

.venv/test: requirements-dev.txt tools/requirements.txt .venv/demo
	.venv/bin/pip install -q -c constraints.txt -r requirements-dev.txt
	touch $@

.venv-oldest/test: requirements.txt requirements-dev.txt tools/requirements.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/>=/==/' requirements.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/pip install -q -c .venv-oldest/constraints.txt -r requirements-dev.txt
	touch $@

.PHONY: demo test lint test-all test-oldest post-train
