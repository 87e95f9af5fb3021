"""Which partition a key belongs to: as Java's producer and aiokafka have it."""

from __future__ import annotations

import numpy as np
import pytest
from aiokafka.partitioner import murmur2 as aiokafkas_murmur2

from streams.kafka.partitioning import murmur2, partition_of, partitions_of

JAVA = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}
"""From Apache Kafka's own test of its hash (UtilsTest.testMurmur2)"""


@pytest.mark.parametrize(("key", "value"), JAVA.items())
def test_the_hash_is_javas(key: bytes, value: int) -> None:
    assert murmur2(key) == value
    assert partition_of(key, 12) == (value & 0x7FFFFFFF) % 12


def test_thousands_of_keys_agree_with_aiokafka() -> None:
    rng = np.random.default_rng(5)
    keys = [rng.bytes(int(length)) for length in rng.integers(0, 40, 5_000)]
    length = np.array([len(key) for key in keys])
    start = np.cumsum(length) - length
    data = np.frombuffer(b"".join(keys), np.uint8)
    for partitions in (1, 3, 12, 1_000):
        expected = [(aiokafkas_murmur2(key) & 0x7FFFFFFF) % partitions for key in keys]
        found = partitions_of(data, start, length, partitions)
        assert found.dtype == np.int32
        assert found.tolist() == expected


@pytest.mark.parametrize(("start", "length"), [(0, 4), (-1, 2), (0, -1), (3, 1)])
def test_a_key_outside_its_bytes_is_refused(start: int, length: int) -> None:
    data = np.frombuffer(b"key", np.uint8)
    with pytest.raises(ValueError, match="a key reaches outside its 3 bytes"):
        partitions_of(data, np.array([start]), np.array([length]), 4)


def test_a_topic_without_partitions_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one partition, not 0"):
        partition_of(b"key", 0)
