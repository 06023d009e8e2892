# make demo: set up, then render, cold start, reinforcement learning, inference on the embedded default
# make test: set up, then run the tests
PYTHON ?= python3

demo: .venv/demo
	.venv/bin/python toy/demo.py

test: .venv/test
	.venv/bin/ruff check
	.venv/bin/python -m pytest

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt support/requirements.txt .venv/demo
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test
