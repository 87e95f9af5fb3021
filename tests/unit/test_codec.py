"""The bytes that a store holds: users' rows and progress records, of every version."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import learner.user_state
from configs.settings import StateSettings
from learner.user_state import LAYOUT_VERSION, HeadKind, RowLayout, age_code
from state import codec
from state.codec import UNKNOWN, Progress
from state.exceptions import RowDamaged
from state.memory_store import MemoryUserStore
from streams.processor import Processor
from tests.models import HEADS, random_stream, small_model

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_USERS = [f"u{k}".encode() for k in range(6)]
RING = 4
TYPES = {"u32": "<u4", "u64": "<u8", "i64": "<i8", "f32": "<f4"}
SEALED = ["layout_version", "checksum", "owner"]
"""Fields that ``encode`` sets"""


def golden_layout(kind: HeadKind) -> RowLayout:
    return RowLayout(kind, 5, 4, RING)


def golden_stream():
    return random_stream(60, 6, seed=3)


def streamed_today(kind: HeadKind) -> bytes:
    """The rows of the golden stream, user by user, as today's code stores them."""
    with Processor(small_model(kind), lambda _, layout: MemoryUserStore(layout), StateSettings(ring=RING)) as work:
        work.process(0, golden_stream())
        users, rows = zip(*work.store(0).iterate(), strict=True)
    assert list(users) == GOLDEN_USERS
    return b"".join(row.tobytes() for row in rows)


def golden(version: int, kind: HeadKind) -> list[bytes]:
    """The six rows of a golden file."""
    packed, width = (GOLDEN / f"row-v{version}-{kind}.bin").read_bytes(), golden_layout(kind).row_bytes
    assert len(packed) == 6 * width
    return [packed[k : k + width] for k in range(0, len(packed), width)]


def random_slab(layout: RowLayout, rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, layout.row_bytes), dtype=np.uint8)


def names(count: int) -> list[bytes]:
    return [b"user %d" % k for k in range(count)]


# --- the documented layout ----------------------------------------------------------------------------------------


def test_the_table_of_the_learners_rows_is_their_type():
    layout = RowLayout("full", 3, 4, 5)
    table = re.search(r"\n\n(    0 .*?)\n\nAll is", learner.user_state.__doc__, re.DOTALL)[1]
    header = re.findall(r"^    (\d+) +([ui]\d\d) +(\w+) ", table, re.MULTILINE)
    assert len(header) == 10
    for offset, kind, name in header:
        assert layout.dtype.fields[name][:2] == (np.dtype(TYPES[kind]), int(offset)), name

    at, floats = re.search(r"^    (\d+) +f32 +(.*?) +\(padded to 8 bytes\)$", table, re.MULTILINE).groups()
    widths = {"mean[d]": 3, "covariance[P or d or 0]": 6, "second_mean[e]": 4, "second_covariance[e(e+1)/2]": 10}
    assert re.split(r"  ", floats) == list(widths)
    place = int(at)
    for shown, width in widths.items():
        kind, offset = layout.dtype.fields[shown.split("[")[0]][:2]
        assert (kind, offset) == (np.dtype(("<f4", (width,))), place), shown
        place += 4 * width
    assert re.search(r"^        u64  ring\[R\] ", table, re.MULTILINE)
    ring = layout.dtype.fields["ring"]
    assert ring[:2] == (np.dtype(("<u8", (5,))), -(-place // 8) * 8)
    assert [name for name in layout.dtype.names if name != "padding"] == [
        *(name for _, _, name in header), *(shown.split("[")[0] for shown in widths), "ring",
    ]  # fmt: skip


def test_the_table_of_the_stored_rows_is_the_same():
    layout = RowLayout("full", 3, 4, 5)
    table = re.search(r"\n\n(    0 .*?)\n\n-", codec.__doc__, re.DOTALL)[1]
    header = re.findall(r"(\d+) +([ui]\d\d) +(\w+)", table)
    assert sorted(int(offset) for offset, _, _ in header) == [0, 4, 8, 16, 24, 32, 40, 48, 56, 60]
    for offset, kind, name in header:
        assert layout.dtype.fields[name][:2] == (np.dtype(TYPES[kind]), int(offset)), name
    tail = re.search(r"64  f32  (.*)\n.* u64  ring\[R\]", table)[1]
    assert [*tail.split(), "ring"] == [
        n for n in layout.dtype.names if layout.dtype.fields[n][1] >= 64 and n != "padding"
    ]


def test_the_table_of_a_progress_record_is_its_bytes():
    record = Progress(0x0102, 0x0304, 0x0506, 0x0708, 0x090A, b"clock")
    table = re.search(r"\n\n(    0   u32  version \(2\).*?)\n\nVersion 1", codec.__doc__, re.DOTALL)[1]
    packed, found = record.encode(), {}
    for offset, kind, name in re.findall(r"(\d+) +([ui]\d\d) +(\w+)", table):
        found[name] = int(np.frombuffer(packed, TYPES[kind], 1, int(offset))[0])
    assert found.pop("version") == codec.PROGRESS_VERSION == 2
    assert found.pop("crc32") == zlib.crc32(packed[8:])
    assert found == {
        "offset": 0x0102, "meta_version": 0x0304, "users": 0x0506, "events": 0x0708, "written_at_ms": 0x090A,
    }  # fmt: skip
    assert "48  u32 + bytes  the expiry clock" in table
    assert packed[48:] == struct.pack("<I", 5) + b"clock"


# --- golden files and the way up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HEADS)
def test_todays_rows_are_the_golden_ones(kind, pytestconfig):
    file = GOLDEN / f"row-v{LAYOUT_VERSION}-{kind}.bin"
    if pytestconfig.getoption("--write-golden"):
        file.write_bytes(streamed_today(kind))
    assert streamed_today(kind) == file.read_bytes()


@pytest.mark.parametrize("kind", HEADS)
def test_golden_rows_of_this_version_decode_and_encode_to_the_same_bytes(kind):
    layout, values = golden_layout(kind), golden(LAYOUT_VERSION, kind)
    slab = codec.decode(layout, GOLDEN_USERS, values)
    assert slab.tobytes() == b"".join(values)
    assert codec.encode(layout, GOLDEN_USERS, slab) == values


def test_there_is_a_golden_file_of_every_version_and_head():
    assert {file.name for file in GOLDEN.glob("row-v*.bin")} == {
        f"row-v{version}-{kind}.bin" for version in range(1, LAYOUT_VERSION + 1) for kind in HEADS
    }


@pytest.mark.parametrize("kind", HEADS)
def test_rows_of_version_1_come_up_to_todays_but_for_the_hours_in_their_rings(kind):
    layout, stream = golden_layout(kind), golden_stream()
    came_up = layout.rows(codec.decode(layout, GOLDEN_USERS, golden(1, kind)))
    today = layout.rows(codec.decode(layout, GOLDEN_USERS, golden(2, kind)))
    for name in layout.dtype.names:
        if name not in ("checksum", "ring"):
            assert came_up[name].tobytes() == today[name].tobytes(), name
    age_bits = np.uint64(0x1FFFF)
    np.testing.assert_array_equal(came_up["ring"] & ~age_bits, today["ring"] & ~age_bits)
    for row, user in enumerate(GOLDEN_USERS):
        times = stream.event_time_ms[stream.user == stream.user_ids.index(user.decode())]
        ages = (times - times[0]) // 1000
        for n in range(max(len(ages) - RING, 0), len(ages)):
            seconds, hours = age_code(ages[n : n + 1])[0], age_code(ages[n : n + 1] // 3600 * 3600)[0]
            assert today["ring"][row, n % RING] & age_bits == seconds
            assert came_up["ring"][row, n % RING] & age_bits == hours
    assert (came_up["checksum"] != today["checksum"]).all()


@pytest.mark.parametrize("kind", HEADS)
def test_rows_that_came_up_are_sealed_like_any_other(kind):
    layout = golden_layout(kind)
    slab = codec.decode(layout, GOLDEN_USERS, golden(1, kind))
    assert codec.decode(layout, GOLDEN_USERS, [row.tobytes() for row in slab]).tobytes() == slab.tobytes()


def test_old_and_new_rows_may_stand_side_by_side():
    layout, mixed = golden_layout("full"), golden(2, "full")
    came_up = codec.decode(layout, GOLDEN_USERS, golden(1, "full"))
    mixed[1::2] = golden(1, "full")[1::2]
    rows = codec.decode(layout, GOLDEN_USERS, mixed)
    assert rows[::2].tobytes() == b"".join(golden(2, "full")[::2])
    np.testing.assert_array_equal(rows[1::2], came_up[1::2])


@pytest.mark.parametrize("field", ["checksum", "owner"])
def test_a_row_that_claims_to_be_old_but_has_what_those_had_not_is_damaged(field):
    layout = golden_layout("full")
    slab = np.frombuffer(bytearray(b"".join(golden(1, "full"))), np.uint8).reshape(6, -1)
    layout.rows(slab)[field][4] = 1
    with pytest.raises(RowDamaged, match=r"the row of user 'u4' says that it is of version 1, but has a checksum"):
        codec.decode(layout, GOLDEN_USERS, [row.tobytes() for row in slab])


# --- round trips --------------------------------------------------------------------------------------------------

LAYOUTS = st.builds(
    RowLayout,
    st.sampled_from(HEADS), st.integers(2, 64), st.sampled_from([0, *range(3, 33)]), st.integers(0, 64),
)  # fmt: skip


@settings(max_examples=150)
@given(LAYOUTS, st.lists(st.binary(max_size=12), max_size=6), st.integers(0, 2**32))
def test_rows_of_any_layout_come_back_with_every_bit(layout, users, seed):
    slab = random_slab(layout, len(users), seed)
    before = slab.tobytes()
    values = codec.encode(layout, users, slab)
    assert slab.tobytes() == before
    decoded = codec.decode(layout, users, values)
    found, given_rows = layout.rows(decoded), layout.rows(slab)
    for name in set(layout.dtype.names) - set(SEALED):
        assert found[name].tobytes() == given_rows[name].tobytes(), name
    assert found["layout_version"].tolist() == [LAYOUT_VERSION] * len(users)
    assert found["owner"].tolist() == [zlib.crc32(user) for user in users]
    assert decoded.flags.writeable
    assert codec.encode(layout, users, decoded) == values


@settings(max_examples=60)
@given(LAYOUTS)
def test_a_fingerprint_names_its_layout_and_no_other(layout):
    assert RowLayout.parse(layout.fingerprint) == layout
    assert RowLayout.parse(layout.fingerprint.replace("row-v2", "row-v1")) == layout
    assert RowLayout.parse(layout.fingerprint + " ") is None


def test_a_checksum_is_the_documented_sum():
    layout = RowLayout("full", 3, 3, 2)
    (value,) = codec.encode(layout, [b"a"], random_slab(layout, 1, 5))
    words = list(struct.unpack(f"<{len(value) // 8}Q", value))
    checksum, words[0] = words[0] >> 32, words[0] & 0xFFFFFFFF
    total = sum(factor * word for factor, word in zip(plain_factors(len(words)), words, strict=True))
    assert checksum == total % 2**64 >> 32


def test_a_thousand_rows_are_decoded_and_encoded_as_arrays():
    layout, users = RowLayout("full", 16, 8, 32), names(1000)
    slab = random_slab(layout, 1000, 1)
    values = codec.encode(layout, users, slab)
    decoded = codec.decode(layout, users, values)
    assert codec.encode(layout, users, decoded) == values
    assert layout.rows(decoded)["mean"].shape == (1000, 16)
    assert layout.rows(decoded)["mean"].tobytes() == layout.rows(slab)["mean"].tobytes()


def test_no_rows_are_no_bytes():
    layout = RowLayout("full", 16, 8, 32)
    assert codec.encode(layout, [], np.zeros((0, layout.row_bytes), np.uint8)) == []
    assert codec.decode(layout, [], []).shape == (0, layout.row_bytes)


# --- damage -------------------------------------------------------------------------------------------------------


def plain_factors(count: int) -> list[int]:
    """splitmix64 seeded with 0, in Python's integers, made odd."""
    mask, found = 2**64 - 1, []
    for k in range(1, count + 1):
        word = k * 0x9E3779B97F4A7C15 & mask
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        found.append((word ^ word >> 31) | 1)
    return found


def test_no_flipped_bit_can_leave_the_checksum_as_it_was():
    """A flip of bit b in word k moves the sum by ±c_k·2^b; its upper half stays only if that is less than 2^32."""
    for factor in plain_factors(3000):
        for bit in range(64):
            moved = (factor << bit) % 2**64
            assert moved >> 32, (factor, bit)
            assert (2**64 - moved) >> 32, (factor, bit)


@pytest.mark.parametrize("layout", [RowLayout("gradient", 2, 0, 0), RowLayout("full", 16, 8, 32)], ids=["small", "d16"])
def test_every_flipped_bit_of_a_row_is_found(layout):
    (value,) = codec.encode(layout, [b"ann"], random_slab(layout, 1, 2))
    flipped = bytearray(value)
    for bit in range(8 * len(value)):
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RowDamaged):
            codec.decode(layout, [b"ann"], [bytes(flipped)])
        flipped[bit // 8] ^= 1 << bit % 8
    assert codec.decode(layout, [b"ann"], [bytes(flipped)]).tobytes() == value


@settings(max_examples=200)
@given(st.data())
def test_other_damage_is_found_too(data):
    layout = RowLayout("diagonal", 3, 0, 2)
    (value,) = codec.encode(layout, [b"ann"], random_slab(layout, 1, 3))
    start = data.draw(st.integers(0, len(value) - 1))
    patch = data.draw(st.binary(min_size=1, max_size=len(value) - start))
    damaged = value[:start] + patch + value[start + len(patch) :]
    if damaged == value:
        assert codec.decode(layout, [b"ann"], [damaged]).tobytes() == value
        return
    with pytest.raises(RowDamaged):
        codec.decode(layout, [b"ann"], [damaged])


def test_two_rows_that_changed_places_are_found():
    layout, values = golden_layout("full"), golden(2, "full")
    values[1], values[2] = values[2], values[1]
    with pytest.raises(RowDamaged, match="the row of user 'u1' is another user's row: restore a snapshot"):
        codec.decode(layout, GOLDEN_USERS, values)


def test_words_that_changed_places_inside_a_row_are_found():
    layout, values = golden_layout("full"), golden(2, "full")
    values[3] = values[3][:64] + values[3][72:80] + values[3][64:72] + values[3][80:]
    with pytest.raises(RowDamaged, match="the row of user 'u3' fails its checksum"):
        codec.decode(layout, GOLDEN_USERS, values)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 231, 233, 240, 464])
def test_a_row_of_another_length_is_refused_by_its_user(length):
    layout, values = golden_layout("full"), golden(2, "full")
    values[2] = (values[2] * 3)[:length]
    with pytest.raises(
        RowDamaged, match=rf"^the row of user 'u2' has {length} bytes where row-v2 head=full .* has 232:"
    ):
        codec.decode(layout, GOLDEN_USERS, values)


def test_two_wrong_lengths_that_add_up_are_refused():
    layout, values = golden_layout("full"), golden(2, "full")
    values[0], values[1] = values[0] + values[1][:8], values[1][8:]
    with pytest.raises(RowDamaged, match="the row of user 'u0' has 240 bytes"):
        codec.decode(layout, GOLDEN_USERS, values)


def test_a_row_of_another_layout_is_refused_by_its_length():
    gradient, diagonal = RowLayout("gradient", 4, 0, 1), RowLayout("diagonal", 4, 0, 1)
    values = codec.encode(gradient, [b"a"], random_slab(gradient, 1, 0))
    with pytest.raises(RowDamaged, match="has 88 bytes where row-v2 head=diagonal d=4 second=0 ring=1 has 104"):
        codec.decode(diagonal, [b"a"], values)


@pytest.mark.parametrize("version", [0, 3, 2**32 - 1])
def test_a_row_of_a_version_without_a_way_up_is_refused(version):
    layout = golden_layout("full")
    slab = codec.decode(layout, GOLDEN_USERS, golden(2, "full"))
    layout.rows(slab)["layout_version"][5] = version
    layout.rows(slab)["checksum"] = codec.checksums(slab)
    with pytest.raises(RowDamaged, match=f"user 'u5' is of layout version {version}, this program reads up to 2"):
        codec.decode(layout, GOLDEN_USERS, [row.tobytes() for row in slab])


@pytest.mark.parametrize(
    ("user", "shown"),
    [
        (b"ann", "'ann'"),
        (b"", "''"),
        (b"a\nb\0\x1b[2J", r"'a\nb\x00\x1b[2J'"),
        ("\u202eabc😀".encode(), r"'\u202eabc\U0001f600'"),
        (b"\xff", r"'\\xff'"),
        (b"x" * 65_536, "'" + "x" * 59 + "… (65,536 bytes)"),
    ],
)
def test_damage_names_its_user_in_one_plain_line(user, shown):
    layout = RowLayout("gradient", 2, 0, 0)
    with pytest.raises(RowDamaged) as refused:
        codec.decode(layout, [user], [b"short"])
    assert refused.value.user == user
    message = str(refused.value.at("state/partition-0"))
    assert message == (
        f"state/partition-0: the row of user {shown} has 5 bytes where row-v2 head=gradient d=2 second=0 ring=0 "
        "has 72: restore a snapshot or the changelog"
    )
    assert message.isprintable()


# --- progress -----------------------------------------------------------------------------------------------------

PROGRESS = Progress(41, 7, 1_000, 5_000, 1_700_000_000_123, b"the clock")
int64 = st.integers(-(2**63), 2**63 - 1)


@given(st.builds(Progress, int64, st.integers(0, 2**64 - 1), int64, int64, int64, st.binary(max_size=50)))
def test_progress_comes_back(progress):
    assert Progress.decode(progress.encode()) == progress


def test_the_golden_progress_record_of_this_version():
    assert PROGRESS.encode().hex() == (
        "02000000" "13548f35" "2900000000000000" "0700000000000000" "e803000000000000" "8813000000000000"
        "7b68e5cf8b010000" "09000000" "74686520636c6f636b"
    )  # fmt: skip


def test_progress_of_version_1_has_offset_and_model_alone():
    packed = bytes.fromhex("2900000000000000" "0700000000000000")  # fmt: skip
    assert Progress.decode(packed) == Progress(41, 7, UNKNOWN, UNKNOWN, 0, b"")


def test_every_flipped_bit_of_a_progress_record_is_found():
    packed = PROGRESS.encode()
    for bit in range(8 * len(packed)):
        flipped = bytearray(packed)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match="the progress record"):
            Progress.decode(bytes(flipped))


def test_a_progress_record_of_another_length_is_refused():
    packed = PROGRESS.encode()
    for length in set(range(len(packed))) - {16}:  # 16 bytes are a record of version 1
        with pytest.raises(ValueError, match="the progress record"):
            Progress.decode(packed[:length])
    with pytest.raises(ValueError, match="fails its checksum"):
        Progress.decode(packed + b"\0")


def test_a_clock_of_another_length_than_it_says_is_refused():
    body = bytearray(replace(PROGRESS, clock=b"12345").encode()[8:])
    struct.pack_into("<I", body, 40, 6)
    with pytest.raises(ValueError, match="holds 5 bytes of clock where it says 6"):
        Progress.decode(struct.pack("<II", 2, zlib.crc32(body)) + body)
