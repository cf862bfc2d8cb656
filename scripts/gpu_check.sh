#!/usr/bin/env bash
# Usage: scripts/gpu_check.sh [OUT [PART...]]
# On a machine with an NVIDIA GPU, a CUDA toolkit, torch and Triton. Parts, all of them by default:
#   build      the extension with its CUDA C++
#   tests      the GPU tests, several at a time where pytest-xdist is installed, the large ones alone
#   sanitize   the CUDA C++ kernels under compute-sanitizer
#   bench      every op beside its peers; OPS names some, SECONDS_A_SHAPE bounds a shape (20)
#   models     scoring of a whole model, the update of a group, TRL's update
#   plot       pictures and tables from the rows
# Logs go to OUT (gpu-check), rows to bench/results/. Every part runs whatever the others did; the exit
# status is that of the worst.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-gpu-check}
shift || true
parts=${*:-build tests sanitize bench models plot}
python=${PYTHON:-python3}
mkdir -p "$out"
worst=0

run() {
    local name=$1
    shift
    echo "== $name: $*"
    if "$@" >"$out/$name.log" 2>&1; then echo "   ok"; else
        echo "   FAILED, see $out/$name.log"
        worst=1
    fi
    tail -n 3 "$out/$name.log"
}

build() { run build "$python" setup.py build_ext --inplace; }

tests() {
    local workers=()
    "$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
    run tests "$python" -m pytest -m "gpu and not large" tests -v --durations=15 "${workers[@]}"
    run tests-large "$python" -m pytest -m "gpu and large" tests -v
}

sanitize() {
    # racecheck does not follow a barrier at which one lane arrives for its warp: a build of its own
    NVCC_APPEND_FLAGS=-DQL_EVERY_LANE_ARRIVES run sanitizer-build "$python" setup.py build_ext --inplace
    # one process, the allocator of torch off, so that the sanitizer sees every allocation
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    local tool
    for tool in memcheck racecheck; do
        run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$python" -m pytest -m gpu tests/qlkernels/test_ext.py -q -x -k "not 2_31"
        run "$tool-ring" compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$python" -m pytest -m gpu tests/qlkernels/test_logprob_entropy_with_grad.py -q -x \
            -k "not 1000003 and not 262147 and not 151936 and not inside_a_graph"
        run "$tool-routing" compute-sanitizer --tool "$tool" --error-exitcode 99 \
            "$python" -m pytest -m gpu tests/qlkernels/test_moe_routing_gpu.py -q -x \
            -k "cuda and not 2_31 and not 131072 and not 270000 and not chunks and not opcheck and not limits and not graph"
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
    build
}

bench() {
    # shellcheck disable=SC2086 # names of ops are words
    run bench "$python" -m bench ${OPS:-all} --device cuda --seconds "${SECONDS_A_SHAPE:-20}"
}

models() {
    run long-context "$python" -m bench.long_context --model 30b
    run group-step "$python" -m bench.group_step
    run trl-step "$python" -m bench.trl_step
}

plot() {
    run plot "$python" -m bench plot
    run tables "$python" -m bench tables
    cp bench/results/*.csv "$out/" 2>/dev/null
}

export QL_BUILD_CUDA=1 PYTHONUNBUFFERED=1
nvidia-smi >"$out/nvidia-smi.log" 2>&1
for part in $parts; do
    case $part in
        build | tests | sanitize | bench | models | plot) "$part" ;;
        *) echo "unknown part $part" >&2; worst=2 ;;
    esac
done
exit $worst
