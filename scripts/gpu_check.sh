#!/usr/bin/env bash
# Usage: scripts/gpu_check.sh [OUT]
# On a machine with an NVIDIA GPU, a CUDA toolkit, torch and Triton: builds the extension, runs the GPU
# tests, runs the CUDA C++ kernels under compute-sanitizer, and measures. Logs go to OUT (gpu-check),
# rows to bench/results/. Every part runs whatever the others did; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check}
python=${PYTHON:-python3}
mkdir -p "$out"
worst=0

part() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else
        echo "   FAILED, see $out/$name.log"
        worst=1
    fi
    tail -n 3 "$out/$name.log"
}

export QL_BUILD_CUDA=1 PYTHONUNBUFFERED=1
nvidia-smi >"$out/nvidia-smi.log" 2>&1
part build "$python" setup.py build_ext --inplace
part tests "$python" -m pytest -m gpu tests/qlkernels -q --durations=15
# one process, the allocator of torch off, so that the sanitizer sees every allocation
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    part "$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -m gpu tests/qlkernels/test_ext.py -q -x -k "not 2_31"
    part "$tool-ring" compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -m gpu tests/qlkernels/test_logprob_entropy_with_grad.py -q -x \
        -k "not 1000003 and not 262147 and not 151936 and not inside_a_graph"
    part "$tool-routing" compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$python" -m pytest -m gpu tests/qlkernels/test_moe_routing_gpu.py -q -x \
        -k "cuda and not 2_31 and not 131072 and not 270000 and not chunks and not opcheck and not limits"
done
unset PYTORCH_NO_CUDA_MEMORY_CACHING
part bench "$python" -m bench all --device cuda
part plot "$python" -m bench plot
cp -r bench/results/*.csv "$out/" 2>/dev/null
exit $worst
