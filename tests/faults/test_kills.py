"""Writers that are killed, at named points and at any time: what they leave is what a clean pass leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.faults.kills import POINTS
from tests.faults.processes import scratch

ROOT = Path(__file__).parents[2]
KILLS, KILLS_SOAK = 100, 500


def test_rows_and_ledgers_of_killed_writers_are_those_of_a_clean_pass(soak, seed, report):
    kills = KILLS_SOAK if soak else KILLS
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        command = [sys.executable, "-m", "tests.faults.kills", directory, str(kills), str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert sum(found["kills"].values()) == kills
    assert set(found["kills"]) == set(POINTS)
    points = ", ".join(f"{n} {point}" for point, n in sorted(found["kills"].items()))
    others = ", ".join(f"{n} {what}" for what, n in found["counts"].items())
    report(f"kills: {kills} of writers, all of them resumed to the bit ({points}); {others}; seed {seed}")
