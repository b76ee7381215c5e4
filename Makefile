# Two commands on a fresh machine with python3, make and a C compiler:  make demo   make test
# Both first do the set-up, which does nothing where it is done.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
VLLM   := .venv-vllm
DOCS   := .venv-docs

.PHONY: help setup demo demo-tools lab study test test-slow test-gpu test-browser setup-vllm test-vllm test-adapters test-envs test-trl test-verl test-verl-cluster test-openrlhf-cluster test-skyrl test-others parity bench bench-quick bench-check gpu-day lint plant mutants format docs dist clean

help:
	@echo "make demo       set up, then: SmolLM2-135M learns to add with DRPO on this machine's CPU"
	@echo "make demo-tools set up, then: SmolLM2-135M learns to call a calculator"
	@echo "make test       set up, then: all tests that need no special hardware"
	@echo "make test-slow  the slow ones, and the property tests on cases that are new each time"
	@echo "make test-gpu   those that need a CUDA GPU"
	@echo "make test-browser  those that open pages in a headless Chromium (apt-get install chromium)"
	@echo "make test-vllm  those that need vLLM, in an environment of their own ($(VLLM))"
	@echo "make test-adapters  those of drpo inside TRL, verl, SkyRL and others, in environments of their own (.adapters)"
	@echo "make test-envs  those of environments of GEM, TextArena, skyrl-gym, TRL, OpenEnv and verifiers, in environments of their own"
	@echo "make parity     put what test-adapters measured into docs/frameworks.md"
	@echo "make lab        the exact problems, and the stability benchmark on a tiny transformer, with its maps (minutes)"
	@echo "make study      train a decisive part of docs/regions.md again and compare its verdicts (minutes)"
	@echo "make bench      measure this project beside TRL, vLLM, Liger and plain PyTorch on this machine (hours)"
	@echo "make bench-quick  the same with tiny sizes: does every competitor run here?"
	@echo "make bench-check  measure the short ones again: is a ratio more than 10 % above the committed one? (minutes)"
	@echo "make gpu-day    check and measure what a GPU must show, in ten minutes of one"
	@echo "make plant      plant known bugs one by one and see that a test fails for each"
	@echo "make mutants    change objectives, operators, batches, credit and statistics in every small way; tests/mutants.md judges what lives (hours)"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff put the code in order"
	@echo "make docs       build the documentation's site into site/, in an environment of its own ($(DOCS))"
	@echo "make dist       build the wheel and the source distribution into dist/"
	@echo "make clean      remove the virtual environment and caches (runs/ stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "== making $(VENV) and installing drpo into it (once; minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: setup
	@echo "== drpo train demo"
	$(BIN)/drpo train demo

demo-tools: setup
	@echo "== drpo train calculator"
	$(BIN)/drpo train calculator

test: setup
	@echo "== tests"
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal -m "not slow and not vllm and not gpu and not interpreted and not adapters and not envs and not browser"

test-slow: setup
	$(BIN)/python -m pytest -m slow tests
	$(BIN)/python -m pytest -m "hypothesis and not slow" --hypothesis-profile random tests

test-gpu: setup
	$(BIN)/python -m pytest -m gpu tests

test-browser: setup
	$(BIN)/python -m pytest -m browser -rs -s tests

setup-vllm: $(VLLM)/.ready

# Torch first, so that no other build of it comes along. What is removed comes as CUDA builds, which a CPU build of torch
# cannot load; vLLM needs none of it for text. It needs a numpy and a triton of its own.
$(VLLM)/.ready: pyproject.toml constraints.txt benchmarks/peers/vllm.txt
	@echo "== making $(VLLM) and installing vLLM and drpo into it (once; minutes)"
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(VLLM)/bin/python -m pip install --quiet -r benchmarks/peers/vllm.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	grep -v -E '^(numpy|triton)==' constraints.txt > $(VLLM)/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet --constraint $(VLLM)/constraints.txt --editable '.[dev]'
	@touch $@

test-vllm: setup-vllm
	$(VLLM)/bin/python -m pytest -m vllm tests

# Each framework, or library of environments, in an environment of its own: what it requires; the framework itself without it, where not all of that
# can be had on a CPU (NAME.bare.txt); then drpo.
.adapters/%/.ready: tests/adapters/environments/%.txt constraints.txt
	@echo "== making $(@D) and installing into it (once; minutes)"
	test -x $(@D)/bin/python || $(or $(PYTHON_$*),$(PYTHON)) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(@D)/bin/python -m pip install --quiet -r $<
	test ! -f $(<:.txt=.bare.txt) || $(@D)/bin/python -m pip install --quiet --no-deps -r $(<:.txt=.bare.txt)
	$(@D)/bin/python -m pip install --quiet pytest hypothesis
	$(@D)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# An older version, to stand before the newer one on the path.
.adapters/trl-%/.ready: .adapters/trl/.ready
	.adapters/trl/bin/python -m pip install --quiet --no-deps --target $(@D) trl==$*
	@touch $@

.adapters/openrlhf-%/.ready: .adapters/others/.ready
	.adapters/others/bin/python -m pip install --quiet --no-deps --target $(@D) openrlhf==$*
	@touch $@

.adapters/skyrl-%/.ready: .adapters/skyrl/.ready
	.adapters/skyrl/bin/python -m pip install --quiet --no-deps --target $(@D) skyrl==$*
	@touch $@

.adapters/tinker-%/.ready: .adapters/skyrl/.ready
	.adapters/skyrl/bin/python -m pip install --quiet --no-deps --target $(@D) tinker==$*
	@touch $@

TRL_OLDER := 1.10.0 1.14.2
OPENRLHF_OLDER := 0.11.0 0.11.1
SKYRL_OLDER := 0.3.0
TINKER_OLDER := 0.32.0
# SkyRL needs Python 3.12; `make test-skyrl PYTHON_skyrl=/path/to/python3.12` where none is found.
PYTHON_skyrl ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) python3.12)
IN_FRAMEWORK = -m pytest -rs -m adapters

test-adapters: test-trl test-verl test-skyrl test-others

test-trl: .adapters/trl/.ready $(TRL_OLDER:%=.adapters/trl-%/.ready)
	.adapters/trl/bin/python $(IN_FRAMEWORK) tests/adapters/test_trl*.py tests/adapters/test_unsloth.py
	for version in $(TRL_OLDER); do \
	    PYTHONPATH=$(CURDIR)/.adapters/trl-$$version .adapters/trl/bin/python $(IN_FRAMEWORK) tests/adapters/test_trl.py || exit 1; \
	done

test-verl: .adapters/verl/.ready
	.adapters/verl/bin/python $(IN_FRAMEWORK) tests/adapters/test_verl*.py

# Not a part of test-adapters: a whole trainer takes minutes. What is removed cannot be loaded beside a CPU build of torch.
test-verl-cluster: .adapters/verl_vllm/.ready
	.adapters/verl_vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.adapters/verl_vllm/bin/python $(IN_FRAMEWORK) tests/adapters/test_verl_cluster.py

test-openrlhf-cluster: .adapters/openrlhf_vllm/.ready
	.adapters/openrlhf_vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.adapters/openrlhf_vllm/bin/python $(IN_FRAMEWORK) tests/adapters/test_openrlhf_cluster.py

test-skyrl: .adapters/skyrl/.ready $(SKYRL_OLDER:%=.adapters/skyrl-%/.ready) $(TINKER_OLDER:%=.adapters/tinker-%/.ready)
	.adapters/skyrl/bin/python $(IN_FRAMEWORK) tests/adapters/test_skyrl*.py tests/adapters/test_tinker*.py
	for version in $(SKYRL_OLDER); do \
	    PYTHONPATH=$(CURDIR)/.adapters/skyrl-$$version .adapters/skyrl/bin/python $(IN_FRAMEWORK) tests/adapters/test_skyrl*.py || exit 1; \
	done
	for version in $(TINKER_OLDER); do \
	    PYTHONPATH=$(CURDIR)/.adapters/tinker-$$version .adapters/skyrl/bin/python $(IN_FRAMEWORK) tests/adapters/test_tinker*.py || exit 1; \
	done

test-others: .adapters/others/.ready $(OPENRLHF_OLDER:%=.adapters/openrlhf-%/.ready)
	.adapters/others/bin/python $(IN_FRAMEWORK) tests/adapters/test_openrlhf*.py
	.adapters/others/bin/python $(IN_FRAMEWORK) tests/adapters/test_torchtitan.py
	.adapters/others/bin/python $(IN_FRAMEWORK) tests/adapters/test_areal.py
	for version in $(OPENRLHF_OLDER); do \
	    PYTHONPATH=$(CURDIR)/.adapters/openrlhf-$$version .adapters/others/bin/python $(IN_FRAMEWORK) tests/adapters/test_openrlhf.py || exit 1; \
	done

test-envs: .adapters/gyms/.ready .adapters/openenv/.ready .adapters/verifiers/.ready .adapters/trl/.ready
	.adapters/gyms/bin/python -m pytest -rs -m envs tests/envs/test_gyms.py
	.adapters/openenv/bin/python -m pytest -rs -m envs tests/envs/test_openenv.py
	.adapters/verifiers/bin/python -m pytest -rs -m envs tests/envs/test_verifiers.py
	.adapters/trl/bin/python -m pytest -rs -m envs tests/envs/test_trl_environments.py

parity: setup
	$(BIN)/python -m tests.adapters.parity

lab: setup
	$(BIN)/python studies/theory.py --out runs/lab/exact
	$(BIN)/python studies/stability.py --out runs/lab

study: setup
	$(BIN)/python studies/regions_check.py
	$(BIN)/python studies/regions.py repeat --threads 2 --out runs/regions.jsonl

bench: setup
	$(BIN)/python -m benchmarks

bench-quick: setup
	$(BIN)/python -m benchmarks --quick

bench-check: setup
	$(BIN)/python -m benchmarks.check

gpu-day: setup
	$(BIN)/python -m benchmarks.gpu_day

plant: setup
	$(BIN)/python tests/plant_bugs.py

mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

lint: setup
	@echo "== ruff, mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(DOCS)/.ready: docs/requirements.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet -r docs/requirements.txt
	@touch $@

docs: $(DOCS)/.ready
	$(DOCS)/bin/mkdocs build --strict --quiet

dist: setup
	rm -rf dist
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) $(VLLM) $(DOCS) .adapters .pytest_cache .mypy_cache .ruff_cache .hypothesis mutants
