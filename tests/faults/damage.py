"""Damages copies of a store and opens them; prints what came of it as JSON.

    python -m tests.faults.damage cuts DIRECTORY FIRST LAST STEP      the log, cut so many bytes before its end
    python -m tests.faults.damage flips DIRECTORY COUNT SEED          a random bit of a random file

Outcomes of a trial:
    refused       a StoreError, when the store is opened, read or written
    whole         all that was written is there; the stream was fed to its end from there
    rolled back   the rows are those of a clean pass up to the store's offset; the stream was fed to its end from there
    wrong         anything else: rows that no clean pass ever held, an error that is no StoreError
    died, hung    of the process
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from state.exceptions import StoreError
from state.store import RocksReader
from tests.faults.oracle import EVENTS, LARGE, TINY, check, clean_pass, finish, open_store, processor, stream
from tests.faults.processes import end_of, forked, outcomes

FED = EVENTS - 40
"""Events of the stores that are damaged: the rest is fed when they are opened again"""
IN_FILES = 200
"""Of these, as many are in sorted files where some are to be, and the others in the log alone"""
KINDS = {
    "WAL": "*.log", "SST": "*.sst", "MANIFEST": "MANIFEST-*", "CURRENT": "CURRENT", "OPTIONS": "OPTIONS-*",
    "IDENTITY": "IDENTITY", "rocksdict-config": "rocksdict-config.json",
}  # fmt: skip
WEIGHTS = {"WAL": 8, "SST": 8, "MANIFEST": 6, "CURRENT": 2, "OPTIONS": 2, "IDENTITY": 1, "rocksdict-config": 1}
"""How often a file of each kind is damaged"""


def make_store(path: Path, in_files: int) -> None:
    """A store as a killed writer leaves it: ``in_files`` events in sorted files, the others in the log."""

    def write() -> None:
        if in_files:
            for start in (0, in_files // 2):  # few files: a compaction that is due would cost each trial a second
                store = open_store(path, TINY if start == 0 else LARGE)
                with processor(store, 8) as work:
                    work.process(0, stream().take(slice(start, start + in_files // 2)))
                    if start == 0:
                        store.compact()
        work = processor(open_store(path, LARGE), 8)
        work.process(0, stream().take(slice(in_files, FED)))
        os.kill(os.getpid(), signal.SIGKILL)

    assert end_of(forked(write)) == -signal.SIGKILL


def log_of(path: Path) -> Path:
    return max(path.glob("*.log"), key=lambda file: file.stat().st_size)


def attempt_on(original: Path, directory: Path, damage: Callable[[Path], None]) -> str:
    """The outcome of one damaged copy."""
    path = directory / "copy"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(original, path)
    damage(path)
    try:
        seen = _look(path)
        store = open_store(path)
        try:
            done = check(store)
            if seen not in (None, done):
                return f"wrong: a reader saw {seen} events, the writer sees {done}"
            finish(store, done)
        finally:
            store.close()
    except StoreError as error:
        return f"refused: {type(error).__name__}" if str(path) in str(error) else f"wrong: no path in {error}"
    except Exception:
        return f"wrong: {traceback.format_exc()}"
    return "whole" if done == FED else f"rolled back {FED - done}"


def _look(path: Path) -> int | None:
    """What a reader sees; None where it refuses."""
    try:
        with RocksReader(path) as reader:
            return check(reader)
    except StoreError:
        return None


def cut(original: Path, directory: Path, cuts: Sequence[int]) -> dict[str, object]:
    """Cuts the log so many bytes before its end."""
    size, name = log_of(original).stat().st_size, log_of(original).name
    assert size > max(cuts)

    def attempt(missing: int) -> str:
        return attempt_on(original, directory, lambda path: os.truncate(path / name, size - missing))

    found = list(outcomes(cuts, attempt))
    back = [int(outcome.split()[-1]) for _, outcome in found if outcome.startswith("rolled back")]
    assert back == sorted(back), "the more is cut, the more is rolled back"
    return _summary(found, {"log bytes": size, "most events rolled back": max(back, default=0)})


def flip(original: Path, directory: Path, count: int, seed: int) -> dict[str, object]:
    """Flips one random bit in each of ``count`` copies."""
    rng = np.random.default_rng(seed)
    files = {kind: sorted(p for p in original.glob(pattern) if p.stat().st_size) for kind, pattern in KINDS.items()}
    assert all(files.values()), files
    shares = np.array([WEIGHTS[kind] for kind in files], float)
    trials = []
    for kind in rng.choice(list(files), count, p=shares / shares.sum()).tolist():
        file = files[kind][rng.integers(0, len(files[kind]))]
        trials.append((kind, file.name, int(rng.integers(0, 8 * file.stat().st_size))))

    def attempt(trial: tuple[str, str, int]) -> str:
        return attempt_on(original, directory, lambda path: _flip_bit(path / trial[1], trial[2]))

    found = list(outcomes(trials, attempt))
    kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for (kind, _, _), outcome in found:
        kinds[kind][_short(outcome)] += 1
    return _summary(found, {"kinds": kinds})


def _flip_bit(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def _short(outcome: str) -> str:
    return next((word for word in ("refused", "whole", "rolled back") if outcome.startswith(word)), outcome)


def _summary(found: list[tuple[object, str]], more: dict[str, object]) -> dict[str, object]:
    counts = Counter(_short(outcome) for _, outcome in found)
    bad = [(trial, outcome) for trial, outcome in found if _short(outcome) not in ("refused", "whole", "rolled back")]
    return {"outcomes": counts, "bad": bad[:20], **more}


def main(kind: str, directory: Path, *numbers: int) -> None:
    clean_pass()  # it compiles the kernel too: every fork begins warm
    original = directory / "original"
    make_store(original, 0 if kind == "cuts" else IN_FILES)
    if kind == "cuts":
        first, last, step = numbers
        print(json.dumps(cut(original, directory, range(first, last + 1, step))))
    else:
        print(json.dumps(flip(original, directory, *numbers)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
