#!/usr/bin/env bash
# Usage: scripts/verl_env.sh FOLDER
# Makes FOLDER a virtual environment with verl for the CPU, and this package beside it, for the tests
# of the plug-in.
#
#   scripts/verl_env.sh .venv-verl
#   .venv-verl/bin/python -m pytest tests/qwenlong/integrations/test_verl*.py
#
# About 2 GB. An environment of its own, because verl wants an older transformers. A run that finds
# nothing to do takes seconds; one that follows an interrupted run begins again.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: scripts/verl_env.sh FOLDER" >&2; exit 2; }
venv=$(realpath -m "$1")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
torch=2.13.0
verl=0.9.1
key="$torch $verl $(cksum <scripts/verl_env.sh)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet)

say() { echo "verl: $*"; }
fail() { echo "verl: $*" >&2; exit 1; }

# This package from its sources, with its entry point, and nothing compiled again. Each time, as the
# sources may have moved or changed what they ask for.
add_package() {
    "$venv/bin/python" - >/dev/null <<'PY'
import shutil
import sysconfig
import tempfile
from pathlib import Path

from setuptools import build_meta

site = Path(sysconfig.get_path("purelib"))
for old in site.glob("qlkernels-*.dist-info"):
    shutil.rmtree(old)
with tempfile.TemporaryDirectory() as folder:
    name = build_meta.prepare_metadata_for_build_wheel(folder)
    shutil.move(Path(folder, name), site / name)
(site / "qlkernels.pth").write_text(f"{Path.cwd()}\n")
PY
}

[ "$(uname -s)" = Linux ] || fail "needs Linux"
[ "$(cat "$venv/.verl-installed" 2>/dev/null)" = "$key" ] && { add_package; exit 0; }
if [ -e "$venv" ]; then
    # Only what this script made is removed.
    [ -e "$venv/.verl-env" ] || fail "$venv exists and was not made by this script; name another folder"
    say "$venv is half made or of other versions; making it again"
    rm -rf "$venv"
fi
"$python" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null ||
    fail "needs Python 3.10 to 3.12; name one with PYTHON=/path/to/python3"
say "making $venv with $("$python" --version)"
mkdir -p "$venv"
touch "$venv/.verl-env"
"$python" -m venv "$venv" ||
    fail "$python cannot make a virtual environment; on Debian, apt install python3-venv"
"${pip[@]}" --upgrade pip

say "installing torch $torch for the CPU"
"${pip[@]}" "torch==$torch+cpu" 2>/dev/null ||
    "${pip[@]}" "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu

say "installing verl $verl"
# Without dependencies: some serve logging and grading only. What its trainer imports comes next, in
# verl's ranges; torch is named again, so that nothing replaces it by the CUDA build.
"${pip[@]}" --no-deps "verl==$verl"
"$venv/bin/python" - >"$venv/requirements.txt" <<'PY'
import re
from importlib.metadata import requires

left_out = {"pybind11", "pylatexenc", "wandb"}
for requirement in requires("verl"):
    if "extra ==" not in requirement:
        if re.match(r"[\w.-]+", requirement).group().lower() not in left_out:
            print(requirement)
PY
say "installing what it needs; pip will name the packages left out as conflicts, which is expected"
"${pip[@]}" "torch==$torch+cpu" -r "$venv/requirements.txt" "TransferQueue>=0.1.10" cachetools \
    uvicorn fastapi 'setuptools>=77' 'pybind11>=3.0' 'pytest>=8'

add_package
"$venv/bin/python" -W ignore -c '
import torch, verl
from verl.trainer.ppo.v1 import get_trainer_cls
get_trainer_cls("qwenlong_sync")
print("verl: torch", torch.__version__, "verl", verl.__version__)'
echo "$key" >"$venv/.verl-installed"
say "ready: $venv/bin/python"
