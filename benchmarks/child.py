"""Runs a function in a fresh process, so that its peak memory is its own."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[T, int]:
    """(what the function returns, peak resident bytes of the process); what it raises is raised here.

    The function must be importable by name. The peak includes the interpreter and the libraries.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        result = pool.submit(function, *args, **kwargs).result()
        return result, pool.submit(peak_bytes).result()


def peak_bytes() -> int:
    """The most resident memory this process has had so far.

    Linux's VmHWM comes first: ``ru_maxrss`` of a new process begins with that of its parent.
    """
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
