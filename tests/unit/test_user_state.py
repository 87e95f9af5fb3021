"""The bytes of a user's row."""

from __future__ import annotations

import numpy as np
import pytest

from learner.ledger import extend_ledger
from learner.user_state import (
    LAYOUT_VERSION,
    MAX_AGE_S,
    NO_GRADE,
    RowLayout,
    age_code,
    age_of,
    item_hash,
    new_rows,
    recent_events,
    ring_item,
)
from tests.models import first_filter, second_filter


@pytest.mark.parametrize(
    ("kind", "second", "ring", "row_bytes"),
    [
        ("full", 0, 32, 928),
        ("full", 8, 32, 1104),
        ("diagonal", 0, 32, 448),
        ("gradient", 0, 32, 384),
        ("full", 8, 0, 848),
    ],
)
def test_a_row_of_16_dimensions_takes_the_bytes_of_the_design(kind, second, ring, row_bytes):
    assert RowLayout(kind, 16, second, ring).row_bytes == row_bytes


def test_rows_are_padded_to_eight_bytes():
    assert RowLayout("gradient", 5, 0, 0).row_bytes == 64 + 24


def test_the_fields_stand_at_the_bytes_of_the_documentation():
    fields = RowLayout("full", 16, 8, 32).dtype.fields
    assert {name: fields[name][1] for name in fields} == {
        "layout_version": 0, "checksum": 4, "events": 8, "last_offset": 16, "first_time_ms": 24, "last_time_ms": 32,
        "ledger": 40, "meta_version": 48, "guarded": 56, "owner": 60, "mean": 64, "covariance": 128,
        "second_mean": 672, "second_covariance": 704, "padding": 848, "ring": 848,
    }  # fmt: skip


def test_new_rows_hold_the_means_the_priors_and_no_event():
    first, second = first_filter("full", 5), second_filter(4)
    layout = RowLayout.of(first, second, 3)
    means = np.arange(10, dtype=np.float32).reshape(2, 5)

    rows = layout.rows(new_rows(layout, first, second, means, meta_version=9))

    assert rows["layout_version"].tolist() == [LAYOUT_VERSION] * 2
    assert rows["meta_version"].tolist() == [9, 9]
    assert rows["events"].tolist() == [0, 0]
    assert rows["last_offset"].tolist() == [-1, -1]
    assert rows["ledger"].tolist() == [0, 0]
    np.testing.assert_array_equal(rows["mean"], means)
    np.testing.assert_array_equal(rows["covariance"], np.tile(first.covariance, (2, 1)))
    np.testing.assert_array_equal(rows["second_mean"], np.tile(second.initialization, (2, 1)))
    np.testing.assert_array_equal(rows["second_covariance"], np.tile(second.covariance, (2, 1)))
    assert not rows["ring"].any()


def test_writing_to_the_view_writes_the_slab():
    layout = RowLayout("full", 2, 0, 0)
    slab = np.zeros((1, layout.row_bytes), np.uint8)
    layout.rows(slab)["mean"][0] = [1.0, 2.0]
    assert slab[0, 64:72].tobytes() == np.array([1, 2], "<f4").tobytes()


def test_a_slab_of_other_rows_is_refused():
    with pytest.raises(ValueError, match=r"rows of 100 bytes, but row-v2 head=full d=2 second=0 ring=0 has 88"):
        RowLayout("full", 2, 0, 0).rows(np.zeros((1, 100), np.uint8))


def test_more_grades_than_a_ring_entry_holds_are_refused():
    first = first_filter("full", 2)
    many = np.zeros(65, np.float32)
    graded = type(first)(*(getattr(first, n) for n in first.__slots__[:-2]), many, many)
    with pytest.raises(ValueError, match="64 grades, but a ring entry holds at most 63"):
        RowLayout.of(graded, None, 4)


def test_layouts_differ_in_their_fingerprints_when_their_bytes_do():
    layouts = [RowLayout(k, d, e, r) for k in ("full", "diagonal") for d in (4, 5) for e in (0, 4) for r in (0, 8)]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)


def test_an_items_hash_is_the_same_in_every_process():
    assert item_hash("i1") == 0x0ACF11BAFF1E2AAE


def test_the_ring_is_read_from_the_oldest_event_on():
    layout = RowLayout("gradient", 2, 0, 3)
    row = layout.rows(np.zeros((1, layout.row_bytes), np.uint8))
    row["events"], row["first_time_ms"] = 4, 1_000

    def entry(item: int, label: int, grade: int, age: int) -> int:
        return item << 24 | label << 23 | grade << 17 | age

    row["ring"] = [[entry(44, 1, NO_GRADE, 9), entry(22, 0, 2, 5), entry(33, 1, 3, 7)]]
    recent = recent_events(layout, row[0])

    assert recent.item.tolist() == [22, 33, 44]
    assert recent.label.tolist() == [0, 1, 1]
    assert recent.grade.tolist() == [2, 3, NO_GRADE]
    assert recent.time_ms.tolist() == [1_000 + 1000 * age for age in (5, 7, 9)]


@pytest.mark.parametrize(
    ("age", "code"),
    [(0, 0), (1, 1), (4095, 4095), (8191, 8191), (8192, 4096 + 4096), (86_400, 0x4000 + 5400), (MAX_AGE_S, 0x1FFFF)],
)
def test_an_age_is_kept_with_thirteen_significant_bits(age, code):
    assert age_code(np.array([age])).tolist() == [code]
    assert age_of(np.array([code], np.uint64)).tolist() == [age]


def test_ages_are_rounded_down_by_less_than_a_4096th_and_stay_in_order():
    ages = np.unique(np.geomspace(1, MAX_AGE_S, 5_000).astype(np.int64))
    codes = age_code(ages)
    read = age_of(codes)
    assert (np.diff(codes.astype(np.int64)) >= 0).all()
    assert ((ages - read >= 0) & (ages - read <= ages / 4096)).all()


def test_an_age_outside_the_range_reads_as_its_end():
    assert age_of(age_code(np.array([-5, MAX_AGE_S * 2]))).tolist() == [0, MAX_AGE_S]


def test_a_row_without_a_ring_has_no_recent_events():
    layout = RowLayout("gradient", 2, 0, 0)
    row = layout.rows(np.zeros((1, layout.row_bytes), np.uint8))
    row["events"] = 5
    assert recent_events(layout, row[0]).item.tolist() == []


def test_a_ring_item_is_the_high_forty_bits():
    assert ring_item(0xFFFF_0000_1234_5678) == 0xFFFF_0000_12


def plain_ledger(ledger: int, offset: int, item: int, label: int, time_ms: int) -> int:
    """``extend_ledger`` in Python's integers."""
    mask = (1 << 64) - 1

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ word >> 27) * 0x94D049BB133111EB & mask
        return word ^ word >> 31

    ledger = mix((ledger + 0x9E3779B97F4A7C15 & mask) ^ offset)
    return mix(mix(ledger ^ item) ^ (time_ms << 1 & mask | label))


def ledger_of(event: list[int]) -> int:
    ledger, offset, item, label, time_ms = event
    return int(extend_ledger(np.uint64(ledger), np.int64(offset), np.uint64(item), np.int8(label), np.int64(time_ms)))


@pytest.mark.parametrize("event", [[0, 0, 0, 0, 0], [5, 2**63 - 1, 2**64 - 1, 1, 2**62], [2**64 - 1, 7, 11, 1, 13]])
def test_the_ledger_is_the_documented_chain(event):
    assert ledger_of(event) == plain_ledger(*event)


@pytest.mark.parametrize("place", range(5))
def test_the_ledger_changes_with_each_part_of_an_event(place):
    event = [3, 5, 7, 0, 11]
    other = list(event)
    other[place] += 1
    assert ledger_of(event) != ledger_of(other)


def test_the_golden_ledger_of_two_events_is_the_one_of_layout_version_1():
    one = ledger_of([0, 0, item_hash("i1"), 1, 1_600_000_000_000])
    assert (one, ledger_of([one, 5, item_hash("i2"), 0, 1_600_000_000_001])) == (
        0x7513B4D29E4EF061,
        0xA2BECAD85C8B4404,
    )
