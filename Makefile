# make demo   a small real model reads a real document; prints where the picture is
# make test   lint and tests, as CI runs them
# Everything is installed into .venv. PYTHON names another Python 3.10 or later.

.PHONY: demo test test-real bench-gpu lint env-demo env-test
PY := .venv/bin/python

demo: env-demo
	.venv/bin/qwenlong demo

# Triton decides at import whether kernels are interpreted, so the ahead-of-time tests have a process
# of their own. The large run is last: its closing line is the result.
test: env-test lint
	env -u TRITON_INTERPRET OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 -m aot
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal \
		-m 'not gpu and not real and not aot'

# Needs minutes and memory: a real model, servers, long documents.
test-real: env-test
	$(PY) -m pytest -q -m real

lint: env-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# On a machine with an NVIDIA GPU: writes bench/results/, from which plots and tables are made.
bench-gpu: env-test
	$(PY) -m bench all --device cuda

env-demo:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh demo

env-test:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh test
