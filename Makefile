# make demo: set up, then render, cold start, reinforcement learning, inference on the embedded default
# make test: set up, then run the tests
# make post-train: after make demo, improve a small generator by the reward alone
PYTHON ?= python3

demo: .venv/demo
	.venv/bin/python toy/demo.py

test: .venv/test
	.venv/bin/ruff check
	.venv/bin/python -m pytest

post-train: .venv/test
	.venv/bin/python toy/post_train.py --picture runs/post_train/curves.png

.venv/demo: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -q -r requirements.txt
	touch $@

.venv/test: requirements-dev.txt support/requirements.txt .venv/demo
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test post-train
