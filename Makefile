# make demo   a small real model reads a real document; prints where the picture is
# make test   lint and tests, as CI runs them
# make synth-demo   long-context questions with checkable answers, without a model; draws a report
# make train-demo   a small real model learns to find facts in real text; about 15 minutes
# Everything is installed into .venv. PYTHON names another Python 3.10 or later.

.PHONY: demo test test-real test-verl synth-demo train-demo bench-gpu bench-long-context gpu-check lint env-demo env-synth-demo env-train-demo env-test
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

# Inside verl's own trainer on the CPU, in an environment of its own (.venv-verl, 2 GB).
test-verl:
	@PYTHON="$(PYTHON)" scripts/verl_env.sh .venv-verl
	OMP_NUM_THREADS=1 .venv-verl/bin/python -m pytest -q --disable-warnings \
		tests/qwenlong/integrations/test_verl*.py

lint: env-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

synth-demo: env-synth-demo
	.venv/bin/qwenlong synth run recipes/synth-demo.yaml --out synth-demo
	.venv/bin/qwenlong synth report synth-demo

train-demo: env-train-demo
	.venv/bin/qwenlong train-demo --out train-demo

# On a machine with an NVIDIA GPU: writes bench/results/, from which plots and tables are made.
bench-gpu: env-test
	$(PY) -m bench all --device cuda

# Scoring of up to 192,000 tokens by models of the true shapes with random weights; about 80 GB of GPU
# memory, and 70 GB of the host's for the streamed case.
bench-long-context: env-test
	$(PY) -m bench.long_context --model 4b
	$(PY) -m bench.long_context --model 30b

# The same with the GPU tests and compute-sanitizer before it; logs in gpu-check/.
gpu-check: env-test
	PYTHON=$(PY) scripts/gpu_check.sh

env-demo:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh demo

env-test:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh test

env-synth-demo:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh synth-demo

env-train-demo:
	@PYTHON="$(PYTHON)" scripts/setup_env.sh train-demo
