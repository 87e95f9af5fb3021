"""Work in forked processes, which may be killed, crash or hang. Who forks must never have opened RocksDB itself."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

Trial = TypeVar("Trial")
FAILED = 3
"""Exit status of a process whose work raised"""


def forked(work: Callable[[], object]) -> int:
    """Starts a process that does the work; returns its id. It exits with 0, or FAILED and a traceback on stderr."""
    pid = os.fork()
    if pid:
        return pid
    status = FAILED
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def end_of(pid: int) -> int:
    """Waits for a process: its exit status, or less than 0, the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def outcomes(
    trials: Sequence[Trial], attempt: Callable[[Trial], str], deadline_s: float = 120
) -> Iterator[tuple[Trial, str]]:
    """The outcome of each trial, made in a process that is replaced when it dies: ``died of signal N`` or ``hung``."""
    done = 0
    while done < len(trials):
        reading, writing = os.pipe()
        pid = forked(lambda rest=trials[done:], pipe=writing: _attempt_all(rest, attempt, pipe))
        os.close(writing)
        for outcome in _lines(reading, deadline_s):
            yield trials[done], outcome
            done += 1
        os.close(reading)
        if done == len(trials):
            end_of(pid)
        else:
            hung = not _ended(pid)
            if hung:
                os.kill(pid, signal.SIGKILL)
            status = end_of(pid)
            yield trials[done], "hung" if hung else f"died of signal {-status}" if status < 0 else f"exit {status}"
            done += 1


def _attempt_all(trials: Sequence[Trial], attempt: Callable[[Trial], str], pipe: int) -> None:
    for trial in trials:
        os.write(pipe, json.dumps(attempt(trial)).encode() + b"\n")


def _lines(pipe: int, deadline_s: float) -> Iterator[str]:
    """Until the other end is closed, or no line has come for so long."""
    held = b""
    while select.select([pipe], [], [], deadline_s)[0] and (more := os.read(pipe, 65_536)):
        *lines, held = (held + more).split(b"\n")
        yield from map(json.loads, lines)


def _ended(pid: int) -> bool:
    """Whether a process has ended by itself, or does within a second: its pipe is closed a moment before."""
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return True
        time.sleep(0.005)
    return False


def scratch() -> str | None:
    """A directory in memory for thousands of small stores; None, the system's own, where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) and Path("/dev/shm").is_dir() else None
