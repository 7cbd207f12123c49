# make demo | test | lint | clean. Another interpreter: make PYTHON=python3.10 test
PYTHON ?= python3
PY := .venv/bin/python

.PHONY: demo test lint clean

demo: .venv/installed
	$(PY) demo.py

test: .venv/installed-dev
	$(PY) -m pytest -q -n auto tests

lint: .venv/installed-dev
	$(PY) -m ruff check .

# The folder of the demo; the environment stays.
clean:
	rm -rf demo

# The environment, brought up to date when the requirements change.
$(PY):
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/installed: requirements.txt | $(PY)
	$(PY) -m pip install -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(PY) -m pip install -r requirements-dev.txt
	touch $@
