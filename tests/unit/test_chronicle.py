"""The chronicle says the same in memory as the lineage does on the disk, and of neither more than was told."""

from __future__ import annotations

from itertools import count

import numpy as np
import pytest

from state.lineage import Decision, Lineage, Record, Span, WrongStep
from streams.meta.chronicle import Chronicle

ITEMS = ("a", "b")


def record(version, parent=None, kind="candidate"):
    return Record(
        version, parent, "f" * 64, version, Decision(kind, f"because of {version}"), (Span(0, 10 * version, 9),),
        {"rate": 0.1}, {"events": 10},
    )  # fmt: skip


def tensors(version):
    """What a lineage hashes needs parameters; the others are as they are."""
    return {"parameters.item_bias": np.full(2, version, np.float32), "counts.steps": np.array([version])}


class Told:
    """A chronicle, and how often it asked for tensors."""

    def __init__(self, lineage=None, keep=10):
        clock = count(1_000)
        self.asked = []
        self.chronicle = Chronicle(lineage, keep, lambda: next(clock))

    def add(self, *args, **more):
        made = record(*args, **more)

        def ask():
            self.asked.append(made.version)
            return tensors(made.version)

        self.chronicle.add(made, ask, ITEMS)

    def served(self, versions):
        self.add(0, kind="initial")
        for number in range(1, versions + 1):
            self.add(number, number - 1)
            self.chronicle.decide(number, Decision("shadow", "scored"))
            self.chronicle.decide(number, Decision("promoted", "no worse"))


def summary(versions):
    return [
        (v.number, v.record.parent, v.record.round, v.record.spans, [(d.kind, d.reason) for d in v.decisions])
        for v in versions
    ]


def test_without_a_lineage_all_is_told_and_no_tensors_are_asked_for():
    told = Told()
    assert (told.chronicle.versions, told.chronicle.next_version) == ((), 0)
    told.served(2)
    assert told.asked == []
    assert told.chronicle.next_version == 3
    assert summary(told.chronicle.versions)[2] == (
        2, 1, 2, (Span(0, 20, 9),), [("candidate", "because of 2"), ("shadow", "scored"), ("promoted", "no worse")],
    )  # fmt: skip


def test_on_the_disk_is_what_is_in_memory(tmp_path):
    lineage = Lineage(tmp_path / "lineage")
    told = Told(lineage)
    told.served(3)
    assert told.asked == [0, 1, 2, 3]
    again = Lineage(tmp_path / "lineage")
    assert summary(again.records()) == summary(told.chronicle.versions)
    assert again.current == 3
    assert again.tensors(2).tensors["parameters.item_bias"].tolist() == [2.0, 2.0]
    assert again.tensors(2).item_ids == ITEMS
    assert [v.record.file_sha256 for v in told.chronicle.versions] == [v.record.file_sha256 for v in again.records()]


def test_times_are_those_of_its_own_clock():
    told = Told()
    told.served(1)
    version = told.chronicle.versions[1]
    assert version.record.made_at_ms == version.decisions[0].at_ms == 1_001
    assert [d.at_ms for d in version.decisions] == [1_001, 1_002, 1_003]


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_latest_served_keep_their_tensors(keep, tmp_path):
    told = Told(Lineage(tmp_path / "lineage"), keep)
    told.served(3)
    told.add(4, 3)
    told.chronicle.decide(4, Decision("rejected", "worse"))
    kept = {int(path.stem.split("-")[1]) for path in (tmp_path / "lineage").glob("version-*.safetensors")}
    assert kept == {*range(4 - keep, 4), 4}  # a rejected one goes with the next that is promoted
    told.add(5, 3)
    told.chronicle.decide(5, Decision("promoted", "no worse"))
    kept = {int(path.stem.split("-")[1]) for path in (tmp_path / "lineage").glob("version-*.safetensors")}
    assert kept == {*[3, 5][-keep:]}


def test_what_cannot_follow_is_refused_and_changes_neither(tmp_path):
    for lineage in (None, Lineage(tmp_path / "lineage")):
        told = Told(lineage)
        told.served(1)
        with pytest.raises(WrongStep, match="version 5 cannot be added: the next one is 2"):
            told.add(5, 1)
        with pytest.raises(WrongStep, match="version 1 is promoted and cannot become canary"):
            told.chronicle.decide(1, Decision("canary", "late"))
        assert told.chronicle.next_version == 2
        assert [d.kind for d in told.chronicle.versions[1].decisions] == ["candidate", "shadow", "promoted"]
        if lineage is not None:
            assert summary(lineage.records()) == summary(told.chronicle.versions)


def test_a_version_that_somebody_else_added_meanwhile_is_refused(tmp_path):
    told, other = (Told(Lineage(tmp_path / "lineage")) for _ in range(2))
    told.add(0, kind="initial")
    with pytest.raises(WrongStep):
        other.add(0, kind="initial")
    assert other.chronicle.versions == ()


def test_evidence_is_kept_as_it_was_given(tmp_path):
    told = Told(Lineage(tmp_path / "lineage"))
    told.add(0, kind="initial")
    told.add(1, 0)
    told.chronicle.decide(1, Decision("rejected", "worse", {"rise": np.float64(0.5), "users": [1, 2]}))
    for versions in (told.chronicle.versions, Lineage(tmp_path / "lineage").records()):
        assert versions[1].decisions[-1].evidence == {"rise": 0.5, "users": [1, 2]}
