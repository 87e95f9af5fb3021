"""Whatever is told of versions comes back, and whatever changed since shows."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from state.lineage import Decision, Lineage, LineageDamaged, Record, WrongStep
from state.lineage.record import Decided, Span, decode_line, encode_line, plain
from state.lineage.tensors import Parameters, read_tensors, serving_sha256, write_tensors

DTYPES = (
    "bool",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "float32",
    "float64",
)
NAMES = st.builds(
    "".join, st.tuples(st.sampled_from(("parameters.", "moments.", "counts.")), st.text("abé.", max_size=4))
)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hn.arrays(dtype, hn.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
)
TENSORS = st.dictionaries(NAMES, ARRAYS, max_size=5)
IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), max_size=6)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
VALUES = st.dictionaries(st.text(), JSON, max_size=3)


@given(TENSORS, IDS)
@settings(max_examples=60)
def test_tensors_come_back_bit_for_bit(tensors, ids):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "t.safetensors"
        found = read_tensors(path, write_tensors(path, Parameters(tensors, tuple(ids))))
    assert found.item_ids == tuple(ids)
    assert found.tensors.keys() == tensors.keys()
    for name, wanted in tensors.items():
        held = found.tensors[name]
        assert (held.dtype, held.shape, held.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
    assert serving_sha256(found.tensors, found.item_ids) == serving_sha256(tensors, ids)


@given(TENSORS, IDS, st.data())
def test_one_changed_bit_changes_the_serving_hash_where_it_serves(tensors, ids, data):
    filled = {name: tensor for name, tensor in tensors.items() if tensor.nbytes}
    if not filled:
        return
    name = data.draw(st.sampled_from(sorted(filled)))
    packed = bytearray(filled[name].tobytes())
    packed[data.draw(st.integers(0, len(packed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    changed = {**tensors, name: np.frombuffer(bytes(packed), filled[name].dtype).reshape(filled[name].shape)}
    same = serving_sha256(changed, ids) == serving_sha256(tensors, ids)
    assert same == name.startswith(("moments.", "counts."))


@given(VALUES, VALUES, VALUES, st.text(), st.none() | st.binary(min_size=1))
def test_lines_come_back(chosen, metrics, evidence, reason, key):
    decision = Decision("candidate", reason, plain(evidence), 5)
    record = Record(3, 2, "m", 4, decision, (Span(0, 1, 2),), plain(chosen), plain(metrics), (), 6, "a", "b")
    for entry in (record, Decided(3, decision)):
        line, sha256 = encode_line(entry, "0" * 64, key)
        assert line.count(b"\n") == 1
        assert decode_line(line[:-1], "0" * 64, key) == (entry, sha256, key is not None)


def told(directory: Path, key: bytes | None = None) -> Lineage:
    lineage = Lineage(directory, key, now_ms=lambda: 7)
    lineage.add(Record(0, None, "m", 0, Decision("initial", "")), {"parameters.a": np.zeros(2)}, ("a",))
    lineage.add(Record(1, 0, "m", 1, Decision("candidate", "é")), {"parameters.a": np.ones(2)}, ("a",))
    lineage.decide(1, Decision("promoted", "it stands"))
    return lineage


@cache
def journal(key: bytes | None) -> bytes:
    """Of ``told``."""
    with tempfile.TemporaryDirectory() as name:
        told(Path(name), key)
        return (Path(name) / "lineage.jsonl").read_bytes()


@given(st.data(), st.integers(0, 7), st.sampled_from((None, b"key")))
@settings(max_examples=400)
def test_one_changed_bit_of_the_journal_shows(data, bit, key):
    content = bytearray(journal(key))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << bit
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "lineage.jsonl").write_bytes(content)
        for with_key in {None, key}:
            with pytest.raises(LineageDamaged):
                Lineage(Path(name), with_key)


@given(st.data())
@settings(max_examples=100)
def test_a_journal_that_was_cut_anywhere_is_its_whole_lines(data):
    whole = journal(None)
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    lines = cut.count(b"\n")
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "lineage.jsonl"
        path.write_bytes(cut)
        lineage = Lineage(Path(name), now_ms=lambda: 7)
        assert lineage.torn == (not cut.endswith(b"\n") and cut != b"")
        stages = [version.stage for version in lineage.records()]
        assert stages == [[], ["initial"], ["initial", "candidate"], ["initial", "promoted"]][lines]
        if lines == 2:
            lineage.decide(1, Decision("promoted", "it stands"))
            assert path.read_bytes() == whole


STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 6), st.sampled_from(("candidate", "promoted", "rejected"))),
    st.tuples(st.just("decide"), st.integers(0, 6), st.sampled_from(("shadow", "canary", "promoted", "rejected"))),
    st.tuples(st.just("promote"), st.integers(0, 6), st.none()),
    st.tuples(st.just("rollback"), st.integers(0, 6), st.none()),
    st.tuples(st.just("prune"), st.integers(1, 3), st.none()),
)


@given(st.lists(STEPS, max_size=12))
@settings(max_examples=60)
def test_whatever_is_asked_for_the_lineage_stays_whole(steps):
    with tempfile.TemporaryDirectory() as name:
        lineage = told(Path(name))
        for step, number, kind in steps:
            number = min(number, lineage.next_version - 1) if step != "prune" else number
            _take(lineage, step, number, kind)
            versions = lineage.records()
            assert [version.number for version in versions] == list(range(len(versions)))
            assert Lineage(Path(name)).records() == versions
            for version in versions:
                if not version.pruned:
                    held = lineage.tensors(version.number)
                    assert serving_sha256(held.tensors, held.item_ids) == version.record.serving_sha256
            current = versions[lineage.current]
            assert current.served
            assert not current.pruned


def _take(lineage: Lineage, step: str, number: int, kind: str | None) -> None:
    version, next_version = lineage.version(min(number, lineage.next_version - 1)), lineage.next_version
    try:
        if step == "add":
            values = {"parameters.a": np.full(2, next_version, np.float64)}
            lineage.add(Record(next_version, number, "m", 0, Decision(kind, "")), values, ("a",))
        elif step == "decide":
            lineage.decide(number, Decision(kind, ""))
        elif step == "prune":
            lineage.prune(number)
        elif version.pruned:
            return
        elif step == "promote":
            lineage.promote(number)
            assert lineage.current == number
        else:
            current = lineage.current
            restored = lineage.rollback(number)
            assert restored.number == lineage.current == next_version
            assert restored.record.serving_sha256 == version.record.serving_sha256
            assert current in restored.record.undone or current in _line_of(lineage, number)
    except WrongStep:
        pass


def _line_of(lineage: Lineage, number: int) -> list[int]:
    """The version and what it came from."""
    parent = lineage.version(number).record.parent
    return [number, *([] if parent is None else _line_of(lineage, parent))]
