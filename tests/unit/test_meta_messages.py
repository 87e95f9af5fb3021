"""Contributions as bytes: they come back as they were, in any interleaving, and what is damaged is refused by name."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from learner.drift import DriftAlarm
from learner.forgetting import Scores
from learner.meta_update import GradientSum
from state.lineage import Span
from streams.meta.contributor import Findings, Rises
from streams.meta.messages import MAX_BYTES, Assembler, Contribution, MessageRefused, cut, decode, key_of, records
from streams.meta.messages.chunks import PIECE, joined, read_chunk
from streams.meta.messages.contribution import encode
from streams.meta.messages.merging import merged, widened
from streams.meta.messages.packing import Array, pack, pack_texts, unpack, unpack_texts
from tests.unit.test_meta_aggregator import scores

GOLDEN = Path(__file__).parent.parent / "golden" / "contribution-v1.bin"
REFUSED: list[MessageRefused] = []


def contribution(partition: int = 2, *, items: int = 3, scored: bool = True, seed: int = 0) -> Contribution:
    """With everything that one may have."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    names = tuple(f"item {k} é" for k in range(items))
    summed = GradientSum(
        7, 5, 60, 41.25, {"log_weight": normal(), "head.initialization": normal(4)}, names,
        {"item_embedding": normal(items, 6), "item_bias": normal(items)}, 1 + np.arange(items),
        {names[0]: 2, "new": 1}, {"new": ("x|y", None), "strange": None},
    )  # fmt: skip
    findings = (
        Findings(6, None, Rises(np.array([0.5, -0.25]), np.array([3, 1]))),
        Findings(7, scores(7, partition, 0.1) if scored else None, Rises.none()),
    )
    alarm = DriftAlarm("warm", "adwin", 900, 0.5, 0.625)
    current, base = (scores(5, partition), scores(0, partition)) if scored else (None, None)
    return Contribution(31, 7, Span(partition, 10, 69), 60, summed, findings, current, base, (alarm,))


def assert_same(found: object, expected: object) -> None:
    """Field by field, arrays by their bits."""
    assert type(found) is type(expected)
    if isinstance(expected, Scores):
        found, expected = found.as_arrays(), expected.as_arrays()  # type: ignore[attr-defined]
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray)
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)  # type: ignore[call-overload]
        for key in expected:
            assert_same(found[key], expected[key])  # type: ignore[index]
    elif isinstance(expected, tuple) and expected and not isinstance(expected[0], str):
        assert len(found) == len(expected)  # type: ignore[arg-type]
        for one, other in zip(found, expected, strict=True):  # type: ignore[call-overload]
            assert_same(one, other)
    elif hasattr(expected, "__dataclass_fields__"):
        for each in fields(expected):  # type: ignore[arg-type]
            assert_same(getattr(found, each.name), getattr(expected, each.name))
    else:
        assert found == expected


def assembler(max_bytes: int = 1 << 24) -> Assembler:
    REFUSED.clear()
    return Assembler(REFUSED.append, max_bytes)


def reasons() -> list[str]:
    return [error.reason for error in REFUSED]


# --- the bytes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scored", [True, False])
def test_a_contribution_comes_back_as_it_was(scored):
    made = contribution(scored=scored)
    assert_same(decode(encode(made), b"2"), made)
    bare = replace(made, gradient=None, findings=(), current=None, base=None, drift=())
    assert_same(decode(encode(bare), b"2"), bare)


def test_one_that_has_met_nothing_comes_back_too():
    made = contribution(items=1)
    assert made.gradient is not None
    empty = replace(made.gradient, item_ids=(), item_events=np.zeros(0, np.int64), seen={}, new_items={}, tables={})
    assert_same(decode(encode(replace(made, gradient=empty)), b"2"), replace(made, gradient=empty))


def test_the_bytes_of_version_1_are_still_read():
    packed = GOLDEN.read_bytes()
    assert_same(decode(joined([packed], "the golden file"), b"2"), contribution())
    unscored = [record.value for record in records(contribution(scored=False))]
    assert unscored == [(GOLDEN.parent / "contribution-unscored-v1.bin").read_bytes()]  # nothing deflated: same bytes


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"span": Span(-2, 1, 2)}, "60 events in Span"),
        ({"span": Span(2, 5, 4)}, "60 events in Span"),
        ({"events": 0}, "0 events in Span"),
        ({"findings": (Findings(6, None, Rises.none()), Findings(6, None, Rises.none()))}, "one of each"),
        ({"findings": (Findings(6, scores(7, 2), Rises.none()),)}, "of version 7, not 6"),
        ({"base": scores(1, 2)}, "base is of version 1, not 0"),
        ({"findings": (Findings(6, None, Rises(np.zeros(2), np.ones(3, np.int64))),)}, "rises of shape"),
        ({"findings": (Findings(6, None, Rises(np.zeros(1), np.zeros(1, np.int64))),)}, "rises of shape"),
        ({"current": Scores(5, (scores(5, 2).cohorts[0], scores(6, 2).cohorts[0]))}, "of version 6"),
        ({"current": Scores(5, scores(5, 2).cohorts * 2)}, "a cohort twice"),
    ],
)
def test_contents_that_cannot_be_are_refused(change, match):
    with pytest.raises(MessageRefused, match=match) as refused:
        decode(encode(replace(contribution(), **change)), b"2")
    assert refused.value.reason == "shape"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"item_ids": ("a", "a", "b")}, "twice in items"),
        ({"seen": {"a": 0}}, "without an event"),
        ({"item_events": np.ones(3, np.int32)}, "item_events is int32"),
        ({"dense": {"log_weight": np.zeros((), np.float64)}}, "log_weight is float64"),
        ({"new_items": {"new": (1,)}}, "are no texts"),
    ],
)
def test_a_gradient_that_cannot_be_is_refused(change, match):
    made = contribution()
    assert made.gradient is not None
    with pytest.raises(MessageRefused, match=match) as refused:
        decode(encode(replace(made, gradient=replace(made.gradient, **change))), b"2")
    assert refused.value.reason == "shape"


def test_a_contribution_under_another_partitions_key_is_refused():
    with pytest.raises(MessageRefused, match="says that it is of partition 2"):
        decode(encode(contribution()), key_of(3))


@pytest.mark.parametrize("place", [0, 1, 4, 9, 30, 400, -1])
def test_a_flipped_bit_is_found(place):
    block = bytearray(encode(contribution()))
    block[place] ^= 4
    with pytest.raises(MessageRefused) as refused:
        decode(bytes(block), b"2")
    assert refused.value.reason in ("damaged", "format")
    value = bytearray(cut(bytes(block))[0])
    value[place] ^= 4
    with pytest.raises(MessageRefused) as refused:
        read_chunk(bytes(value), "it")
    assert refused.value.reason in ("damaged", "format")


def test_another_kind_another_format_and_a_few_bytes_are_refused():
    block = pack("contribution", {}, {})
    for given, reason in ((b"", "damaged"), (block[:9], "damaged"), (b"\x02" + block[1:], "format")):
        with pytest.raises(MessageRefused) as refused:
            unpack(given, "contribution", "it")
        assert refused.value.reason == reason
    with pytest.raises(MessageRefused, match="it is a contribution, not a row"):
        unpack(block, "row", "it")


def test_a_block_that_would_inflate_without_end_is_refused():
    with pytest.raises(MessageRefused, match="more than") as refused:
        unpack(pack("bomb", {}, {"a": np.zeros(1 << 26), "b": np.zeros(1)}, {"a"}), "bomb", "it")
    assert refused.value.reason == "size"


@pytest.mark.parametrize(
    ("dtype", "shape"), [("f4", ()), ("f8", (0, 3)), ("i8", (2, 2)), ("u4", (5,)), ("u1", (7,)), ("?", (3,))]
)
@pytest.mark.parametrize("deflated", [True, False])
def test_arrays_come_back_whatever_their_shape(dtype, shape, deflated):
    array: Array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    found = unpack(pack("k", {"a": [1, None]}, {"x": array, "y": array}, {"x"} if deflated else ()), "k", "it")
    assert found.content == {"a": [1, None]}
    for name in ("x", "y"):
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == shape
        np.testing.assert_array_equal(found.arrays[name], array)


def test_ids_of_any_text_come_back():
    texts = ["", "a", "é\0b", "日本", "a" * 1000]
    assert unpack_texts(pack_texts(texts, "ids"), "ids") == tuple(texts)
    with pytest.raises(ValueError, match="twice"):
        unpack_texts(pack_texts(["a", "a"], "ids"), "ids")
    with pytest.raises(ValueError, match="do not end"):
        unpack_texts({**pack_texts(["ab"], "ids"), "ids.ends": np.array([1])}, "ids")


# --- put together ---------------------------------------------------------------------------------------------


def test_no_record_is_larger_than_a_broker_takes():
    block = np.random.default_rng(0).bytes(2 * PIECE + 1)
    values = cut(block)
    assert [len(value) for value in values] == [MAX_BYTES, MAX_BYTES, MAX_BYTES - PIECE + 1]
    assert joined(values, "it") == block
    assert [len(value) for value in cut(b"")] == [MAX_BYTES - PIECE]
    with pytest.raises(MessageRefused, match="not all there"):
        joined(values[:2], "it")


def blocks(*sizes: int) -> list[bytes]:
    return [np.random.default_rng(k).bytes(size) for k, size in enumerate(sizes)]


def test_blocks_of_several_senders_interleave():
    a, b = blocks(2 * PIECE + 5, 3 * PIECE)
    (a1, a2, a3), (b1, b2, b3) = cut(a), cut(b)
    together = assembler()
    sent = [(b"a", a1), (b"b", b1), (b"b", b2), (b"a", a2), (b"a", a3), (b"b", b3)]
    found = [together.add(k, *record) for k, record in enumerate(sent)]
    assert found == [None, None, None, None, a, b]
    assert (together.size, together.first_offset, reasons()) == (0, None, [])


def test_pieces_that_come_again_do_no_harm():
    (a,) = blocks(2 * PIECE)
    a1, a2 = cut(a)
    together = assembler()
    assert [together.add(k, b"a", value) for k, value in enumerate([a1, a1, a1, a2])] == [None, None, None, a]
    assert together.add(4, b"a", a2) is None  # of a block that is done: its start is missing
    assert reasons() == ["incomplete"]


def test_a_missing_piece_is_told_once_and_the_next_block_is_whole():
    a, b = blocks(4 * PIECE, PIECE)
    a1, _, a3, a4 = cut(a)
    together = assembler()
    for k, value in enumerate([a1, a3, a4]):
        assert together.add(k, b"a", value) is None
    assert reasons() == ["incomplete"]
    assert together.size == 0
    assert together.add(3, b"a", *cut(b)) == b
    assert reasons() == ["incomplete"]


def test_a_block_that_is_broken_off_gives_way_to_the_next():
    a, b = blocks(2 * PIECE, 2 * PIECE)
    a1, a2 = cut(a)
    b1, b2 = cut(b)
    together = assembler()
    for k, value in enumerate([a1, b1]):
        assert together.add(k, b"a", value) is None
    assert together.first_offset == 1
    assert together.add(2, b"a", a2) is None  # of another that sends as the same: it does no harm either
    assert together.add(3, b"a", b2) == b
    assert reasons() == ["incomplete"]


def test_what_is_damaged_is_refused_and_its_neighbours_are_not():
    a, b = blocks(2 * PIECE, 2 * PIECE)
    (a1, a2), (b1, b2) = cut(a), cut(b)
    together = assembler()
    spoiled = a2[:100] + bytes([a2[100] ^ 1]) + a2[101:]
    sent = [(b"a", a1), (b"b", b1), (b"a", spoiled), (b"b", b2), (b"a", a2)]
    assert [together.add(k, *record) for k, record in enumerate(sent)] == [None, None, None, b, a]
    assert reasons() == ["damaged"]


def test_memory_is_bounded_and_the_oldest_goes():
    together = assembler(max_bytes=5 * PIECE)
    all_blocks = blocks(*[4 * PIECE] * 3)
    for k, block in enumerate(all_blocks):
        for j, value in enumerate(cut(block)[:2]):
            assert together.add(2 * k + j, b"%d" % k, value) is None
    assert together.size <= 5 * PIECE
    assert reasons() == ["incomplete"]
    assert "sender b'0'" in str(REFUSED[0])
    assert together.first_offset == 2
    found = [together.add(10 + j, b"2", value) for j, value in enumerate(cut(all_blocks[2])[2:])]
    assert found == [None, all_blocks[2]]


def test_a_head_that_lies_about_its_block_is_refused():
    value = bytearray(cut(b"x" * 100)[0])
    value[28] = 2
    with pytest.raises(MessageRefused):
        read_chunk(bytes(value), "it")


# --- together -------------------------------------------------------------------------------------------------


def test_contributions_are_merged_in_the_order_of_their_partitions():
    one, other = contribution(2, seed=1), contribution(0, seed=2)
    together = merged([one, other])
    assert [span.partition for span in together.spans] == [0, 2]
    assert together.events == 120
    assert together.gradients == (other.gradient, one.gradient)
    assert [finding.version for finding in together.findings] == [6, 7]
    assert together.findings[0].stream.events.tolist() == [3, 1, 3, 1]
    assert together.findings[1].scores is not None
    assert len(together.findings[1].scores.cohorts[0].user) == 8
    assert together.current is not None
    assert together.current.cohorts[0].counts.sum() == 40


def test_a_reference_takes_in_the_users_whom_it_lacks():
    held, now = scores(3, 0), scores(5, 0, 0.1) + scores(5, 1)
    wide = widened(held, now)
    cohort = wide["slice 0 / warm"]
    assert cohort.version == 3
    assert len(cohort.user) == 8
    assert (np.diff(cohort.user.astype(np.int64)) > 0).all()
    both = np.isin(cohort.user, held.cohorts[0].user)
    np.testing.assert_array_equal(cohort.loss[:, both], held.cohorts[0].loss)
    np.testing.assert_array_equal(cohort.loss[:, ~both], scores(5, 1).cohorts[0].loss)
    assert widened(wide, now).cohorts == wide.cohorts
    new = widened(held, scores(5, 0, names=("warm", "heavy")))
    assert [c.version for c in new.cohorts] == [3, 5]
    broken = scores(5, 1)
    broken.cohorts[0].loss[0, 0] = np.nan
    assert widened(held, broken).cohorts == held.cohorts
