"""Builds ``qlkernels._C`` from csrc/: C++ where a compiler is found, CUDA where nvcc is.

QL_BUILD_CUDA=auto (default) builds the CUDA kernels where nvcc is found, 1 makes a missing nvcc an
error, 0 leaves them out. CXX, CXXFLAGS, LDFLAGS and CUDA_HOME are respected. Without a C++ compiler
the package installs as plain Python. Objects are kept in build/objects and rebuilt when a source or
their command line changes.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FILES = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*"))
SOURCES = [f for f in FILES if f.endswith((".cpp", ".cu"))]
HEADERS = [f for f in FILES if f.endswith((".h", ".cuh"))]
ONCE_PER_ISA = "csrc/cpu/logprob_entropy.cpp"
ISAS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512".split(),
}
# No vector crosses a file, so its calling convention does not matter; GCC's AVX-512 header warns
# about itself.
QUIET = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
CUDA_ARCHS = {"sm_80": "compute_80", "sm_90a": "compute_90a"}
OLDEST_NVCC = (12, 0)  # the first with sm_90a


def say(message: str) -> None:
    print(f"qlkernels: {message}", file=sys.stderr)


def find_compiler() -> str | None:
    """The C++ compiler, or None with the reason said."""
    if sys.platform == "win32":
        say("the C++ kernels need GCC or Clang; installing without qlkernels._C")
        return None
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        say("Python.h is missing (install python3-dev); installing without qlkernels._C")
        return None
    configured = (sysconfig.get_config_var("CXX") or "").split()[:1]
    for name in filter(None, [os.environ.get("CXX"), *configured, "c++", "g++", "clang++"]):
        if path := shutil.which(shlex.split(name)[0]):
            return path
    say("no C++ compiler (c++, g++, clang++ or $CXX) found; installing without qlkernels._C")
    return None


def find_nvcc() -> str | None:
    """nvcc, or None with the reason said; an error under QL_BUILD_CUDA=1."""
    wanted = os.environ.get("QL_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"qlkernels: QL_BUILD_CUDA must be auto, 0 or 1, got {wanted!r}")
    if wanted == "0":
        return None
    homes = filter(None, [os.environ.get("CUDA_HOME"), "/usr/local/cuda"])
    path = next(filter(None, map(shutil.which, [*(f"{h}/bin/nvcc" for h in homes), "nvcc"])), None)
    reason = "no nvcc on PATH, in $CUDA_HOME or in /usr/local/cuda"
    if path:
        text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        found = re.search(r"release (\d+)\.(\d+)", text)
        version = tuple(map(int, found.groups())) if found else (0, 0)
        if version >= OLDEST_NVCC:
            return path
        reason = f"{path} is release {version[0]}.{version[1]}, and {OLDEST_NVCC[0]}.0 is needed"
    if wanted == "1":
        raise SystemExit(f"qlkernels: QL_BUILD_CUDA=1, but {reason}")
    say(f"{reason}; building without CUDA kernels")
    return None


class BuildExtension(build_ext):
    """Compiles csrc/ file by file, some files several times, and links the objects."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cxx, nvcc = find_compiler(), find_nvcc()
        machine = platform.machine()
        objects = ROOT / "build" / "objects" / f"{sys.implementation.cache_tag}-{machine}"
        cpp = [cxx, "-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
        cpp += ["-pthread", *shlex.split(os.environ.get("CXXFLAGS", ""))]
        python = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}"]
        if nvcc:
            python.append("-DQL_CUDA_ARCHS=" + ",".join(f'"{arch}"' for arch in CUDA_ARCHS))
        jobs = []  # (source, object, command)
        for source in SOURCES:
            if source.endswith(".cu"):
                if nvcc:
                    jobs.append((source, "cuda", nvcc_command(nvcc, cxx)))
            elif source == ONCE_PER_ISA:
                for isa in ISAS if machine == "x86_64" else ["baseline"]:
                    vector = ["-ffp-contract=fast", *QUIET, f"-DQL_ISA={isa}", *ISAS[isa]]
                    jobs.append((source, isa, [*cpp, *vector]))
            else:
                needs_python = source == "csrc/bindings.cpp"
                jobs.append((source, "", [*cpp, *python] if needs_python else cpp))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(lambda job: compile_object(objects, *job), jobs))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        flags = shlex.split(os.environ.get("LDFLAGS", ""))
        if nvcc:  # nvcc knows where its static CUDA runtime is
            link = [nvcc, f"-ccbin={cxx}", "-shared", "-cudart=static", "-Xcompiler=-pthread"]
            link += ["-Xlinker=--exclude-libs,ALL,-s", *(f"-Xlinker={flag}" for flag in flags)]
        else:
            link = [cxx, "-shared", "-pthread", *flags]
            link += ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-Wl,-s"]
        run([*link, "-o", str(target), *map(str, built)])


def nvcc_command(nvcc: str, cxx: str) -> list[str]:
    archs = [f"-gencode=arch={virtual},code={real}" for real, virtual in CUDA_ARCHS.items()]
    return [
        *(nvcc, f"-ccbin={cxx}", "-O3", "-std=c++17", "-lineinfo", "--threads=0", "-Xptxas=-v"),
        *("-Xcompiler=-fPIC,-fvisibility=hidden", *archs),
    ]


def compile_object(folder: Path, source: str, variant: str, command: list[str]) -> Path:
    name = "-".join(filter(None, [*Path(source).with_suffix("").parts[1:], variant]))
    target, stamp = folder / f"{name}.o", folder / f"{name}.cmd"
    command = [*command, "-c", str(ROOT / source), "-o", str(target)]
    newest = max((ROOT / file).stat().st_mtime for file in [source, *HEADERS])
    is_current = target.exists() and target.stat().st_mtime > newest
    # nvcc takes options from the environment too
    made_by = shlex.join([*command, os.environ.get("NVCC_APPEND_FLAGS", "")])
    if is_current and stamp.exists() and stamp.read_text() == made_by:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    stamp.unlink(missing_ok=True)
    messages = run(command)
    if "C7508" in messages:  # ptxas ignored setmaxnreg: the kernel would run, but not as designed
        raise SystemExit(f"qlkernels: ptxas warning C7508 in {source}:\n{messages}")
    stamp.write_text(made_by)
    return target


def run(command: list[str]) -> str:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, end="", flush=True)
    if done.returncode:
        hint = " (QL_BUILD_CUDA=0 builds without CUDA)" if "nvcc" in command[0] else ""
        raise SystemExit(f"qlkernels: {command[0]} failed{hint}:\n{done.stdout}")
    return done.stdout


if find_compiler():
    find_nvcc()  # an error under QL_BUILD_CUDA=1 comes before anything is built
    extensions = [Extension("qlkernels._C", SOURCES, depends=HEADERS, language="c++")]
else:
    if os.environ.get("QL_BUILD_CUDA") == "1":
        raise SystemExit("qlkernels: QL_BUILD_CUDA=1, but there is no C++ compiler")
    extensions = []

setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
