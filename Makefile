# `make check` is what `python3 scripts/bootstrap.py test` runs, in an environment of your choice.
PYTHON ?= .venv/bin/python
LOCK_ENV := .cache/lock-env
# What the lock holds of torch; the CPU and the CUDA builds share this number.
TORCH := 2.13.0

.PHONY: check lint types test format lock clean

check: lint types test

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

test:
	$(PYTHON) -m pytest

format:
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

# A fresh resolution of everything that the README's commands need, then its pins.
lock:
	python3 -m venv --clear $(LOCK_ENV)
	$(LOCK_ENV)/bin/python -m pip install --upgrade pip
	$(LOCK_ENV)/bin/python -m pip install ".[torch,dev]" torch==$(TORCH)
	$(LOCK_ENV)/bin/python -m pip check
	sed '/^[^#]/,$$d' requirements.lock > $(LOCK_ENV)/lock
	$(LOCK_ENV)/bin/python -m pip freeze --all --exclude pip --exclude shardwright \
		| sed 's/^\(torch==[^+]*\)+.*/\1/' >> $(LOCK_ENV)/lock
	cp $(LOCK_ENV)/lock requirements.lock
	rm -rf $(LOCK_ENV)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find conf scripts strategies tests trainer -name __pycache__ -prune -exec rm -rf {} +
