# make demo | test | test-slow | test-all | faults | lint | docs | bench | bench-linear | bench-step | bench-gpu | census
#      trainers-census | cuda-report | wheel | matrix | clean
#
# All of it happens in .venv, which the first target that needs it makes. A torch 2.10 or newer that PYTHON already has
# is used from where it is; otherwise, or where TORCH is given (make test TORCH=torch==2.15.0), it is installed.
# A second run redoes only what has changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py CMakeLists.txt \
           $(shell find accumloss build_tools csrc -name '*.py' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

.PHONY: demo test test-slow test-all faults lint docs bench bench-linear bench-step bench-gpu census trainers-census \
        cuda-report wheel matrix clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/.installed-demo
	cd $(VENV) && bin/python -m accumloss demo --out "$(CURDIR)/accumloss-demo" $(ARGS)

# The pytest program, unlike python -m pytest, leaves the working directory out of sys.path: the installed package is tested.
# A worker for each core; tests of one group (tests/conftest.py) share one. The groups run in the order of the files.
PYTEST = $(BIN)/pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

# Every behaviour, in minutes.
test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

# What the fast tier can do without: more of the same kinds, compilers, sanitizers, large shapes.
test-slow: $(VENV)/.installed-test $(VENV)/.tried-deepspeed
	$(PYTEST) -m slow $(ARGS)

# Every fault that is planted in the CUDA kernels, some 15 minutes; the tiers plant a third of them.
faults: $(VENV)/.installed-test
	ACCUMLOSS_TEST_ALL_FAULTS=1 $(PYTEST) tests/cuda/test_emulated_faults.py $(ARGS)

test-all: $(VENV)/.installed-test $(VENV)/.tried-deepspeed
	$(PYTEST) $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc -type f | xargs $(BIN)/clang-format --dry-run --Werror

# The site, into build/site; strict: no dead link, every public name on the API page.
docs: $(VENV)/.installed-docs
	$(BIN)/python build_tools/docs.py site

bench: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench_cross_entropy.py $(ARGS)
	$(BIN)/python benchmarks/bench_scaling.py
	$(BIN)/python benchmarks/plot.py

# Head and loss together, some 19 minutes, a third of them F.linear_cross_entropy's.
bench-linear: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench_linear.py $(ARGS)

# A whole training step of three models.
bench-step: $(VENV)/.installed-bench
	$(BIN)/python benchmarks/bench_training_step.py $(ARGS)
	$(BIN)/python benchmarks/plot.py

# On a machine with a GPU, whose python3 has torch with CUDA: build, tests, benchmark, compute-sanitizer; no network.
# Both parts are run, and a failure of either is one.
bench-gpu:
	benchmarks/gpu.sh first $(ARGS) && first=0 || first=$$?; benchmarks/gpu.sh rest $(ARGS) && exit $$first

# Some 20 minutes on 2 cores. An interrupted one goes on where it stopped.
census: $(VENV)/.installed-test
	cd $(VENV) && bin/python -m accumloss audit --all --out "$(CURDIR)/accumloss-census" $(ARGS)
	cp accumloss-census/census.md docs/
	cp accumloss-census/census.csv benchmarks/results/

# Some 5 minutes on 2 cores. An interrupted one goes on where it stopped.
trainers-census: $(VENV)/.installed-test
	cd $(VENV) && bin/python -m accumloss audit --trainers --out "$(CURDIR)/accumloss-census" $(ARGS)
	cp accumloss-census/trainers.md docs/
	cp accumloss-census/trainers.csv benchmarks/results/

# Registers, shared memory and spills of every CUDA kernel, and what a model says they can reach, into
# docs/internals/cuda-model.md. Needs nvcc, no GPU; nvdisasm for the model (the extra cuda-report).
cuda-report: $(VENV)/.installed-test
	PYTHONPATH=tests $(BIN)/python tests/cuda/kernel_resources.py

# A wheel for this Python in dist/, tagged by what auditwheel finds in it.
wheel: $(VENV)/.installed-wheel
	BIN=$(BIN) build_tools/wheel.sh . dist

# Every way to install that this machine has, and the compilers, as a table; some 15 minutes on 2 cores. ARGS="gcc uv": these.
matrix: $(VENV)/.torch
	PYTHON=$(BIN)/python build_tools/matrix.sh $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info accumloss-demo accumloss-census accumloss/_C.*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.torch:
	$(PYTHON) -m venv --clear $(VENV)
ifeq ($(origin TORCH), undefined)
	@found=$$($(PYTHON) build_tools/native.py torch) && if [ -n "$$found" ]; then \
	  echo "using $$found"; dirname "$$found" > $$(echo $(VENV)/lib/python3*/site-packages)/torch_found.pth; fi
	@$(BIN)/python -c "import torch; assert torch.__version__ >= torch.torch_version.TorchVersion('2.10')" 2> /dev/null || \
	  { rm -f $(VENV)/lib/python3*/site-packages/torch_found.pth && set -x && $(PIP) install torch==2.13.0; }
else
	$(PIP) install "$(TORCH)"
endif
	@touch $@

# Without isolation, so that the build is incremental.
$(VENV)/.installed-%: $(VENV)/.torch $(SOURCES)
	missing=$$($(BIN)/python build_tools/native.py missing) && $(PIP) install "setuptools>=77" "pybind11>=2.12" $$missing
	$(PIP) install --no-build-isolation ".[$*]"
	@touch $@

# DeepSpeed has no wheel, and its setup.py imports torch. Where it does not install, its tests are skipped and say so.
$(VENV)/.tried-deepspeed: $(VENV)/.installed-test
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation deepspeed || \
	  echo "DeepSpeed does not install here, the reason is above: its tests are skipped"
	touch $@
