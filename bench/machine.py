"""What a row says about where it was measured."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
CODE = ("qlkernels", "csrc", "bench/*.py", "bench/cases", "setup.py")  # what a commit must hold


def device_or_exit(device: str, unknown: Sequence[str]) -> str:
    """``cpu`` or ``cuda``, the latter for ``auto`` where there is one. Ends the command with status
    2 and a sentence for another device, or where it was given ``unknown`` names.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if unknown or device not in ("cpu", "cuda"):
        print(f"unknown: {', '.join(unknown) or device}; see --help", file=sys.stderr)
        raise typer.Exit(2)
    return device


@functools.cache
def device_name(device: str) -> str:
    """The GPU's name, or the model name of the CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    if not names:
        import platform

        return platform.processor() or platform.machine()
    return names[0].strip()


def slug(device: str) -> str:
    """File name stem of a device: ``nvidia-h100-80gb-hbm3``, ``cpu-amd-epyc``."""
    text = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return text if device == "cuda" else f"cpu-{text}"


def package_version(name: str) -> str:
    """Version of an installed distribution, empty where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit(root: Path = ROOT) -> str:
    """Short hash, with ``+`` where the measured code differs; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (
            "+" if git("status", "--porcelain", "--", *CODE) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def new_run_id() -> str:
    now = datetime.datetime.now(datetime.timezone.utc)
    return f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"


def utc_now() -> str:
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}"
