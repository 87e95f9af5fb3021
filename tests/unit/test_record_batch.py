"""Record batches: what is read from a broker's bytes, what hostile bytes do, and what is written."""

from __future__ import annotations

import struct
import tracemalloc

import cramjam
import numpy as np
import pytest
from aiokafka.codec import gzip_encode, lz4_encode, snappy_encode, zstd_encode
from aiokafka.record.util import calc_crc32c
from numba import njit

from streams.kafka import batch_reading, crc32c
from streams.kafka.chunk import Chunk, encode_headers
from streams.kafka.compression import NAMES, CannotOpen, decompress
from streams.kafka.record_batch import (
    CorruptBatch,
    EncodedBatch,
    Spans,
    encode_batches,
    encode_spans,
    oldest_magic,
    read_chunks,
)
from tests.batches import APPEND_TIME, CONTROL, TOPIC, Record, aiokafka_reading, batch, contents, mark, packed, resealed

CODECS = range(5)
_add_by_table = njit(lambda crc, word: crc32c.add_word_by_table(crc, word))
_add = njit(lambda crc, word: crc32c.add_word(crc, word))
MIXED = [
    Record(b"anna", b'{"a": 1}', 1_000, (("h", b"x"), ("empty", b""), ("none", None))),
    Record(None, b"", 999),
    Record(b"", None, 5_000, (("Zürich", b"\xff"),)),
]


def read(fetched: bytes, wanted: int = 0, **options: object) -> Chunk:
    (chunk,) = read_chunks(fetched, TOPIC, 3, wanted, **options)  # type: ignore[arg-type]
    return chunk


def offsets(chunk: Chunk) -> list[int]:
    return [int(offset) for offset in chunk.offset]


@pytest.mark.parametrize("codec", CODECS, ids=NAMES)
def test_a_batch_is_read_whole(codec: int) -> None:
    many = MIXED * 40  # so that the builder finds it worth compressing
    fetched = batch(many, 100, codec=codec)
    assert fetched[22] & 7 == codec
    chunk = read(fetched, 100)
    assert contents(chunk) == [(100 + k, r.timestamp, r.key, r.value, list(r.headers)) for k, r in enumerate(many)]
    assert (chunk.next_offset, chunk.topic, chunk.partition, chunk.unreadable) == (220, TOPIC, 3, ())
    assert not chunk.data.flags.writeable
    assert not chunk.offset.flags.writeable


def test_batches_of_all_codecs_make_one_chunk() -> None:
    many = MIXED * 40
    chunk = read(b"".join(batch(many, 1_000 * codec, codec=codec) for codec in (*CODECS, 0)[:5]))
    assert [row[2:] for row in contents(chunk)] == [(r.key, r.value, list(r.headers)) for r in many] * 5
    assert chunk.next_offset == 4_000 + len(many)


def test_uncompressed_batches_are_not_copied() -> None:
    fetched = batch(MIXED) + batch(MIXED, 3)
    assert np.shares_memory(read(fetched).data, np.frombuffer(fetched, np.uint8))


def test_records_below_the_wanted_offset_are_left_out() -> None:
    fetched = batch(MIXED) + batch(MIXED, 3)
    assert offsets(read(fetched, 2)) == [2, 3, 4, 5]
    assert offsets(read(fetched, 4)) == [4, 5]


def test_gaps_of_compaction_are_no_records() -> None:
    chunk = read(batch(MIXED[:2], 10, deltas=[2, 5], last_delta=7) + batch([], 20, last_delta=4))
    assert offsets(chunk) == [12, 15]
    assert chunk.next_offset == 25


def test_a_cut_off_batch_at_the_end_is_left_out() -> None:
    whole, next_one = batch(MIXED), batch(MIXED, 3)
    for kept in (0, 1, 16, 17, 60, 61, len(next_one) - 1):
        chunk = read(whole + next_one[:kept])
        assert (offsets(chunk), chunk.next_offset) == ([0, 1, 2], 3)
    assert list(read_chunks(next_one[:-1], TOPIC, 0, 3)) == []
    assert list(read_chunks(b"", TOPIC, 0, 3)) == []


def test_append_time_is_the_time_of_all_records() -> None:
    chunk = read(batch(MIXED, flags=APPEND_TIME))
    assert list(chunk.timestamp_ms) == [5_000, 5_000, 5_000]


def test_marks_of_transactions_are_no_records() -> None:
    chunk = read(batch(MIXED) + mark(3, 7, commit=True))
    assert (offsets(chunk), chunk.next_offset) == ([0, 1, 2], 4)
    alone = read(mark(3, 7, commit=False), 3)
    assert (len(alone), alone.next_offset) == (0, 4)


def test_aborted_transactions_are_left_out() -> None:
    fetched = (
        batch(MIXED[:1], 0, producer=7, transactional=True)
        + batch(MIXED[:1], 1, producer=8, transactional=True)
        + batch(MIXED[:1], 2)
        + mark(3, 7, commit=False)
        + batch(MIXED[:1], 4, producer=7, transactional=True)
        + mark(5, 8, commit=True)
        + mark(6, 7, commit=True)
        + batch(MIXED[:1], 7, producer=7, transactional=True)
        + mark(8, 7, commit=False)
    )
    aborted = [(7, 7), (7, 0)]
    assert offsets(read(fetched, aborted=aborted)) == [1, 2, 4]
    assert [r.offset for r in aiokafka_reading(fetched, 0, aborted)] == [1, 2, 4]
    assert offsets(read(fetched)) == [0, 1, 2, 4, 7]
    assert read(fetched, aborted=aborted).next_offset == 9


def test_a_chunk_ends_where_memory_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_reading, "CHUNK_RECORDS", 5)
    fetched = b"".join(batch(MIXED, 3 * k) for k in range(5))
    chunks = list(read_chunks(fetched, TOPIC, 0, 1))
    assert [offsets(chunk) for chunk in chunks] == [[1, 2, 3, 4, 5], list(range(6, 12)), [12, 13, 14]]
    assert [chunk.next_offset for chunk in chunks] == [6, 12, 15]
    monkeypatch.setattr(batch_reading, "CHUNK_RECORDS", 100)
    monkeypatch.setattr(batch_reading, "CHUNK_BYTES", 400)
    fetched = b"".join(batch([Record(value=bytes(300))], k, codec=4) for k in range(3))
    assert [offsets(chunk) for chunk in read_chunks(fetched, TOPIC, 0, 0)] == [[0, 1], [2]]


def test_damage_is_an_error_once_it_comes_first() -> None:
    good, damaged = batch(MIXED), bytearray(batch(MIXED, 3))
    damaged[70] ^= 1
    assert offsets(read(good + damaged)) == [0, 1, 2]
    with pytest.raises(CorruptBatch, match=r"^events/3: a batch from offset 3 on is damaged \(its checksum is another"):
        list(read_chunks(bytes(damaged), TOPIC, 3, 3))
    with pytest.raises(CorruptBatch):
        list(read_chunks(good + damaged, TOPIC, 3, 3))


def test_checksums_can_be_left_unread() -> None:
    damaged = bytearray(batch([Record(b"k", b"value")]))
    damaged[-2] ^= 1
    assert read(bytes(damaged), check_crc=False).value(0) == b"valud"


@pytest.mark.parametrize(
    ("at", "layout", "value", "message"),
    [
        (0, ">q", -1, "offsets -1"),
        (0, ">q", 1 << 55, "offsets 36028797018963968"),
        (23, ">i", -1, r"offsets 0 \+ -1"),
        (57, ">i", -5, "-5 records"),
        (16, ">b", 1, "format 1, this reads 2"),
        (8, ">i", 20, "32 bytes, a header has 61"),
        (8, ">i", -3, "9 bytes"),
    ],
)
def test_an_impossible_header_is_damage(at: int, layout: str, value: int, message: str) -> None:
    data = bytearray(batch(MIXED))
    struct.pack_into(layout, data, at, value)
    with pytest.raises(CorruptBatch, match=message):
        list(read_chunks(resealed(data), TOPIC, 3, 0))


BOMB = bytes(40 << 20)


@pytest.mark.parametrize(
    ("payload", "count", "codec", "reason"),
    [
        (bytes(cramjam.zstd.compress(BOMB)), 1, 4, "zstd: more than 33554432 bytes"),
        (bytes(cramjam.gzip.compress(BOMB)), 1, 1, "gzip: more than 33554432 bytes"),
        (bytes(cramjam.lz4.compress(BOMB)), 1, 3, "lz4: more than 33554432 bytes"),
        (bytes(cramjam.snappy.compress_raw(BOMB)), 1, 2, "snappy: 41943040 bytes, more than 33554432"),
        (b"\xff\xff\xff\xff\x7f", 1, 2, "snappy: "),
        (b"not compressed", 1, 4, "zstd: "),
        (b"not compressed", 1, 3, "lz4: "),
        (b"not compressed", 1, 1, "gzip: "),
        (b"not compressed", 1, 6, "no codec has the number 6"),
        (zstd_encode(bytes(7_000_007)), 1_000_001, 4, "1000001 records, more than 1000000"),
        (zstd_encode(b"seven.."), 2, 4, "2 records in 7 bytes"),
        (b"", 1, 0, "1 records in 0 bytes"),
        (b"\x0c\0\0\0\0\0\xff", 1, 0, "contradict"),
        (b"\x0e\0\0\0\0\0\0", 1, 0, "contradict"),
        (b"\x0c\0\0\0\0\0\0\0", 1, 0, "contradict"),
        (b"\x0c\0\0\0\0\0\0" * 2, 2, 0, "contradict"),
    ],
)
def test_what_cannot_be_opened_is_one_record_and_its_neighbours_stay(
    payload: bytes, count: int, codec: int, reason: str
) -> None:
    bad = packed(payload, count, codec, 3)
    before, after = batch(MIXED), batch(MIXED * 40, 3 + count, codec=4)
    chunk = read(before + bad + after)
    assert offsets(chunk)[:5] == [0, 1, 2, 2 + count, 3 + count]
    assert chunk.value(3) == bad
    assert (chunk.key(3), chunk.headers(3)) == (None, [])
    ((index, why),) = [(u.index, u.reason) for u in chunk.unreadable]
    assert index == 3
    assert reason in why
    assert [chunk.value(k) for k in (0, 4)] == [MIXED[0].value] * 2
    assert chunk.part(3, 5).unreadable[0].index == 0
    assert chunk.part(4, 6).unreadable == ()
    alone = read(bad, 3)
    assert alone.value(0) == bad
    assert alone.next_offset == 3 + count


def test_a_bomb_takes_no_more_memory_than_the_bound() -> None:
    bomb = packed(bytes(cramjam.zstd.compress(bytes(400 << 20))), 1, 4)
    tracemalloc.start()
    try:
        read(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


@pytest.mark.parametrize(
    ("codec", "encode"),
    [(1, gzip_encode), (2, snappy_encode), (2, lambda x: snappy_encode(x, False)), (3, lz4_encode), (4, zstd_encode)],
)
@pytest.mark.parametrize("size", [1, 1_000, 300_000, 3_000_000])
def test_every_codec_opens_what_clients_write_and_nothing_cut_off(codec: int, encode: object, size: int) -> None:
    content = np.random.default_rng(size).integers(0, 7, size, np.uint8).tobytes()
    compressed = bytes(encode(content))  # type: ignore[operator]
    assert decompress(codec, memoryview(compressed), size).tobytes() == content
    with pytest.raises(CannotOpen, match="more than"):
        decompress(codec, memoryview(compressed), size - 1)
    for kept in (0, len(compressed) // 2):
        with pytest.raises(CannotOpen):
            decompress(codec, memoryview(compressed[:kept]), size)


def test_a_block_of_snappy_that_leaves_the_frame_is_refused() -> None:
    frame = bytearray(snappy_encode(b"some bytes"))
    struct.pack_into(">i", frame, 16, 1 << 30)
    with pytest.raises(CannotOpen, match="a block of 1073741824 bytes where 12 are left"):
        decompress(2, memoryview(bytes(frame)), 100)
    with pytest.raises(CannotOpen, match="the last block has no length"):
        decompress(2, memoryview(bytes(frame[:18])), 100)


def test_the_checksum_is_castagnolis() -> None:
    data = np.random.default_rng(1).integers(0, 256, 1_000).astype(np.uint8)
    data.flags.writeable = False
    for start, stop in ((0, 0), (0, 9), (3, 1_000), (17, 24)):
        assert crc32c.crc32c(data, start, stop) == calc_crc32c(data[start:stop].tobytes())
    assert crc32c.crc32c(np.frombuffer(b"123456789", np.uint8), 0, 9) == 0xE3069283


def test_tables_and_instruction_agree() -> None:
    words = np.random.default_rng(2).integers(0, 1 << 64, 100, dtype=np.uint64)
    by_table, chosen = np.uint64(0xFFFFFFFF), np.uint64(0xFFFFFFFF)
    for word in words:
        by_table = np.uint64(_add_by_table(by_table, word))
        chosen = np.uint64(_add(chosen, word))
    assert int(by_table) == int(chosen) == calc_crc32c(words.tobytes()) ^ 0xFFFFFFFF


def test_the_oldest_format_is_told() -> None:
    new = batch(MIXED)
    old = bytearray(new)
    old[16] = 1
    assert oldest_magic(new) == 2
    assert oldest_magic(new + old) == 1
    assert oldest_magic(new + old[:-1]) == 2
    assert oldest_magic(b"") == 2


def sent(batches: list[EncodedBatch]) -> bytes:
    """As the broker keeps them: with its offsets."""
    base, data = 0, b""
    for one in batches:
        data += struct.pack(">q", base) + bytes(one.data[8:])
        base += one.count
    return data


def test_encoded_batches_are_what_aiokafka_reads() -> None:
    keys = [b"a", None, b"", b"k" * 200]
    values = [b"v", b"", None, b"w" * 1_000]
    headers = [encode_headers(h) for h in ([], [("a", None)], [("b", b"x"), ("c", b"")], [])]
    batches = encode_batches(keys, values, timestamp_ms=77, headers=headers)
    assert [b.count for b in batches] == [4]
    records = list(aiokafka_reading(sent(batches)))
    assert [r.key for r in records] == keys
    assert [r.value for r in records] == values
    assert [list(r.headers) for r in records] == [[], [("a", None)], [("b", b"x"), ("c", b"")], []]
    assert {r.timestamp for r in records} == {77}


def test_a_batch_without_headers_is_aiokafkas_byte_for_byte() -> None:
    records = [Record(b"key %d" % k, b"v" * k, 5_000) for k in range(200)]
    (mine,) = encode_batches([r.key for r in records], [r.value for r in records], timestamp_ms=5_000)
    theirs = batch(records)
    assert bytes(mine.data[:43]) == theirs[:17] + bytes(mine.data[17:21]) + theirs[21:43]
    assert bytes(mine.data[57:]) == theirs[57:]


def test_no_batch_is_larger_than_asked_but_for_a_record_alone() -> None:
    sizes = [10, 500, 10, 10, 2_000, 10, 300, 300, 300]
    values = [bytes([k]) * size for k, size in enumerate(sizes)]
    batches = encode_batches([b"k"] * len(sizes), values, timestamp_ms=0, max_bytes=700)
    assert [b.count for b in batches] == [4, 1, 3, 1]
    assert [len(b.data) <= 700 for b in batches] == [True, False, True, True]
    assert [r.value for r in aiokafka_reading(sent(batches))] == values
    (exact,) = encode_batches([b"k"] * 4, values[:4], timestamp_ms=0, max_bytes=len(batches[0].data))
    assert exact.count == 4
    assert len(encode_batches([b"k"] * 4, values[:4], timestamp_ms=0, max_bytes=len(batches[0].data) - 1)) == 2


def test_no_records_make_no_batch() -> None:
    assert encode_batches([], [], timestamp_ms=0) == []


def test_spans_are_encoded_with_their_own_times() -> None:
    slab = np.arange(40, dtype=np.uint8)
    values = Spans(slab, np.array([30, 0]), np.array([10, 20]))
    batches = encode_spans(Spans.of([b"x", b"y"]), values, np.array([2_000, 1_000]))
    records = list(aiokafka_reading(sent(batches)))
    assert [(r.key, r.value, r.timestamp) for r in records] == [
        (b"x", slab[30:].tobytes(), 2_000),
        (b"y", slab[:20].tobytes(), 1_000),
    ]
    assert struct.unpack_from(">qq", batches[0].data, 27) == (2_000, 2_000)


@pytest.mark.parametrize(
    ("start", "length", "message"),
    [
        ([0], [5], "a value reaches outside its 4 bytes"),
        ([-1], [2], "a value reaches outside"),
        ([0], [-2], "a value reaches outside"),
        ([0, 1], [1, 1], "1 timestamps, 2 value starts and 2 lengths"),
    ],
)
def test_spans_outside_their_buffer_are_refused(start: list[int], length: list[int], message: str) -> None:
    values = Spans(np.zeros(4, np.uint8), np.array(start), np.array(length))
    with pytest.raises(ValueError, match=message):
        encode_spans(Spans.of([b"k"]), values, np.array([0]))
    with pytest.raises(ValueError, match="headers are absent"):
        encode_spans(Spans.of([b"k"]), Spans.of([b"v"]), np.array([0]), headers=Spans.of([None]))


def test_a_part_of_a_chunk() -> None:
    chunk = read(batch(MIXED, 5) + batch(MIXED, 9))
    middle = chunk.part(1, 3)
    assert offsets(middle) == [6, 7]
    assert middle.next_offset == 8
    assert chunk.part(3, 6).next_offset == 12
    assert (len(chunk.part(6, 6)), chunk.part(6, 6).next_offset) == (0, 12)
    for start, stop in ((2, 2), (-1, 2), (3, 7), (4, 3)):
        with pytest.raises(IndexError):
            chunk.part(start, stop)


def test_a_chunk_of_a_clients_records() -> None:
    fetched = batch(MIXED, 5)
    records = list(aiokafka_reading(fetched, 5))
    chunk = Chunk.of_records(TOPIC, 3, records, 8)
    assert contents(chunk) == contents(read(fetched, 5))
    assert chunk.next_offset == 8
    assert len(Chunk.of_records(TOPIC, 3, [], 8)) == 0


def test_a_header_name_that_is_no_text_can_be_read_and_sent_on() -> None:
    data = bytearray(batch([Record(b"k", b"v", headers=(("name", b"x"),))]))
    at = data.index(b"name")
    data[at] = 0xFF
    ((name, value),) = read(resealed(data)).headers(0)
    assert (name, value) == ("\\xffame", b"x")
    assert encode_headers([(name, value)])


def test_control_batches_are_told_by_their_flag() -> None:
    assert offsets(read(batch(MIXED, flags=CONTROL) + batch(MIXED, 3))) == [3, 4, 5]
