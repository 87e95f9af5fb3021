"""Stores with damaged files: refused, or rows of a clean pass up to the store's offset; never silently wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.faults.processes import scratch

ROOT = Path(__file__).parents[2]
CUTS = 4_096
FLIPS, FLIPS_SOAK = 1_000, 5_000


def campaign(*arguments: object) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch()) as directory:
        kind, *numbers = map(str, arguments)
        command = [sys.executable, "-m", "tests.faults.damage", kind, directory, *numbers]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["bad"] == []
    return found


def shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items()))


def test_a_log_cut_at_any_of_its_last_bytes_is_a_shorter_stream_that_goes_on(report):
    found = campaign("cuts", 1, CUTS, 1)
    assert sum(found["outcomes"].values()) == CUTS
    assert found["outcomes"] == {"rolled back": CUTS}
    report(
        f"log cuts: each of the last {CUTS:,} of {found['log bytes']:,} bytes: {shown(found['outcomes'])} (by up to "
        f"{found['most events rolled back']} events), all of them resumed to the bit"
    )


def test_no_flipped_bit_is_ever_taken_for_truth(soak, seed, report):
    flips = FLIPS_SOAK if soak else FLIPS
    found = campaign("flips", flips, seed)
    assert sum(found["outcomes"].values()) == flips
    assert set(found["outcomes"]) == {"refused", "whole", "rolled back"}
    assert found["kinds"]["SST"]["refused"] > 0.9 * sum(found["kinds"]["SST"].values())
    assert found["kinds"]["WAL"]["rolled back"] > 0.9 * sum(found["kinds"]["WAL"].values())
    kinds = "; ".join(f"{kind}: {shown(counts)}" for kind, counts in sorted(found["kinds"].items()))
    report(f"bit flips: {flips:,}, {shown(found['outcomes'])}, none wrong, crashed or hung ({kinds}); seed {seed}")
