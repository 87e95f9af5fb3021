"""A writer that runs out of file descriptors: a clear error, nothing corrupt, and it goes on when there are some."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.processes import scratch


def test_a_writer_without_descriptors_says_so_and_goes_on_when_there_are_some(soak, report):
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        command = [sys.executable, "-m", "tests.faults.descriptors", directory, "1" if soak else "2"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        "StoreWriteFailed of a writer", "StoreUnreadable of a writer",
        "StoreUnreadable when opened to read", "StoreUnreadable when opened to write",
    }  # fmt: skip
    shown = ", ".join(f"{n} {what}" for what, n in sorted(found.items()))
    report(f"out of file descriptors: {shown}; all of them resumed to the bit")
