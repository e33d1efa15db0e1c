# make test | lint | docs | demo | bench | soak | dist-check: each sets up .venv first; PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
WORKERS ?= auto

.PHONY: test lint docs demo bench bench-full device soak dist-check clean

# torch first and pinned, so that nothing pulls another build; curvlinops without torchvision, which nothing here uses
$(READY): pyproject.toml setup.py constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt setuptools torch
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e ".[bench,docs,lint,test-core]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch
	touch $@

test: lint docs
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# the site, with the reference, into build/site; a broken link or reference is an error, and nothing is fetched
docs: $(READY)
	$(RUN) -m sphinx -q -W --keep-going -b html docs build/site

demo: $(READY)
	OMP_NUM_THREADS=1 $(RUN) -m curvopt.demo

# small sizes into benchmarks/results/quick; then the tables of the texts and the plots, from the CSVs of benchmarks/results
bench: $(READY)
	$(RUN) benchmarks/step_time.py --quick
	$(RUN) benchmarks/memory.py --quick
	OMP_NUM_THREADS=1 $(RUN) benchmarks/quality.py --quick
	OMP_NUM_THREADS=1 $(RUN) benchmarks/ablations.py --quick
	$(RUN) benchmarks/report.py
	$(RUN) benchmarks/plots.py

# hours: every CSV of benchmarks/results anew (the training runs resume where their CSVs end)
bench-full: $(READY)
	$(RUN) benchmarks/step_time.py
	$(RUN) benchmarks/memory.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/quality.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/ablations.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/cadence.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/gora_starts.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/ladders.py
	OMP_NUM_THREADS=1 $(RUN) benchmarks/spectra.py
	$(RUN) benchmarks/report.py
	$(RUN) benchmarks/plots.py

# on a machine with a GPU, torch and triton: kernels right and fast? less than five minutes, no network
device:
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation -e .
	$(PYTHON) benchmarks/device.py

# 2,000 steps with accidents against the same steps without; about ten minutes on one core
soak: $(READY)
	OMP_NUM_THREADS=1 $(RUN) tests/soak.py

# wheel and sdist, each installed into a fresh environment and used there; requirements choose other versions:
# make dist-check WITH="torch==2.6.0 numpy peft==0.18.1 transformers==4.50.0"
dist-check: $(READY)
	$(RUN) tests/dist_check.py $(WITH)

clean:
	rm -rf $(VENV) build *.egg-info runs
