"""Description of the software and hardware of a session, for env.json."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moa_train.devices import device_name


def describe_environment(device: torch.device, world_size: int) -> dict[str, Any]:
    """Return the content of env.json: versions of all imported packages, device, processor, git commit, command."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": cpu_cores(),
        "world_size": world_size,
        "git_commit": _git_commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "packages": _imported_packages(),
    }


def cpu_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the CPU's model name, as far as the system provides it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """Return the commit of this checkout, with "-dirty" after local changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _imported_packages() -> dict[str, str]:
    modules = {name.partition(".")[0] for name in sys.modules}
    by_module = metadata.packages_distributions()
    names = {name for module in modules for name in by_module.get(module, ())}
    return {name: metadata.version(name) for name in sorted(names, key=str.lower)}
