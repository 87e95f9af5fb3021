"""Histories are what the kernel writes into rings, bit for bit, however the stream was cut and whoever was dropped."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.interactions import Interactions
from state.codec import owner
from state.histories import HistoryLimits
from state.history_codec import decode_chunks
from state.store import RocksUserStore
from tests.histories import Keeper, counted, expected, features_of, layout_of, random_stream, recounted

EVENTS = 900
USERS = 9
CUTS = st.lists(st.integers(1, EVENTS - 1), max_size=40)


@cache
def stream(seed: int = 0) -> Interactions:
    """About 100 events a user: rings of 32 turn over, and three chunks fill up."""
    return random_stream(EVENTS, USERS, seed)


@cache
def uncut() -> dict[bytes, bytes]:
    return Keeper().commits(stream(), []).contents()


def entries_of(keeper: Keeper, user: bytes) -> np.ndarray:
    chunks = [value for key, value in keeper.contents().items() if len(key) == 17 and key[1:5] == hash_of(user)]
    return decode_chunks(chunks)[1]


def hash_of(user: bytes) -> bytes:
    return owner(user).to_bytes(4, "big")


def test_an_uncut_stream_leaves_every_event():
    keeper = Keeper().commits(stream(), [])
    assert keeper.held() == expected(stream())
    assert counted(keeper) == recounted(keeper) == (USERS, EVENTS, len(uncut()) - 1)


@given(cuts=CUTS, ring=st.sampled_from([32, 33, 50, 2048]))
def test_cuts_change_no_byte_and_entries_are_those_that_the_kernel_keeps(cuts, ring):
    keeper = Keeper(ring=ring).commits(stream(), cuts)
    assert keeper.contents() == uncut()
    for user, row in keeper.store.iterate():
        row = keeper.layout.rows(row.reshape(1, -1))[0]
        entries, count = entries_of(keeper, user), int(row["events"])
        kept = min(count, ring)
        assert len(entries) == count
        np.testing.assert_array_equal(entries[-kept:], row["ring"][np.arange(count - kept, count) % ring])


@given(cuts=CUTS, per_user=st.integers(32, 110))
def test_of_each_user_the_latest_events_are_kept_and_cuts_change_none(cuts, per_user):
    limits = HistoryLimits(1 << 40, per_user)
    keeper = Keeper(limits=limits).commits(stream(), cuts)
    assert counted(keeper) == recounted(keeper)
    whole = expected(stream())
    for user, _, history in keeper.book.walk():
        dropped = max(len(whole[user][0]) - per_user, 0) // 32 * 32
        assert history.first.tolist() == [dropped]
        assert history.item.tolist() == whole[user][0][dropped:]
    assert keeper.contents() == Keeper(limits=limits).commits(stream(), []).contents()


@given(cuts=CUTS, began=st.integers(0, EVENTS), expiring=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8))))
def test_late_books_and_users_who_start_anew_lose_old_events_and_nothing_else(cuts, began, expiring):
    """``began``: events from there on are committed with histories."""
    keeper, lost = Keeper(), dict.fromkeys(range(USERS), 0)
    seen = dict.fromkeys(range(USERS), 0)
    places = sorted({0, began, EVENTS, *cuts})
    for k, (first, last) in enumerate(pairwise(places)):
        part = stream().take(slice(first, last))
        anew = {number for commit, number in expiring if commit == k and f"u{number}" in names(part)}
        for number in anew:
            lost[number] = seen[number]
        for code in part.user.tolist():
            seen[int(part.user_ids[code][1:])] += 1
        keeper.keep = first >= began
        keeper.commit(part, frozenset(f"u{number}".encode() for number in anew))
    assert counted(keeper) == recounted(keeper)
    whole, late = expected(stream()), expected(stream().take(slice(began, EVENTS)))
    assert {user for user, _, _ in keeper.book.walk()} == set(late)
    for user, _, history in keeper.book.walk():
        number = int(user[1:])
        before = len(whole[user][0]) - len(late[user][0])
        dropped = max(before - lost[number], 0) // 32 * 32
        assert history.first.tolist() == [dropped]
        assert history.item.tolist() == whole[user][0][lost[number] + dropped :]


def names(part: Interactions) -> set[str]:
    return {part.user_ids[code] for code in part.user.tolist()}


@given(cuts=CUTS, limit=st.integers(1, EVENTS))
def test_shrinking_keeps_the_smallest_hashes_whenever_it_comes(cuts, limit):
    limits = HistoryLimits(limit, 1 << 20)
    keeper = Keeper(limits=limits)
    places = sorted({0, EVENTS, *cuts})
    for first, last in pairwise(places):
        keeper.commit(stream().take(slice(first, last)))
        keeper.book.shrink()
        assert counted(keeper) == recounted(keeper)
    threshold = keeper.book.counts().threshold
    whole = expected(stream())
    assert keeper.held() == {user: events for user, events in whole.items() if owner(user) < threshold}
    assert keeper.book.counts().events <= limit
    at_once = Keeper(limits=limits).commits(stream(), [])
    at_once.book.shrink()
    assert at_once.contents() == keeper.contents()


@given(cuts=CUTS, flips=st.integers(0, 2**32 - 1))
def test_what_is_read_is_what_was_learned_in_any_order(cuts, flips):
    keeper = Keeper().commits(stream(), cuts)
    rng = np.random.default_rng(flips)
    whole = expected(stream())
    users = [f"u{k}".encode() for k in rng.permutation(USERS)] + [b"nobody"]
    events = np.array([len(whole[user][0]) if user in whole else 40 for user in users])
    histories, complete = keeper.book.read(users, events)
    assert complete.tolist() == [True] * USERS + [False]
    assert histories.lengths.tolist() == [*events[:-1].tolist(), 0]
    assert histories.label.tolist() == [label for user in users[:-1] for label in whole[user][1]]
    assert histories.grade.tolist() == [grade for user in users[:-1] for grade in whole[user][2]]
    wanted = features_of(users[:-1])
    assert histories.features.columns.tolist() == wanted.columns.tolist()
    assert histories.features.weights.tolist() == wanted.weights.tolist()
    assert histories.features.starts.tolist() == [*wanted.starts.tolist(), wanted.starts[-1]]


@pytest.mark.parametrize("seed", range(3))
def test_rocksdb_has_the_same_bytes_after_it_was_opened_again(seed):
    rng = np.random.default_rng(seed)
    with TemporaryDirectory() as directory:
        path, part = Path(directory) / "s", EVENTS // 3
        for k in range(3):
            with RocksUserStore(path, layout_of(32)) as store:
                kept = Keeper(store)
                kept.commits(stream().take(slice(part * k, part * k + part)), rng.integers(1, part, 5).tolist())
                assert counted(kept) == recounted(kept)
        with RocksUserStore(path, layout_of(32)) as store:
            assert Keeper(store).contents() == uncut()
