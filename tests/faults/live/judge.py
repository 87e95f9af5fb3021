"""The judge of live campaigns: reads the topics once from their start, and says how the workers' work differs.

A process of its own, which shares with the workers the kernel and nothing of the way to it: records come one by one,
JSON is Python's, duplicates are found with a dictionary, and one pass without any fault gives what must be there.

    rows         of each partition's last owner: bit for bit, ledgers included, and the progress
    changelog    restored from its start into an empty store: the same
    predictions  of committed records: one for each event applied, bit for bit; repetitions are counted
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.loading import load_settings
from configs.settings import Settings
from learner.artifact import read_artifact
from learner.interactions import Interactions
from learner.serving import ServingModel
from state.changelog import Record, restore
from state.codec import Progress
from state.memory_store import MemoryUserStore
from state.store import RocksReader
from streams.processor import Processor
from tests.faults.live.playing import committed_records

EXPECTED = "expected-reason"
"""Header of a record that is no event, by whoever plays it"""
SHOWN = 20
ROOT = Path(__file__).parents[3]
Key = tuple[int, int]
"""Partition and source offset"""


@dataclass
class Verdict:
    """What was found."""

    events: int = 0
    """Applied"""
    users: int = 0
    duplicates: int = 0
    """Events dropped, for their id came again"""
    poison: int = 0
    predictions: int = 0
    repeated: int = 0
    """Predictions beyond the first of an event"""
    differences: list[str] = field(default_factory=list)

    def check(self, same: bool, what: str) -> None:
        if not same:
            self.differences.append(what)


@dataclass(frozen=True)
class Truth:
    """A partition as it must be."""

    rows: dict[bytes, bytes]
    progress: Progress | None
    predicted: dict[int, tuple[object, ...]]
    """Source offset -> what was said, see ``_said``"""


def judged(config: Path, model: Path, stores: Mapping[int, Path]) -> Verdict:
    """The verdict of a judge in a process of its own; ``stores``: of each partition's last owner."""
    spec = {"config": str(config), "model": str(model), "stores": {str(n): str(path) for n, path in stores.items()}}
    command = [sys.executable, "-m", "tests.faults.live.judge", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return Verdict(**json.loads(done.stdout))


def judge(settings: Settings, model: ServingModel, stores: Mapping[int, Path]) -> Verdict:
    stream, verdict = settings.stream, Verdict()
    assert stream.topics.predictions is not None
    topics = stream.topic, stream.topics.changelog, stream.topics.predictions
    source, changelog, predictions = committed_records(",".join(settings.kafka.bootstrap), *topics).values()
    verdict.check(source.keys() == stores.keys(), f"partitions {sorted(source)} have stores {sorted(stores)}")
    said: dict[Key, list[tuple[object, ...]]] = {}
    for record in (record for records in predictions.values() for record in records):
        value = json.loads(record.value)
        verdict.check(record.key == value["user_id"].encode(), f"a prediction's key is {record.key!r}: {value}")
        said.setdefault((value["source_partition"], value["source_offset"]), []).append(_said(value))
    expected: dict[Key, tuple[object, ...]] = {}
    for number in sorted(stores.keys() & source.keys()):
        truth = one_pass(settings, model, number, source[number], verdict)
        expected |= {(number, offset): value for offset, value in truth.predicted.items()}
        with RocksReader(stores[number]) as store:
            _check_rows(f"partition {number}", _rows(store), store.progress(), truth, verdict)
        _check_changelog(number, changelog[number], truth, settings, model, verdict)
    _check_predictions(said, expected, verdict)
    return verdict


def one_pass(settings: Settings, model: ServingModel, number: int, records: list[Any], verdict: Verdict) -> Truth:
    """A partition's stream applied once, in order, by a fresh processor; counts go to the verdict."""
    good = _events(settings, records, verdict)
    with Processor(model, lambda _, layout: MemoryUserStore(layout), settings.state) as work:
        if not records:
            return Truth({}, None, {})
        events = Interactions.from_columns(
            [value["user_id"] for _, value in good],
            [value["item_id"] for _, value in good],
            [int(value["label"]) for _, value in good],
            [value["event_time_ms"] for _, value in good],
            offsets=[offset for offset, _ in good],
        )
        predictions = work.process(number, events, through=records[-1].offset)
        predicted = {
            offset: _said(value | {"probability": float(p), "logit": float(z), "meta_version": model.meta_version})
            for (offset, value), p, z in zip(good, predictions.probability, predictions.logit, strict=True)
        }
        store = work.store(number)
        rows, progress = _rows(store), store.progress()
    verdict.events += len(good)
    verdict.users += len(rows)
    return Truth(rows, progress, predicted)


def _events(settings: Settings, records: list[Any], verdict: Verdict) -> list[tuple[int, dict[str, Any]]]:
    """(offset, fields) of what is to be applied."""
    rule, window = settings.data.events.event_id, settings.stream.duplicate_window
    seen: dict[object, int] = {}
    events = []
    for record in records:
        if any(name == EXPECTED for name, _ in record.headers):
            verdict.poison += 1
            continue
        value = json.loads(record.value)
        value |= {field: str(value[field]) for field in ("user_id", "item_id")}
        name = None if rule is None else value.get(rule.field)
        again = name is not None and record.offset - seen.get(name, -window - 1) <= window
        if name is not None:
            seen[name] = record.offset
        if again:
            verdict.duplicates += 1
        else:
            events.append((record.offset, value))
    return events


def _said(value: Mapping[str, Any]) -> tuple[object, ...]:
    """What counts of a prediction, with its floats as 32 bits."""
    bits = struct.pack("<ff", value["probability"], value["logit"])
    return value["user_id"], value["item_id"], int(value["label"]), value["event_time_ms"], value["meta_version"], bits


def _check_changelog(
    number: int, records: list[Any], truth: Truth, settings: Settings, model: ServingModel, verdict: Verdict
) -> None:
    with Processor(model, lambda _, layout: MemoryUserStore(layout), settings.state) as work:
        store = work.store(number)
        log = [Record(record.key, record.value) for record in records]
        restore(store, log, tombstone_retention_ms=1 << 40, now_ms=1 << 50)
        _check_rows(f"changelog of partition {number}", _rows(store), store.progress(), truth, verdict)


def _check_rows(
    where: str, rows: dict[bytes, bytes], progress: Progress | None, truth: Truth, verdict: Verdict
) -> None:
    wrong = sorted(user for user in rows.keys() | truth.rows.keys() if rows.get(user) != truth.rows.get(user))
    verdict.check(
        not wrong,
        f"{where}: {len(wrong)} users differ, of {len(rows)} found and {len(truth.rows)} expected: {wrong[:5]}",
    )
    found, expected = _figures(progress), _figures(truth.progress)
    verdict.check(found == expected, f"{where}: is at {found}, expected is {expected}")


def _check_predictions(
    said: dict[Key, list[tuple[object, ...]]], expected: dict[Key, tuple[object, ...]], verdict: Verdict
) -> None:
    verdict.predictions = len(said)
    verdict.repeated = sum(map(len, said.values())) - len(said)
    missing, extra = sorted(expected.keys() - said.keys()), sorted(said.keys() - expected.keys())
    verdict.check(not missing, f"{len(missing)} predictions are missing, (partition, offset): {missing[:SHOWN]}")
    verdict.check(not extra, f"{len(extra)} predictions of what was no event: {extra[:SHOWN]}")
    wrong = [key for key in expected.keys() & said.keys() if set(said[key]) != {expected[key]}]
    verdict.check(not wrong, f"{len(wrong)} predictions differ: {[(k, said[k], expected[k]) for k in wrong[:3]]}")


def _rows(store: Any) -> dict[bytes, bytes]:
    return {user: value for users, values in store.stored() for user, value in zip(users, values, strict=True)}


def _figures(progress: Progress | None) -> tuple[int, int, int, int] | None:
    return None if progress is None else (progress.offset, progress.meta_version, progress.users, progress.events)


def main(spec: dict[str, Any]) -> None:
    settings = load_settings(spec["config"])
    model = read_artifact(Path(spec["model"])).serving()
    verdict = judge(settings, model, {int(number): Path(path) for number, path in spec["stores"].items()})
    verdict.differences = verdict.differences[:SHOWN]
    print(json.dumps(verdict.__dict__))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
