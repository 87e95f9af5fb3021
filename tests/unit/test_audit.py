"""An audit finds what is wrong with a store, and names the user and the offset where it began."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.settings import StateSettings
from learner.interactions import Interactions
from learner.ledger import chain, chain_back, extend_ledger
from learner.tally import Tally
from learner.user_state import RowLayout, item_hash
from state.audit import MOST_FINDINGS, Audit, audit
from state.codec import UNKNOWN, Progress
from state.expiry import Expiry, pack_clock
from state.keys import PROGRESS_KEY, user_key
from state.receipt import Receipt, Removal
from state.store import RocksReader, RocksUserStore
from streams.processor import DAY_MS, Processor
from streams.verification import VerificationError, verify_store
from tests.models import random_stream, small_model

LAYOUT = RowLayout("gradient", 2, 0, 4)


# --- a store of our own making


def events_of(users: dict[str, int], seed: int = 0) -> Interactions:
    """So many events of each user, shuffled; offsets 10, 11, …"""
    rng = np.random.default_rng(seed)
    names = rng.permutation([user for user, count in users.items() for _ in range(count)]).tolist()
    n = len(names)
    return Interactions.from_columns(
        names, [f"i{k}" for k in rng.integers(0, 9, n)], rng.integers(0, 2, n).astype(np.int8),
        1_600_000_000_000 + np.cumsum(rng.integers(0, 9000, n)), offsets=10 + np.arange(n),
    )  # fmt: skip


def row_of(events: Interactions, places: Sequence[int]) -> np.ndarray:
    """A row that has applied the events at these places, in this order."""
    slab = np.zeros((1, LAYOUT.row_bytes), np.uint8)
    row = LAYOUT.rows(slab)[0]
    ledger = np.uint64(0)
    for k in places:
        hashed = np.uint64(item_hash(events.item_ids[events.item[k]]))
        ledger = np.uint64(extend_ledger(ledger, events.offset[k], hashed, events.label[k], events.event_time_ms[k]))
    row["events"], row["ledger"] = len(places), ledger
    row["last_offset"] = max(int(events.offset[k]) for k in places)
    row["first_time_ms"] = events.event_time_ms[places[0]]
    return slab


def places_of(events: Interactions, user: str) -> list[int]:
    return np.flatnonzero(events.user == events.user_ids.index(user)).tolist()


def stored(
    path: Path, stream: Interactions, changed: dict[str, Sequence[int] | None] | None = None, **progress: int
) -> Path:
    """A store that has applied the events; ``changed`` gives what a user's row has applied instead."""
    applied = {user: places_of(stream, user) for user in stream.user_ids} | (changed or {})
    rows = {user: row_of(stream, places) for user, places in applied.items() if places is not None}
    kept = sum(len(places) for places in applied.values() if places is not None)
    said = {"offset": int(stream.offset[-1]), "meta_version": 0, "users": len(rows), "events": kept} | progress
    with RocksUserStore(path, LAYOUT) as store:
        slab = np.concatenate(list(rows.values()))
        store.write_batch([user.encode() for user in rows], slab, Progress(**said))
    return path


def texts(result: Audit) -> list[str]:
    return [f"{finding.kind}: {finding.text}" for finding in result.findings]


USERS = {"ann": 20, "bob": 12, "cid": 1, "dot": 40}


@pytest.fixture
def events() -> Interactions:
    return events_of(USERS)


# --- the store by itself


def test_a_sound_store_is_counted_and_found_sound(tmp_path, events):
    result = verify_store(stored(tmp_path / "s", events))
    assert result.sound
    assert (result.users, result.events, result.findings, result.notes) == (4, 73, [], [])
    assert result.source_events is None


def test_an_empty_store_is_sound(tmp_path):
    with RocksUserStore(tmp_path / "s", LAYOUT):
        pass
    result = verify_store(tmp_path / "s", lambda: [events_of(USERS)])
    assert result.sound
    assert result.progress is None


def test_every_damaged_row_is_told_and_the_others_are_still_counted(tmp_path, events):
    path = stored(tmp_path / "s", events)
    with RocksUserStore(path, LAYOUT) as store:
        values = {user: store.stored_row(user) for user in (b"bob", b"dot", b"ann")}
        flipped = bytearray(values[b"bob"])
        flipped[70] ^= 1
        store._open_db().put(user_key(b"bob"), bytes(flipped))
        store._open_db().put(user_key(b"dot"), values[b"ann"])
        store._open_db().put(user_key(b"cid"), b"short")
    result = verify_store(path, lambda: [events])
    assert texts(result) == [
        "damaged: the row of user 'bob' fails its checksum",
        f"damaged: the row of user 'cid' has 5 bytes where {LAYOUT.fingerprint} has {LAYOUT.row_bytes}",
        "damaged: the row of user 'dot' is another user's row",
    ]
    assert (result.users, result.damaged, result.found) == (1, 3, 3)
    assert result.notes == ["totals were not checked: 3 rows are damaged"]


def test_rows_beyond_the_progress_are_told(tmp_path, events):
    last = int(events.offset[places_of(events, "ann")[-1]])
    path = stored(tmp_path / "s", events, offset=last - 1)
    result = verify_store(path)
    assert f"progress: user 'ann' has applied offset {last}, the store only offsets up to {last - 1}" in texts(result)
    assert not result.sound


def test_rows_of_a_later_meta_version_or_without_events_are_told(tmp_path, events):
    path = stored(tmp_path / "s", events)
    with RocksUserStore(path, LAYOUT) as store:
        rows, _ = store.get_many([b"ann", b"bob"])
        LAYOUT.rows(rows)["meta_version"][0] = 3
        LAYOUT.rows(rows)["events"][1] = 0
        store.write_batch([b"ann", b"bob"], rows, None)
    assert texts(verify_store(path)) == [
        "progress: user 'bob' has a row without events",
        "progress: user 'ann' starts from meta version 3, the store is at 0",
        "totals: the rows are of 61 events, the store says 73",
    ]


@pytest.mark.parametrize(("said", "text"), [("users", "4 users, the store says 5"), ("events", "73 events, the store")])
def test_totals_that_do_not_add_up_are_told(tmp_path, events, said, text):
    path = stored(tmp_path / "s", events, **{said: 5})
    assert text in texts(verify_store(path))[0]


def test_totals_that_nobody_counted_are_noted_and_not_found_fault_with(tmp_path, events):
    result = verify_store(stored(tmp_path / "s", events, users=UNKNOWN, events=UNKNOWN))
    assert result.sound
    assert result.notes == ["totals were not checked: the store was written by a version that did not count them"]


def test_rows_without_any_progress_are_told(tmp_path, events):
    path = stored(tmp_path / "s", events)
    with RocksUserStore(path, LAYOUT) as store:
        store._open_db().delete(PROGRESS_KEY)
    result = verify_store(path, lambda: [events])
    assert len([text for text in texts(result) if "the store says it has applied nothing" in text]) == 4


def test_files_that_cannot_be_read_end_the_walk_and_are_told(tmp_path):
    many = events_of({f"user{k:05}": 1 for k in range(3000)})
    path = stored(tmp_path / "s", many)
    table = max(path.glob("*.sst"), key=lambda file: file.stat().st_size)
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 0xFF
    table.write_bytes(content)
    result = verify_store(path, lambda: [many])
    assert [finding.kind for finding in result.findings] == ["unreadable"]
    assert 0 < result.users < 3000
    assert result.notes == ["totals and missing users were not checked: not all rows could be read"]


def test_an_audit_writes_nothing_and_goes_beside_a_writer(tmp_path, events):
    path = stored(tmp_path / "s", events)
    with RocksUserStore(path, LAYOUT):
        before = {file.name: file.read_bytes() for file in path.iterdir()}
        assert verify_store(path, lambda: [events]).sound
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_report_keeps_a_thousand_findings_and_counts_the_rest(tmp_path):
    many = events_of({f"user{k:05}": 1 for k in range(1500)})
    path = stored(tmp_path / "s", many, meta_version=0)
    with RocksUserStore(path, LAYOUT) as store:
        users = [user for user, _ in store.iterate()]
        rows, _ = store.get_many(users)
        LAYOUT.rows(rows)["meta_version"] = 1
        store.write_batch(users, rows, None)
    result = verify_store(path)
    assert (len(result.findings), result.found) == (MOST_FINDINGS, 1500)


# --- against the source


def found(path: Path, events: Interactions) -> tuple[str, int | None, bool]:
    """(text, offset, exact) of the only finding, which is of ann."""
    result = verify_store(path, lambda: [events])
    told = [finding for finding in result.findings if finding.user == b"ann"]
    assert len(told) == result.found == 1, texts(result)
    return told[0].text, told[0].offset, told[0].exact


def test_a_store_that_applied_every_event_once_agrees_with_its_source(tmp_path, events):
    result = verify_store(stored(tmp_path / "s", events), lambda: [events])
    assert result.sound
    assert result.source_events == 73


def test_events_after_the_stores_offset_do_not_count(tmp_path, events):
    path = stored(tmp_path / "s", events.take(slice(0, 50)).pruned())
    result = verify_store(path, lambda: [events.take(slice(0, 47)), events.take(slice(47, 73))])
    assert result.sound, texts(result)
    assert result.source_events == 50


@pytest.mark.parametrize("lost", [0, 7, 18])
def test_a_lost_event_is_named(tmp_path, events, lost):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[:lost] + places[lost + 1 :]})
    offset = int(events.offset[places[lost]])
    what = f"user 'ann' has 19 events, the source 20; offset {offset}: 1 event from there on was lost"
    assert found(path, events) == (what, offset, True)


def test_a_lost_stretch_is_named_by_its_first_event(tmp_path, events):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[:3] + places[9:]})
    offset = int(events.offset[places[3]])
    assert found(path, events)[0].endswith(f"offset {offset}: 6 events from there on were lost")


@pytest.mark.parametrize("doubled", [0, 7, 19])
def test_a_doubled_event_is_named(tmp_path, events, doubled):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[: doubled + 1] + places[doubled:]})
    offset = int(events.offset[places[doubled]])
    what = f"user 'ann' has 21 events, the source 20; offset {offset}: 1 event from there on was applied twice"
    assert found(path, events) == (what, offset, True)


def test_a_doubled_batch_is_named_by_its_first_event(tmp_path, events):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[:12] + places[8:]})
    offset = int(events.offset[places[8]])
    assert found(path, events)[0].endswith(f"offset {offset}: 4 events from there on were applied twice")


def test_a_row_that_ends_too_early_is_named_by_what_is_missing(tmp_path, events):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[:15]})
    offset = int(events.offset[places[15]])
    what = f"user 'ann' has 15 events, the source 20; offset {offset}: 5 events from there on are missing"
    assert found(path, events) == (what, offset, True)


def test_an_event_lost_before_a_row_ends_too_early_is_named(tmp_path, events):
    places = places_of(events, "ann")
    path = stored(tmp_path / "s", events, {"ann": places[:4] + places[5:15]})
    offset = int(events.offset[places[4]])
    assert found(path, events)[1:] == (offset, True)


def test_two_events_that_changed_places_differ(tmp_path, events):
    places = places_of(events, "ann")
    swapped = [*places[:5], places[6], places[5], *places[7:]]
    text, offset, exact = found(stored(tmp_path / "s", events, {"ann": swapped}), events)
    assert text.startswith("user 'ann' has 20 events, other ones than the source; at or before offset ")
    assert offset >= events.offset[places[5]]
    assert not exact


def test_a_user_without_a_row_is_named_with_the_first_event(tmp_path, events):
    offset = int(events.offset[places_of(events, "ann")[0]])
    what = f"user 'ann' has no row, the source has 20 events; offset {offset}: the first event that is missing"
    assert found(stored(tmp_path / "s", events, {"ann": None}), events) == (what, offset, True)


def test_a_user_whom_the_source_does_not_know_is_named(tmp_path, events):
    others = events.take(np.flatnonzero(events.user != events.user_ids.index("ann"))).pruned()
    text, offset, _ = found(stored(tmp_path / "s", events), others)
    assert text.startswith("user 'ann' has 20 events, the source none that count; at or before offset ")
    assert offset == events.offset[places_of(events, "ann")[-1]]


def test_a_count_that_was_changed_is_told_from_events_that_were(tmp_path, events):
    path = stored(tmp_path / "s", events, events=72)
    with RocksUserStore(path, LAYOUT) as store:
        rows, _ = store.get_many([b"ann"])
        LAYOUT.rows(rows)["events"] = 19
        store.write_batch([b"ann"], rows, None)
    assert "the ledger agrees and the count does not" in found(path, events)[0]


def test_the_first_to_differ_of_several_users_is_named(tmp_path, events):
    ann, bob, dot = (places_of(events, user) for user in ("ann", "bob", "dot"))
    changed = {"ann": ann[:10] + ann[11:], "bob": bob[:3] + bob[4:], "dot": dot[:-1]}
    path = stored(tmp_path / "s", events, changed)
    result = verify_store(path, lambda: [events])
    offsets = {user: int(events.offset[k]) for user, k in ((b"ann", ann[10]), (b"bob", bob[3]), (b"dot", dot[-1]))}
    assert result.first is not None
    assert (result.first.user, result.first.offset) == min(offsets.items(), key=lambda item: item[1])
    assert [finding.offset for finding in result.findings] == sorted(offsets.values())


def test_a_source_that_is_shorter_than_the_store_is_told(tmp_path, events):
    result = verify_store(stored(tmp_path / "s", events), lambda: [events.take(slice(0, 60))])
    assert "source: the store is at offset 82, the source's latest event up to there at 69" in texts(result)


def test_more_users_than_are_traced_are_told_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("streams.verification.TRACED_USERS", 3)
    many = events_of({f"user{k}": 4 for k in range(10)})
    changed = {user: places_of(many, user)[1:] for user in many.user_ids}
    result = verify_store(stored(tmp_path / "s", many, changed), lambda: [many])
    assert result.found == 10
    assert sum(finding.exact for finding in result.findings) == 3
    assert "offsets were traced for 3 of 10 users" in result.notes[0]
    for finding in result.findings:
        first = int(many.offset[places_of(many, finding.user.decode())[0]])
        assert finding.offset == first if finding.exact else finding.offset >= first


# --- rows that a stream made


@pytest.fixture(scope="module")
def streamed(tmp_path_factory) -> tuple[Path, Interactions]:
    """A store of 300 events whose rows keep the latest four."""
    path, events = tmp_path_factory.mktemp("streamed") / "partition-0", random_stream(300, 12)
    with Processor(small_model(), lambda _, layout: RocksUserStore(path, layout), StateSettings(ring=4)) as work:
        work.process(0, events)
    return path, events


def test_what_a_processor_made_agrees_with_what_it_was_fed(streamed):
    path, events = streamed
    assert verify_store(path, lambda: [events.take(slice(0, 100)), events.take(slice(100, 300))]).sound


@pytest.mark.parametrize("column", ["label", "event_time_ms", "item"])
def test_another_event_is_found_in_the_ring(streamed, column):
    path, events = streamed
    places = places_of(events, "u3")
    k = places[-2]
    changed = getattr(events, column).copy()
    changed[k] = changed[k] ^ 1 if column == "label" else changed[k] + 10**9 if column == "event_time_ms" else 0
    assert changed[k] != getattr(events, column)[k]
    other = replace(events, **{column: changed})
    result = verify_store(path, lambda: [other])
    assert [(f.user, f.offset, f.exact) for f in result.findings] == [(b"u3", int(events.offset[k]), True)]
    assert result.findings[0].text.endswith("the row has another event there")


def test_a_change_from_before_the_ring_is_placed_no_later_than_it(streamed):
    path, events = streamed
    places = places_of(events, "u3")
    label = events.label.copy()
    label[places[2]] ^= 1
    other = replace(events, label=label)
    finding = verify_store(path, lambda: [other]).findings[0]
    assert (finding.offset, finding.exact) == (int(events.offset[places[-4]]), False)


# --- expiry and erasure


AFTER_MS = 1 << 20


def expiring_stream() -> Interactions:
    """ann, bob and the crowd; ann is away for twice the time and comes back, bob does not."""
    n = 6000
    times = 1_600_000_000_000 + np.arange(n) * (AFTER_MS // 1500)
    users = [f"c{k % 7}" for k in range(n)]
    users[10] = users[20] = users[5000] = users[5001] = "ann"
    users[15] = "bob"
    return Interactions.from_columns(users, [f"i{k % 5}" for k in range(n)], [k % 2 for k in range(n)], times)


def expired_store(path: Path, events: Interactions, days: float | None, sweeping: bool) -> Path:
    state = StateSettings(ring=4, expire_after_days=days, commit_events=500)
    with Processor(small_model("gradient"), lambda _, layout: RocksUserStore(path, layout), state) as work:
        if not sweeping:
            work.sweep = lambda *_: 0  # type: ignore[method-assign]
        work.process(0, events)
    return path


@pytest.mark.parametrize("sweeping", [True, False])
def test_users_who_expired_agree_with_the_source_whether_swept_or_not(tmp_path, sweeping):
    events, expiry = expiring_stream(), Expiry(AFTER_MS)
    path = expired_store(tmp_path / "s", events, AFTER_MS / DAY_MS, sweeping)
    result = verify_store(path, lambda: [events], expiry=expiry)
    assert result.sound, texts(result)
    assert result.users == 8 + (not sweeping)


def test_a_user_who_should_have_started_anew_is_named(tmp_path):
    events = expiring_stream()
    tally = Tally(Expiry(AFTER_MS).pace)
    tally.add(events)
    path = expired_store(tmp_path / "s", events, None, False)
    with RocksReader(path) as reader:
        layout, progress = reader.layout, reader.progress()
    with RocksUserStore(path, layout) as store:
        clocked = Progress(progress.offset, 0, progress.users, progress.events, 1, pack_clock(tally.clock))
        store.write_batch([], np.zeros((0, layout.row_bytes), np.uint8), clocked)
    result = verify_store(path, lambda: [events], expiry=Expiry(AFTER_MS))
    assert [finding.text for finding in result.findings] == [
        "user 'ann' has 4 events, the source 2; offset 5000: the user was idle and did not start anew there"
    ]


def test_a_clock_of_other_events_is_told(tmp_path):
    events = expiring_stream()
    path = expired_store(tmp_path / "s", events, AFTER_MS / DAY_MS, True)
    result = verify_store(path, lambda: [events], expiry=Expiry(AFTER_MS + 512))
    assert "clock" in {finding.kind for finding in result.findings}


def test_a_store_with_a_clock_is_not_held_against_a_source_without_one_nor_the_other_way(tmp_path, events):
    with pytest.raises(VerificationError, match=r"without state\.expire_after_days: verify it with the settings"):
        verify_store(stored(tmp_path / "s", events), lambda: [events], expiry=Expiry(AFTER_MS))
    path = expired_store(tmp_path / "t", expiring_stream(), AFTER_MS / DAY_MS, True)
    with pytest.raises(VerificationError, match=r"with state\.expire_after_days set"):
        verify_store(path, lambda: [expiring_stream()])
    assert verify_store(path).sound


def test_an_erased_user_is_not_missed_and_only_later_events_count(tmp_path, events):
    places = places_of(events, "ann")
    at = int(events.offset[places[12]])
    receipt = Receipt.of(b"ann", [Removal(0, True, 13, LAYOUT.row_bytes, at, 0)], {}, published=False)
    path = stored(tmp_path / "partition-0", events, {"ann": places[13:]})
    result = verify_store(path, lambda: [events], receipts={"r": receipt})
    assert [finding.kind for finding in result.findings] == ["erased"]
    path = stored(tmp_path / "other" / "partition-0", events, {"ann": None})
    later = Receipt.of(b"ann", [Removal(0, True, 20, LAYOUT.row_bytes, 82, 0)], {}, published=False)
    result = verify_store(path, lambda: [events], receipts={"r": later})
    assert result.sound, texts(result)
    assert result.notes == ["receipt r: unchanged since it was written; 3 ids of the store were searched"]


# --- the chain


def test_a_chain_is_followed_from_either_end():
    rng = np.random.default_rng(0)
    n = 100
    columns = (
        np.cumsum(rng.integers(1, 9, n)), rng.integers(0, 1 << 63, n).astype(np.uint64) * np.uint64(2),
        rng.integers(0, 2, n).astype(np.int8), rng.integers(-(1 << 40), 1 << 41, n),
    )  # fmt: skip
    forward = chain(*columns)
    assert len(set(forward.tolist())) == n + 1
    np.testing.assert_array_equal(chain_back(forward[-1], *columns), forward)


def test_an_audit_takes_an_open_store_too(tmp_path, events):
    with RocksUserStore(stored(tmp_path / "s", events), LAYOUT) as store:
        assert audit(store).sound
