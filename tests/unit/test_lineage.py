"""Versions and where they came from: told in order, verified in every byte, taken back exactly."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from state.lineage import (
    Decision,
    Lineage,
    LineageDamaged,
    LineageError,
    LineageLocked,
    Record,
    Span,
    TensorsPruned,
    UnknownVersion,
    WrongStep,
    serving_sha256,
)
from state.lineage.difference import ITEM_TABLES, ItemChange, TensorChange, difference
from state.lineage.record import Pruned, decode_line, encode_line
from state.lineage.tensors import Parameters, read_tensors

ROOT = Path(__file__).parents[2]
MODEL = "f" * 64
ITEMS = ("a", "b", "naïve")
KEY = b"a key for tests"


def tensors(version: int) -> dict[str, np.ndarray]:
    """Different for every version, the optimizer's too."""
    rng = np.random.default_rng(version)
    return {
        "parameters.item_embedding": rng.normal(size=(3, 2)).astype(np.float32),
        "parameters.log_weight": np.float32(version) * np.ones((), np.float32),
        "moments.first.log_weight": np.full((), -version, np.float32),
        "counts.item_events": np.arange(3) + version,
    }


def candidate(version: int, parent: int, kind: str = "candidate") -> Record:
    return Record(
        version, parent, MODEL, version, Decision(kind, "a round", {"users": np.int64(7)}),
        spans=(Span(0, 10 * version, 10 * version + 9),), settings={"rate": 0.01},
    )  # fmt: skip


def initial() -> Record:
    return Record(0, None, MODEL, 0, Decision("initial", "trained"))


def filled(directory: Path, key: bytes | None = None) -> Lineage:
    """0 initial, 1 promoted through all stages, 2 rejected, 3 promoted, 4 a candidate on 3."""
    clock = iter(range(1_000, 9_999))
    lineage = Lineage(directory, key, now_ms=lambda: next(clock))
    lineage.add(initial(), tensors(0), ITEMS)
    lineage.add(candidate(1, 0), tensors(1), ITEMS)
    for kind in ("shadow", "canary", "promoted"):
        lineage.decide(1, Decision(kind, "it stands", {"cohorts": {"new": {"rise": -0.001}}}))
    lineage.add(candidate(2, 1), tensors(2), ITEMS)
    lineage.decide(2, Decision("rejected", "new rose by 0.01"))
    lineage.add(candidate(3, 1, "promoted"), tensors(3), ITEMS)
    lineage.add(candidate(4, 3), tensors(4), ITEMS)
    return lineage


def equal(found: Parameters, wanted: dict[str, np.ndarray]) -> bool:
    return found.tensors.keys() == wanted.keys() and all(
        found.tensors[name].dtype == held.dtype
        and found.tensors[name].shape == held.shape
        and found.tensors[name].tobytes() == held.tobytes()
        for name, held in wanted.items()
    )


def stages(lineage: Lineage) -> list[str]:
    return [version.stage for version in lineage.records()]


# --- what is told comes back ----------------------------------------------------------------------------------


def test_another_process_reads_what_was_told(tmp_path):
    told = filled(tmp_path / "meta")
    read = Lineage(tmp_path / "meta")
    assert read.records() == told.records()
    assert stages(read) == ["initial", "promoted", "rejected", "promoted", "candidate"]
    assert (read.current, read.next_version, read.signed, read.torn) == (3, 5, False, False)
    first = read.version(1)
    assert [decision.kind for decision in first.decisions] == ["candidate", "shadow", "canary", "promoted"]
    assert [decision.at_ms for decision in first.decisions] == [1_001, 1_002, 1_003, 1_004]
    assert first.decisions[0].evidence == {"users": 7}
    assert first.record.spans == (Span(0, 10, 19),)
    assert (first.record.parent, first.record.settings, first.record.made_at_ms) == (0, {"rate": 0.01}, 1_001)
    for number in range(5):
        assert equal(read.tensors(number), tensors(number))
        assert read.tensors(number).item_ids == ITEMS
        assert read.version(number).record.serving_sha256 == serving_sha256(tensors(number), ITEMS)


def test_a_reader_sees_what_is_told_later(tmp_path):
    told = filled(tmp_path)
    read = Lineage(tmp_path)
    told.decide(4, Decision("promoted", "it stands"))
    assert read.current == 4
    told.add(candidate(5, 4), tensors(5), ITEMS)
    assert read.next_version == 6


def test_a_lineage_that_is_not_there_is_empty(tmp_path):
    lineage = Lineage(tmp_path / "none")
    assert (lineage.records(), lineage.current, lineage.next_version) == ((), None, 0)
    with pytest.raises(UnknownVersion, match=r"^there is no version 0: the lineage is empty$"):
        lineage.version(0)
    assert not (tmp_path / "none").exists()


def test_the_arrays_that_are_read_are_the_readers_own(tmp_path):
    lineage = filled(tmp_path)
    lineage.tensors(1).tensors["parameters.item_embedding"][0] = 9
    assert equal(lineage.tensors(1), tensors(1))


def test_the_serving_hash_is_of_what_is_served():
    held = {**tensors(1), "parameters.item_embedding": np.arange(6, dtype=np.float32).reshape(3, 2)}
    wanted = serving_sha256(held, ITEMS)
    assert wanted == "af8f9098bac25419a9ecceb4adbfc83cb297c9553b006264ced1dba606f0f908"
    backwards = dict(reversed(held.items()))
    backwards["parameters.item_embedding"] = np.asfortranarray(held["parameters.item_embedding"].astype(">f4"))
    assert serving_sha256(backwards, ITEMS) == wanted
    assert (
        serving_sha256({**held, "moments.first.log_weight": np.ones(9), "counts.item_events": np.ones(1)}, ITEMS)
        == wanted
    )
    different = [
        ({**held, "parameters.log_weight": np.float32(1.0000001) * np.ones((), np.float32)}, ITEMS),
        ({**held, "parameters.log_weight": np.ones((1,), np.float32)}, ITEMS),
        ({**held, "parameters.log_weight": np.ones((), np.float64)}, ITEMS),
        ({**held, "parameters.more": np.ones(0, np.float32)}, ITEMS),
        (held, ("b", "a", "naïve")),
        (held, ("ab", "", "naïve")),
    ]
    assert wanted not in {serving_sha256(*each) for each in different}


def test_the_bytes_of_lines_stay_as_they_are():
    """What today's lineages hold must be read by tomorrow's programs."""
    entries = [replace(initial(), metrics={"auc": 0.5}, made_at_ms=5), Pruned((0,), 6)]
    first, sha256 = encode_line(entries[0], "0" * 64, KEY)
    second, _ = encode_line(entries[1], sha256, None)
    assert (first, second) == (GOLDEN_SIGNED, GOLDEN_PRUNED)
    assert decode_line(first[:-1], "0" * 64, KEY) == (entries[0], sha256, True)
    assert decode_line(second[:-1], sha256, None)[0] == entries[1]


GOLDEN_SIGNED = (
    b'{"content":{"decision":{"at_ms":0,"evidence":{},"kind":"initial","reason":"trained"},"file_sha256":"","ma'
    b'de_at_ms":5,"metrics":{"auc":0.5},"model":"ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff'
    b'ff","parent":null,"round":0,"serving_sha256":"","settings":{},"spans":[],"undone":[],"version":0},"entry"'
    b':"version","format":1,"hmac":"8e226877e5f65530fdffdad12e963fe624fe91dce9da176917984ce8be677c1a","previous'
    b'":"0000000000000000000000000000000000000000000000000000000000000000","sha256":"d555fc744f8f0be629137d4c65'
    b'e0fdb13897403c2f3895b36d6ddfa7da8c0c90"}'
    b"\n"
)
GOLDEN_PRUNED = (
    b'{"content":{"at_ms":6,"versions":[0]},"entry":"pruned","format":1,"hmac":null,"previous":"d555fc744f8f0be'
    b'629137d4c65e0fdb13897403c2f3895b36d6ddfa7da8c0c90","sha256":"b93761350faaa7862f2c07a0d43a1280e2659d650245'
    b'7824f0489692637a7df5"}'
    b"\n"
)


def test_a_number_that_is_not_finite_is_kept_by_name(tmp_path):
    lineage = filled(tmp_path)
    evidence = {"rise": np.float32("nan"), "norm": [float("inf"), -np.inf], "by": {3: np.arange(2)}}
    lineage.decide(4, Decision("rejected", "not finite", evidence))
    kept = Lineage(tmp_path).version(4).decisions[-1].evidence
    assert kept == {"rise": "NaN", "norm": ["Infinity", "-Infinity"], "by": {"3": [0, 1]}}


def test_what_a_record_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    lineage = filled(tmp_path)
    with pytest.raises(TypeError, match=r"^by.cohort holds a set, which a record cannot"):
        lineage.decide(4, Decision("rejected", "", {"by": {"cohort": {1}}}))
    with pytest.raises(ValueError, match=r"^tensor x is of complex64, which the file cannot hold"):
        lineage.add(candidate(5, 3), {"x": np.ones(1, np.complex64)}, ())
    with pytest.raises(ValueError, match=r"^a tensor cannot be named 'items.text'"):
        lineage.add(candidate(5, 3), {"items.text": np.ones(1)}, ())
    with pytest.raises(ValueError, match="an empty key signs nothing"):
        Lineage(tmp_path, b"")
    assert lineage.next_version == 5
    assert stages(Lineage(tmp_path))[4] == "candidate"


# --- what may follow what -------------------------------------------------------------------------------------


def wrong(lineage: Lineage, step, *arguments) -> str:
    """Takes a step that must be refused; nothing may change."""
    before = {path.name: path.read_bytes() for path in lineage.directory.iterdir()}
    with pytest.raises(WrongStep) as refused:
        step(*arguments)
    assert {path.name: path.read_bytes() for path in lineage.directory.iterdir()} == before
    return str(refused.value)


def test_versions_come_in_order_and_of_one_model(tmp_path):
    lineage = filled(tmp_path)
    add = lineage.add
    assert "version 4 cannot be added: the next one is 5" in wrong(lineage, add, candidate(4, 3), tensors(4), ITEMS)
    assert "version 6 cannot be added: the next one is 5" in wrong(lineage, add, candidate(6, 3), tensors(6), ITEMS)
    other = replace(candidate(5, 3), model="0" * 64)
    said = "version 5 is of the model 000000000000, this lineage is of ffffffffffff: a newly trained model takes"
    assert said in wrong(lineage, add, other, tensors(5), ITEMS)
    assert "names no parent" in wrong(lineage, add, replace(candidate(5, 3), parent=None), tensors(5), ITEMS)
    assert "cannot be shadow as it is made" in wrong(lineage, add, candidate(5, 3, "shadow"), tensors(5), ITEMS)
    with pytest.raises(UnknownVersion, match=r"^there is no version 5: there are versions 0 to 4; the nearest is 4$"):
        add(candidate(5, 5), tensors(5), ITEMS)
    for record in (candidate(5, 3, "rollback"), replace(candidate(5, 3), undone=(3,))):
        with pytest.raises(ValueError, match="a rollback is made by rollback"):
            add(record, tensors(5), ITEMS)
    empty = Lineage(tmp_path / "empty")
    empty.directory.mkdir()
    (empty.directory / "lineage.lock").touch()
    assert "version 0 is the trained model" in wrong(empty, empty.add, candidate(0, 0), tensors(0), ITEMS)


@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (0, "rejected", "version 0 is initial and cannot become rejected: that is final; roll back to the version"),
        (1, "promoted", "version 1 is promoted and cannot become promoted: that is final"),
        (2, "canary", "version 2 is rejected and cannot become canary: it can become promoted by hand"),
        (4, "candidate", "version 4 is candidate and cannot become candidate: it can become shadow, canary, promoted"),
        (4, "initial", "version 4 is candidate and cannot become initial"),
        (4, "rollback", "version 4 is candidate and cannot become rollback"),
    ],
)
def test_decisions_come_in_order(tmp_path, number, kind, said):
    lineage = filled(tmp_path)
    assert said in wrong(lineage, lineage.decide, number, Decision(kind, "because"))


def test_somebody_may_promote_what_the_gate_did_not(tmp_path):
    lineage = filled(tmp_path)
    assert lineage.promote(2, "a false alarm").decisions[-1] == Decision(
        "promoted by hand", "a false alarm", {"current before": 3, "stage before": "rejected"}, 1_009
    )
    assert lineage.current == Lineage(tmp_path).current == 2
    assert lineage.promote(4).stage == "promoted by hand"
    assert wrong(lineage, lineage.promote, 4) == "version 4 is the current one already"
    assert wrong(lineage, lineage.promote, 3) == "version 3 served before: bring it back by a rollback to it"


def test_a_version_that_does_not_verify_is_not_promoted(tmp_path):
    lineage = filled(tmp_path)
    flip(tmp_path / "version-00000004.safetensors", -1)
    with pytest.raises(LineageDamaged, match=r"^version 4 is refused: .*safetensors does not match the hash"):
        lineage.promote(4)
    assert lineage.current == 3


# --- rollback -------------------------------------------------------------------------------------------------


def test_a_rollback_restores_the_hash_and_the_optimizer_exactly(tmp_path):
    lineage = filled(tmp_path)
    restored = lineage.rollback(0, "tastes came back")
    assert lineage.current == restored.number == 5
    assert restored.record.serving_sha256 == lineage.version(0).record.serving_sha256
    assert equal(lineage.tensors(5), tensors(0))
    assert (restored.record.parent, restored.record.undone, restored.record.spans) == (0, (1, 3, 4), ())
    assert restored.record.round == 4
    assert restored.record.decision.evidence == {"to": 0, "undone": [1, 3, 4], "current before": 3}
    assert restored.record.decision.reason == (
        "tastes came back; back to version 0, undoes versions 1, 3, 4: users adapted from them are re-based at their "
        "next event"
    )
    assert [version.undone_by for version in Lineage(tmp_path).records()] == [None, 5, None, 5, 5, None]


def test_a_rollback_rejects_what_was_built_on_the_bad_version(tmp_path):
    lineage = filled(tmp_path)
    lineage.decide(4, Decision("canary", "it stands"))
    lineage.add(candidate(5, 1), tensors(5), ITEMS)
    assert lineage.rollback(1).record.undone == (3, 4)
    assert lineage.version(4).decisions[-1].reason == "built on what the rollback to version 1 undoes"
    assert stages(lineage)[4:] == ["rejected", "candidate", "rollback"]


def test_a_rollback_can_be_taken_back(tmp_path):
    lineage = filled(tmp_path)
    lineage.rollback(1)
    again = lineage.rollback(3, "it was not that")
    assert (again.number, again.record.undone) == (6, (5,))
    assert equal(lineage.tensors(6), tensors(3))


def test_only_what_served_can_serve_again(tmp_path):
    lineage = filled(tmp_path)
    assert wrong(lineage, lineage.rollback, 2) == "version 2 never served (it is rejected): promote it instead"
    assert wrong(lineage, lineage.rollback, 3) == "version 3 is the current one already"
    with pytest.raises(UnknownVersion):
        lineage.rollback(5)


# --- pruning --------------------------------------------------------------------------------------------------


def files(directory: Path) -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in directory.glob("version-*.safetensors"))


def test_pruning_keeps_the_current_the_latest_and_the_open_ones(tmp_path):
    lineage = filled(tmp_path)
    assert lineage.prune(2) == (0, 2)
    assert files(tmp_path) == [1, 3, 4]
    assert lineage.prune(2) == ()
    assert lineage.prune(1) == (1,)
    assert stages(Lineage(tmp_path)) == ["initial", "promoted", "rejected", "promoted", "candidate"]
    said = r"^the tensors of version 1 were pruned \(meta.keep_versions\); there are those of versions 3, 4$"
    for use in (lineage.tensors, lineage.rollback):
        with pytest.raises(TensorsPruned, match=said):
            use(1)
    with pytest.raises(TensorsPruned):
        lineage.promote(2)
    with pytest.raises(ValueError, match="keep is 0"):
        lineage.prune(0)


def test_pruning_removes_what_crashes_left(tmp_path):
    lineage = filled(tmp_path)
    for name in ("version-00000005.safetensors", "version-00000003.safetensors.partial", "version-9.notes"):
        (tmp_path / name).write_bytes(b"x")
    lineage.prune(9)
    assert files(tmp_path) == [0, 1, 3, 4]
    assert (tmp_path / "version-9.notes").exists()
    assert not list(tmp_path.glob("*.partial"))


# --- damage ---------------------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["lineage.jsonl", "version-00000001.safetensors"])
def test_a_lineage_without_damage_is_not_refused(tmp_path, name):
    filled(tmp_path)
    flip(tmp_path / name, 100)
    flip(tmp_path / name, 100)
    assert equal(Lineage(tmp_path).tensors(1), tensors(1))


def test_a_changed_byte_of_a_line_names_the_line(tmp_path):
    filled(tmp_path)
    lines = (tmp_path / "lineage.jsonl").read_bytes().splitlines(keepends=True)
    flip(tmp_path / "lineage.jsonl", sum(map(len, lines[:5])) + lines[5].index(b"a round"))
    said = (
        "line 6 does not match its hash: restore the directory from a copy; what is told before it, up to version 1, is"
    )
    with pytest.raises(LineageDamaged, match=said):
        Lineage(tmp_path)


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        ([0, 1, 3, 4, 5], 3, "does not follow the line before it"),
        ([0, 2, 1, 3], 2, "does not follow the line before it"),
        ([0, 1, 2, 2], 4, "does not follow the line before it"),
        ([1, 2], 1, "does not follow the line before it"),
    ],
)
def test_lines_that_were_taken_out_moved_or_repeated_show(tmp_path, lines, line, what):
    filled(tmp_path)
    path = tmp_path / "lineage.jsonl"
    held = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(held[k] for k in lines))
    with pytest.raises(LineageDamaged, match=f"line {line} {what}"):
        Lineage(tmp_path)


def test_a_line_of_another_format_is_named(tmp_path):
    filled(tmp_path)
    path = tmp_path / "lineage.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2', 1))
    with pytest.raises(LineageDamaged, match="line 1 has format 2, this program reads 1"):
        Lineage(tmp_path)


@pytest.mark.parametrize("line", [b"[]", b"7", b"nothing", b'{"format":1}', b"\xff", b""])
def test_a_line_of_something_else_is_damage(tmp_path, line):
    filled(tmp_path)
    with (tmp_path / "lineage.jsonl").open("ab") as file:
        file.write(line + b"\n")
    with pytest.raises(LineageDamaged, match="line 10 "):
        Lineage(tmp_path)


@pytest.mark.parametrize(
    ("entry", "content", "said"),
    [
        ("gossip", {}, "holds no record that this program knows"),
        ("decision", {"version": 4, "decision": {"kind": "loved", "reason": ""}}, "holds no record that this program"),
        ("decision", {"version": 2, "decision": {"kind": "shadow", "reason": ""}}, "version 2 is rejected and cannot"),
        ("decision", {"version": 9, "decision": {"kind": "shadow", "reason": ""}}, "there is no version 9"),
        ("pruned", {"versions": [3], "at_ms": 1}, "version 3 is in use"),
        ("pruned", {"versions": [0, 4], "at_ms": 1}, "version 4 is in use"),
    ],
)
def test_a_sound_line_that_says_what_cannot_be_is_damage(tmp_path, entry, content, said):
    filled(tmp_path)
    path = tmp_path / "lineage.jsonl"
    previous = json.loads(path.read_bytes().splitlines()[-1])["sha256"]
    line = {"format": 1, "entry": entry, "content": content, "previous": previous, "hmac": None}
    canonical = {"sort_keys": True, "separators": (",", ":")}
    line["sha256"] = hashlib.sha256(json.dumps(line, **canonical).encode()).hexdigest()
    with path.open("a") as file:
        file.write(json.dumps(line, **canonical) + "\n")
    with pytest.raises(LineageDamaged, match=f"line 10 {said}"):
        Lineage(tmp_path)


def test_a_file_that_holds_no_tensors_is_refused_although_its_hash_fits(tmp_path):
    path = tmp_path / "t.safetensors"
    for content in (b"nothing", save({"x": np.ones(1)})):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^cannot be read: "):
            read_tensors(path, hashlib.sha256(content).hexdigest())


def test_damage_is_seen_by_who_read_before(tmp_path):
    lineage = filled(tmp_path)
    with (tmp_path / "lineage.jsonl").open("ab") as file:
        file.write(b"nothing\n")
    for _ in range(2):
        with pytest.raises(LineageDamaged, match="line 10 is not JSON"):
            lineage.records()


def test_a_forger_without_the_key_is_found(tmp_path):
    """He writes hashes that fit; without a key they are believed, with it they are not."""
    lineage = filled(tmp_path, KEY)
    last = lineage.version(4).record
    path = tmp_path / "lineage.jsonl"
    held = path.read_bytes().splitlines(keepends=True)
    before = json.loads(held[-2])["sha256"]
    signature = json.loads(held[-1])["hmac"]
    for forged in (encode_line(replace(last, round=99), before, None)[0], encode_line(last, before, b"another")[0]):
        path.write_bytes(b"".join([*held[:-1], forged]))
        assert Lineage(tmp_path).next_version == 5
        with pytest.raises(LineageDamaged, match=r"line 9 (is not signed|has a signature that the key)"):
            Lineage(tmp_path, KEY)
    path.write_bytes(b"".join(held))
    assert Lineage(tmp_path, KEY).records() == lineage.records()
    flip(path, path.read_bytes().index(signature.encode()))
    with pytest.raises(LineageDamaged, match="line 9 does not match its hash"):
        Lineage(tmp_path)


def test_a_signed_lineage_needs_its_key_to_go_on(tmp_path):
    filled(tmp_path, KEY)
    with pytest.raises(LineageDamaged, match=r"line 1 has a signature that the key \(meta.hmac\) does not make"):
        Lineage(tmp_path, b"another")
    without = Lineage(tmp_path)
    assert (without.signed, without.current) == (True, 3)
    assert equal(without.tensors(3), tensors(3))
    with pytest.raises(LineageError, match=r"is signed, and no key is set: name the one that signs it \(meta.hmac\)"):
        without.decide(4, Decision("rejected", ""))
    assert Lineage(tmp_path, KEY).decide(4, Decision("rejected", "")).stage == "rejected"


def test_an_unsigned_lineage_is_refused_with_a_key(tmp_path):
    filled(tmp_path)
    with pytest.raises(LineageDamaged, match="line 1 is not signed, and a key is set"):
        Lineage(tmp_path, KEY)


def test_every_changed_byte_of_the_tensors_is_found(tmp_path):
    lineage = filled(tmp_path)
    path = tmp_path / "version-00000003.safetensors"
    sound = path.read_bytes()
    for at in range(len(sound)):
        flip(path, at)
        with pytest.raises(LineageDamaged, match=r"version 3 is refused: .* does not match the hash in its record"):
            lineage.tensors(3)
        path.write_bytes(sound)
    assert equal(lineage.tensors(3), tensors(3))


def test_tensors_of_another_version_or_none_are_refused(tmp_path):
    lineage = filled(tmp_path)
    path = tmp_path / "version-00000003.safetensors"
    path.write_bytes((tmp_path / "version-00000001.safetensors").read_bytes())
    with pytest.raises(LineageDamaged, match="does not match the hash"):
        lineage.tensors(3)
    path.unlink()
    with pytest.raises(
        LineageDamaged, match=r"^version 3 is refused: .*00000003.safetensors is missing, and it was not"
    ):
        lineage.tensors(3)


def test_a_record_whose_hashes_disagree_is_refused(tmp_path):
    """A forger changed the file's hash together with the file; the serving hash is another."""
    lineage = filled(tmp_path)
    path = tmp_path / "lineage.jsonl"
    held = path.read_bytes().splitlines(keepends=True)
    foreign = replace(lineage.version(4).record, file_sha256=lineage.version(1).record.file_sha256)
    path.write_bytes(b"".join([*held[:-1], encode_line(foreign, json.loads(held[-2])["sha256"], None)[0]]))
    (tmp_path / "version-00000004.safetensors").write_bytes((tmp_path / "version-00000001.safetensors").read_bytes())
    with pytest.raises(LineageDamaged, match="does not match the serving hash in its record"):
        Lineage(tmp_path).tensors(4)


def test_a_file_that_lies_there_anew_is_read_anew(tmp_path):
    lineage = filled(tmp_path / "meta")
    filled(tmp_path / "other").decide(4, Decision("promoted", "there"))
    os.replace(tmp_path / "other" / "lineage.jsonl", tmp_path / "meta" / "lineage.jsonl")
    assert lineage.current == 4
    (tmp_path / "meta" / "lineage.jsonl").unlink()
    assert lineage.records() == ()


# --- crashes --------------------------------------------------------------------------------------------------


def test_a_torn_last_line_never_counted_and_the_next_write_takes_it_off(tmp_path):
    lineage = filled(tmp_path)
    path = tmp_path / "lineage.jsonl"
    whole = path.read_bytes()
    lineage.decide(4, Decision("promoted", "it stands"))
    line = path.read_bytes()[len(whole) :]
    for kept in (1, len(line) // 2, len(line) - 1):
        path.write_bytes(whole + line[:kept])
        read = Lineage(tmp_path, now_ms=lambda: 1_010)
        assert (read.torn, read.current) == (True, 3)
        read.decide(4, Decision("promoted", "it stands"))
        assert (read.torn, read.current) == (False, 4)
        assert Lineage(tmp_path).records() == read.records()


def test_an_end_of_line_that_became_something_else_is_damage(tmp_path):
    filled(tmp_path)
    flip(tmp_path / "lineage.jsonl", -1)
    with pytest.raises(LineageDamaged, match="line 9 does not end where it should"):
        Lineage(tmp_path)


CHILD = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from state.lineage import journal
from tests.unit.test_lineage import ITEMS, Lineage, candidate, tensors
lineage = Lineage(Path(sys.argv[1]))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
write = os.pwrite
def torn(handle, packed, at):
    write(handle, packed[: len(packed) // 2], at)
    die()
if sys.argv[2] == "before the record":
    lineage._journal.append = lambda entries: die()
elif sys.argv[2] == "within the record":
    os.pwrite = torn
else:
    os.fsync = lambda handle: die()
lineage.add(candidate(5, 3), tensors(55), ITEMS)
"""


@pytest.mark.parametrize("moment", ["before the record", "within the record", "within the tensors"])
def test_a_killed_writer_leaves_no_gap(tmp_path, moment):
    filled(tmp_path)
    killed = subprocess.run([sys.executable, "-c", CHILD, tmp_path, moment, ROOT], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "version-00000005.safetensors").exists() == (moment != "within the tensors")
    lineage = Lineage(tmp_path, wait_s=0)
    assert (lineage.next_version, lineage.current, lineage.torn) == (5, 3, moment == "within the record")
    lineage.add(candidate(5, 3), tensors(5), ITEMS)
    assert equal(Lineage(tmp_path).tensors(5), tensors(5))
    assert files(tmp_path) == [0, 1, 2, 3, 4, 5]


def test_a_full_disk_leaves_the_lineage_as_it_was(tmp_path, monkeypatch):
    lineage = filled(tmp_path)
    before = (tmp_path / "lineage.jsonl").read_bytes()
    pwrite = os.pwrite

    def full(handle: int, packed: bytes, offset: int) -> int:
        if len(packed) > 20:
            return pwrite(handle, packed[:20], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            lineage.decide(4, Decision("promoted", "it stands"))
    assert (tmp_path / "lineage.jsonl").read_bytes() == before
    assert lineage.decide(4, Decision("promoted", "it stands")).stage == "promoted"


def test_tensors_that_cannot_be_written_leave_no_version(tmp_path):
    lineage = filled(tmp_path)
    (tmp_path / "version-00000005.safetensors.partial").mkdir()
    with pytest.raises(LineageError, match=r"00000005.safetensors cannot be written: .*check its rights and the space"):
        lineage.add(candidate(5, 3), tensors(5), ITEMS)
    (tmp_path / "version-00000005.safetensors.partial").rmdir()
    assert lineage.add(candidate(5, 3), tensors(5), ITEMS).number == 5


# --- several writers ------------------------------------------------------------------------------------------


def test_a_second_writer_waits_or_says_who_is_there(tmp_path):
    filled(tmp_path)
    lock = os.open(tmp_path / "lineage.lock", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        waiting = Lineage(tmp_path, wait_s=0.05)
        assert waiting.current == 3  # who reads needs no lock
        with pytest.raises(LineageLocked, match=r"another process writes to the lineage .* \(it holds lineage.lock\)"):
            waiting.decide(4, Decision("rejected", ""))
    finally:
        os.close(lock)
    assert waiting.decide(4, Decision("rejected", "")).stage == "rejected"


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from pathlib import Path
from tests.unit.test_lineage import ITEMS, Lineage, WrongStep, candidate, tensors
from dataclasses import replace
lineage, added = Lineage(Path(sys.argv[1]), wait_s=60), 0
print("ready", flush=True)
sys.stdin.readline()
while added < 8:
    version = lineage.next_version
    try:
        lineage.add(replace(candidate(version, 0), round=int(sys.argv[2])), tensors(version), ITEMS)
        added += 1
    except WrongStep:
        pass
"""


def test_two_writers_number_their_versions_without_gaps(tmp_path):
    Lineage(tmp_path).add(initial(), tensors(0), ITEMS)
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with (
        subprocess.Popen([*command, "1", str(ROOT)], **pipes) as one,
        subprocess.Popen([*command, "2", str(ROOT)], **pipes) as two,
    ):
        for writer in (one, two):
            assert writer.stdout.readline() == "ready\n"
        for writer in (one, two):
            writer.stdin.write("go\n")
            writer.stdin.flush()
        assert (one.wait(60), two.wait(60)) == (0, 0)
    read = Lineage(tmp_path)
    assert [version.number for version in read.records()] == list(range(17))
    assert sorted(version.record.round for version in read.records()) == [0] + [1] * 8 + [2] * 8
    assert all(equal(read.tensors(number), tensors(number)) for number in range(17))


# --- how far apart --------------------------------------------------------------------------------------------


def test_the_difference_is_by_tensor_and_by_item():
    before = Parameters(
        {
            "parameters.item_embedding": np.array([[3, 4], [0, 0], [1, 0]], np.float32),
            "parameters.base": np.array([2.0]),
            "parameters.gone": np.ones((2, 1)),
            "moments.first.base": np.ones(1),
        },
        ("a", "b", "c"),
    )
    after = Parameters(
        {
            "parameters.item_embedding": np.array([[1, 0], [3, 9], [0, 2], [9, 9]], np.float32),
            "parameters.base": np.array([2.5]),
            "parameters.wide": np.ones(()),
        },
        ("c", "a", "b", "new"),
    )
    found = difference(before, after)
    assert found.tensors == (
        TensorChange("parameters.base", (1,), (1,), 0.5, 0.25),
        TensorChange("parameters.gone", (2, 1), None, None, None),
        TensorChange("parameters.item_embedding", (3, 2), (4, 2), float(np.sqrt(29)), float(np.sqrt(29) / np.sqrt(26))),
        TensorChange("parameters.wide", None, (), None, None),
    )
    assert found.items == (ItemChange("a", 5.0, 1.0), ItemChange("b", 2.0, None))
    assert (found.new_items, found.gone_items) == (1, 0)
    assert difference(before, after, 1).items == (ItemChange("a", 5.0, 1.0),)
    back = difference(after, before)
    assert (back.new_items, back.gone_items) == (0, 1)


def test_nothing_moves_between_a_version_and_itself(tmp_path):
    held = filled(tmp_path).tensors(1)
    found = difference(held, held)
    assert [change.moved for change in found.tensors] == [0.0, 0.0]
    assert found.items == ()


def test_item_tables_are_those_of_the_model():
    from learner.recommender import ITEM_TABLES as OF_MODEL  # not above: it loads torch, also in the processes above

    assert {f"parameters.{name}" for name in OF_MODEL} == ITEM_TABLES
