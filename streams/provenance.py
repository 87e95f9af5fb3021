"""The machine a run ran on, in words, for reports that can be reproduced."""

from __future__ import annotations

import os
import platform
from pathlib import Path

GIBIBYTE = 1 << 30


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
