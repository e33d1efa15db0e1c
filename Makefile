# make test | demo | lint | bench: each sets up .venv first; PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: test demo lint bench clean

# torch first and pinned, so that nothing pulls another build; curvlinops without its torchvision, which nothing here uses
$(READY): setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt setuptools torch
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e ".[demo,bench,triton,test]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch
	touch $@

test: lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

demo: $(READY)
	$(RUN) -m curvopt.demo

bench: $(READY)
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/memory.py
	$(RUN) benchmarks/quality.py

clean:
	rm -rf $(VENV) build *.egg-info runs
