"""The path from records to durable rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.user_state import RowLayout, new_rows
from state.exceptions import ChangelogError, StoreClosed
from state.keys import STANDING_KEY
from state.memory_store import MemoryUserStore
from state.outbox import Outbox, entries
from state.outbox_codec import SESSION_BYTES, Standing
from state.store import RocksUserStore, UserStore
from streams.processor import Counts, Processor
from tests.models import at, offset_of, random_stream, small_model


class Kept:
    """Opens memory stores that stay readable after the processor, and counts how they are used."""

    def __init__(self) -> None:
        self.stores: dict[int, MemoryUserStore] = {}

    def __call__(self, partition: int, layout: RowLayout) -> UserStore:
        return self.stores.setdefault(partition, CountingStore(layout))


class CountingStore(MemoryUserStore):
    """A memory store that remembers its batches."""

    def __init__(self, layout: RowLayout) -> None:
        super().__init__(layout)
        self.batches: list[tuple[list[bytes], int]] = []

    def write_batch(self, users, rows, progress, **more):
        self.batches.append((list(users), progress.offset))
        return super().write_batch(users, rows, progress, **more)

    def close(self) -> None:
        """Stays readable."""


def processor(opened: Kept, commit_events: int = 16384, **model: object) -> Processor:
    return Processor(small_model(**model), opened, StateSettings(commit_events=commit_events, ring=4))


def test_every_record_is_predicted_and_counted():
    stream, opened = random_stream(200, 20), Kept()
    work = processor(opened)
    found = work.process(0, stream)
    assert found.applied.all()
    assert np.isfinite(found.logit).all()
    np.testing.assert_allclose(found.probability, 1 / (1 + np.exp(-found.logit.astype(float))), rtol=1e-6)
    assert work.counts == Counts(events=200, skipped=0, guarded=0, users_created=len(stream.user_ids))


def test_a_new_user_starts_where_the_features_say():
    stream, opened = random_stream(40, 6), Kept()
    work = processor(opened, second=False)
    first = np.array([np.flatnonzero(stream.user == code)[0] for code in range(len(stream.user_ids))])
    found = work.process(0, stream)

    model = work.model
    means = model.initial_means(stream.user_ids, stream.user_features)
    assert len({tuple(m) for m in means}) == 3
    item = model.item_rows(stream.item_ids, {})[stream.item[first]]
    psi = model.items.psi[item].astype(float)
    raw = model.items.base[item] + np.einsum("ij,ij->i", psi, means)
    covariance = np.zeros((5, 5))
    covariance[np.tril_indices(5)] = model.first.covariance
    covariance += np.tril(covariance, -1).T
    variance = np.einsum("ij,jk,ik->i", psi, covariance, psi)
    np.testing.assert_allclose(found.logit[first], raw / np.sqrt(1 + model.first.kappa * variance), rtol=1e-5)


def test_rows_carry_the_meta_version_they_start_from():
    opened = Kept()
    work = processor(opened, meta_version=6)
    work.process(0, random_stream(10, 3))
    rows, _ = opened.stores[0].get_many([b"u0", b"u1", b"u2"])
    assert work.layout.rows(rows)["meta_version"].tolist() == [6, 6, 6]
    assert at(opened.stores[0])[1] == 6


def test_commits_hold_at_most_so_many_events_and_the_offset_of_their_last():
    stream, opened = random_stream(25, 4), Kept()
    processor(opened, commit_events=10).process(0, stream)
    assert [offset for _, offset in opened.stores[0].batches] == stream.offset[[9, 19, 24]].tolist()
    assert offset_of(opened.stores[0]) == stream.offset[-1]


def test_a_commit_writes_only_the_users_it_met():
    stream = Interactions.from_columns(["a", "b", "a", "c"], ["i0"] * 4, [1, 0, 1, 1], [1, 2, 3, 4])
    opened = Kept()
    processor(opened, commit_events=2).process(0, stream)
    assert [sorted(users) for users, _ in opened.stores[0].batches] == [[b"a", b"b"], [b"a", b"c"]]


def test_records_applied_before_change_nothing_and_write_nothing():
    stream, opened = random_stream(100, 9), Kept()
    work = processor(opened, commit_events=30)
    work.process(0, stream)
    before, batches = dict(opened.stores[0].iterate()), len(opened.stores[0].batches)
    again = work.process(0, stream)
    assert not again.applied.any()
    assert np.isnan(again.logit).all()
    assert len(opened.stores[0].batches) == batches
    assert_same_rows(before, dict(opened.stores[0].iterate()))
    assert work.counts.skipped == 100


def test_a_replay_from_the_middle_ends_as_one_pass_does():
    stream, once, twice = random_stream(120, 9), Kept(), Kept()
    processor(once).process(0, stream)
    work = processor(twice, commit_events=16)
    work.process(0, stream.take(slice(0, 70)))
    found = work.process(0, stream.take(slice(40, 120)))
    assert found.applied.tolist() == [False] * 30 + [True] * 50
    assert_same_rows(dict(once.stores[0].iterate()), dict(twice.stores[0].iterate()))
    assert offset_of(twice.stores[0]) == stream.offset[-1]


def test_a_replay_never_moves_the_offset_back():
    stream, opened = random_stream(50, 50, seed=2), Kept()
    work = processor(opened)
    work.process(0, stream.take(slice(40, 50)))
    work.process(0, stream.take(slice(0, 10)))
    assert offset_of(opened.stores[0]) == stream.offset[49]


def test_partitions_have_stores_of_their_own():
    opened = Kept()
    work = processor(opened)
    stream = random_stream(30, 3)
    one, two = work.process(1, stream), work.process(2, stream)
    np.testing.assert_array_equal(one.logit, two.logit)
    assert sorted(opened.stores) == [1, 2]
    assert_same_rows(dict(opened.stores[1].iterate()), dict(opened.stores[2].iterate()))


def test_no_records_write_nothing():
    opened = Kept()
    assert len(processor(opened).process(0, Interactions.empty()).logit) == 0
    assert opened.stores[0].batches == []


def test_predicting_writes_nothing_and_knows_what_was_learned():
    stream, opened = random_stream(60, 5), Kept()
    work = processor(opened)
    work.process(0, stream.take(slice(0, 50)))
    before, batches = dict(opened.stores[0].iterate()), len(opened.stores[0].batches)
    asked = stream.take(slice(50, 51))
    said = work.predict(0, asked)
    stranger = Interactions.from_columns(["nobody"], ["i1"], [0], [1], offsets=[10_000])
    work.predict(0, stranger)
    assert_same_rows(before, dict(opened.stores[0].iterate()))
    assert len(opened.stores[0].batches) == batches
    assert not said.applied.any()
    np.testing.assert_array_equal(said.logit, work.process(0, asked).logit)


def test_a_guarded_update_is_counted():
    opened = Kept()
    work = processor(opened)
    work.model.items.psi[0, 1] = np.nan
    work.process(0, Interactions.from_columns(["a", "a"], ["i0", "i1"], [1, 1], [1, 2]))
    assert work.counts.guarded == 1


def test_the_stream_goes_on_in_a_store_opened_again(tmp_path: Path):
    stream, whole = random_stream(100, 12), Kept()
    expected = processor(whole).process(0, stream)
    found = []
    for part in (slice(0, 37), slice(37, 100)):
        with Processor(
            small_model(), lambda p, layout: RocksUserStore(tmp_path / str(p), layout), StateSettings(ring=4)
        ) as work:
            found.append(work.process(0, stream.take(part)).logit)
            rows = dict(work.store(0).iterate())
    np.testing.assert_array_equal(np.concatenate(found), expected.logit)
    assert_same_rows(dict(whole.stores[0].iterate()), rows)


def test_closing_closes_the_stores():
    work = Processor(small_model(), lambda _, layout: MemoryUserStore(layout), StateSettings())
    store = work.store(3)
    work.close()
    work.close()
    with pytest.raises(StoreClosed):
        store.progress()


def test_a_user_who_is_only_asked_about_has_no_row():
    opened = Kept()
    work = processor(opened)
    asked = work.predict(0, Interactions.from_columns(["new"], ["i2"], [1], [5]))
    assert opened.stores[0].approximate_count() == 0
    first, second = work.model.first, work.model.second
    start = new_rows(work.layout, first, second, work.model.initial_means(["new"], {}), 0)
    learned = work.process(0, Interactions.from_columns(["new"], ["i2"], [1], [5]))
    np.testing.assert_array_equal(asked.logit, learned.logit)
    assert (dict(opened.stores[0].iterate())[b"new"] != start[0]).any()


def assert_same_rows(one: dict[bytes, np.ndarray], other: dict[bytes, np.ndarray]) -> None:
    assert {user: row.tobytes() for user, row in one.items()} == {user: row.tobytes() for user, row in other.items()}


# --- beside a changelog


def with_log(store: UserStore) -> Processor:
    """A processor whose commits are told, of a store that is this session's."""
    session = b"s" * SESSION_BYTES
    own = {STANDING_KEY: Standing(session, 0, 0).encode()}
    store.write_batch([], np.zeros((0, store.layout.row_bytes), np.uint8), None, own=own)
    state = StateSettings(commit_events=64, ring=4)
    return Processor(small_model(), lambda *_: store, state, log=lambda _, held: Outbox(held, session))


def layout() -> RowLayout:
    model = small_model()
    return RowLayout.of(model.first, model.second, 4)


def test_the_progress_ends_where_the_records_were_read_to():
    stream, store = random_stream(100, 6), MemoryUserStore(layout())
    end = int(stream.offset[-1]) + 7
    work = with_log(store)
    work.process(0, stream, through=end)
    assert [len(entry.users) > 0 for entry in entries(store)] == [True, True]
    assert offset_of(store) == end
    before = store.progress()
    work.process(0, stream, through=end)
    assert store.progress() == before


def test_without_any_event_the_progress_moves_alone_and_back_it_never_goes():
    stream, store = random_stream(10, 3), MemoryUserStore(layout())
    work, none = with_log(store), stream.take(slice(0, 0))
    work.process(0, none, through=4)
    assert (store.progress().offset, store.progress().users, store.progress().events) == (4, 0, 0)
    work.process(0, none, through=2)
    assert offset_of(store) == 4
    assert len(entries(store)) == 1
    assert list(store.iterate()) == []


def test_records_that_go_beyond_what_was_read_are_refused():
    stream = random_stream(10, 3)
    with pytest.raises(ValueError, match="the records end at offset"):
        with_log(MemoryUserStore(layout())).process(0, stream, through=int(stream.offset[-1]) - 1)


def test_how_far_the_progress_goes_changes_no_bit_of_rows_or_predictions():
    stream, ends = random_stream(200, 9), []
    for gap in (0, 3):
        store = MemoryUserStore(layout())
        work = with_log(store)
        said = [
            work.process(0, stream.take(part), through=int(stream.offset[part][-1]) + min(gap, room))
            for part, room in ((slice(0, 70), int(np.diff(stream.offset)[69]) - 1), (slice(70, 200), 9))
        ]
        rows = {user: row.tobytes() for user, row in store.iterate()}
        ends.append((rows, np.concatenate([part.logit for part in said]).tobytes()))
    assert ends[0] == ends[1]


def test_what_is_to_be_told_of_a_commit_is_in_its_entry():
    stream, store = random_stream(100, 6), MemoryUserStore(layout())
    found = with_log(store).process(
        0, stream, payload=lambda events, adapted: events.offset.tobytes() + adapted.logit.tobytes()
    )
    parts = (slice(0, 64), slice(64, 100))
    assert [entry.payload for entry in entries(store)] == [
        stream.offset[part].tobytes() + found.logit[part].tobytes() for part in parts
    ]
    assert [set(entry.users) for entry in entries(store)] == [
        {stream.user_ids[code].encode() for code in set(stream.user[part].tolist())} for part in parts
    ]


def test_a_payload_that_fails_leaves_nothing_of_its_commit():
    stream, store = random_stream(100, 6), MemoryUserStore(layout())

    def fails(events, adapted) -> bytes:
        raise MemoryError

    work = with_log(store)
    with pytest.raises(MemoryError):
        work.process(0, stream, payload=fails)
    assert (entries(store), store.progress()) == ((), None)
    clean = Kept()
    processor(clean).process(0, stream)
    work.process(0, stream)
    assert [row.tobytes() for _, row in store.iterate()] == [row.tobytes() for _, row in clean.stores[0].iterate()]


def test_a_released_partition_is_closed_and_its_rows_leave_the_memory():
    stream, opened = random_stream(40, 4), Kept()
    work = processor(opened)
    work.process(0, stream)
    work.process(1, stream)
    opened.stores[0].close = lambda: MemoryUserStore.close(opened.stores[0])
    work.release(0)
    with pytest.raises(StoreClosed):
        opened.stores[0].progress()
    assert int(work._memory._held.sum()) == len(stream.user_ids)
    work.release(0)
    work.release(7)
    assert work.process(1, stream).applied.any() is np.False_


def test_an_adopted_store_is_the_partitions_until_it_is_released(tmp_path):
    stream, store = random_stream(40, 4), MemoryUserStore(layout())
    work = processor(Kept())
    work.adopt(3, store)
    assert work.store(3) is store
    with pytest.raises(ValueError, match="partition 3 has a store already: release it first"):
        work.adopt(3, MemoryUserStore(layout()))
    work.process(3, stream)
    work.release(3)
    with pytest.raises(StoreClosed):
        store.progress()
    work.adopt(3, MemoryUserStore(layout()))
    assert work.process(3, stream).applied.all()


def test_a_workers_store_is_refused_by_a_run_that_tells_no_changelog(tmp_path):
    with RocksUserStore(tmp_path / "s", layout()) as store:
        with_log(store)
    work = Processor(small_model(), lambda _, wanted: RocksUserStore(tmp_path / "s", wanted), StateSettings(ring=4))
    for _ in range(2):  # closed again: the second is not refused for a lock
        with pytest.raises(ChangelogError, match=r"the store is a worker's, .* give another state directory"):
            work.process(0, random_stream(10, 3))
