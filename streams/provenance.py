"""What a run ran on: library versions and the machine, for reports that can be reproduced."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("coldstream", "numpy", "torch", "numba", "rocksdict", "pyarrow")
"""Distributions whose version can change a result or a file."""

GIBIBYTE = 1 << 30


def library_versions() -> dict[str, str]:
    """Python's version and that of every library of ``LIBRARIES``; one not installed is named so. Imports none."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_machine() -> str:
    """Processor, cores this process may use, memory and operating system, in one line."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    system = f"{platform.system()} {platform.release()}"
    parts = [_processor(), f"{cores} core{'s' if cores != 1 else ''}", _memory(), system]
    return ", ".join(part for part in parts if part)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> str:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return ""
    return f"{total / GIBIBYTE:.0f} GiB memory"
