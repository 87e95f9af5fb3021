"""No live user is ever dropped, idle ones are, and sweeping changes no bit of what is predicted or kept."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.settings import StateSettings
from learner.event_clock import FIRST_TURNS, NOBODY, ODD_TURNS, advance, new_clock
from learner.interactions import Interactions
from learner.user_state import HeadKind
from state.codec import Progress
from state.expiry import Expiry, idle_up_to
from state.memory_store import MemoryUserStore
from streams.processor import DAY_MS, Predictions, Processor
from tests.models import HEADS, ITEMS, small_model

AFTER_MS = 1 << 20
"""The configured time in the streams below, some 17 minutes"""
START_MS = 1_600_000_000_000
ODD_TIMES = (0, START_MS - 40 * AFTER_MS, START_MS + 400 * AFTER_MS, 1 << 61)


@dataclass(frozen=True)
class Stream:
    """Events of which some have a time that is not theirs."""

    honest_ms: NDArray[np.int64]
    """(N,) when each really came"""
    odd: NDArray[np.bool_]
    """(N,)"""
    times_ms: NDArray[np.int64]
    """(N,) what each says"""
    users: list[str]
    """(N,)"""

    def interactions(self, seed: int = 0) -> Interactions:
        """With random items, labels and offsets."""
        rng, n = np.random.default_rng(seed), len(self.users)
        return Interactions.from_columns(
            self.users,
            [f"i{k}" for k in rng.integers(0, ITEMS, n)],
            rng.integers(0, 2, n).astype(np.int8),
            self.times_ms,
            offsets=np.cumsum(rng.integers(1, 4, n)) if seed else np.arange(n),
        )


def rare_enough(odd: NDArray[np.bool_], users: list[str]) -> NDArray[np.bool_]:
    """The same, less those by which odd turns would outnumber the others by ODD_TURNS in some stretch."""
    kept, excess = odd.copy(), 0
    for n, user in enumerate(users):
        if n and users[n - 1] == user:
            continue
        if kept[n] and excess == ODD_TURNS - 1:
            kept[n] = False
        excess = excess + 1 if kept[n] else max(excess - 1, 0)
    return kept


def crowd(rng: np.random.Generator, n: int) -> list[str]:
    """40 users who come and go: each is around in some stretches of the stream only."""
    around = np.sort(rng.integers(0, 40, (n // 150 + 1, 4)), axis=1)
    return [f"u{k}" for k in around[np.arange(n) // 150, rng.integers(0, 4, n)]]


def made(
    seed: int, spans: list[tuple[int, int, int]], odd_share: float, one_device: bool, crowded: bool = False
) -> Stream:
    """Spans of (events, milliseconds between two, gap before them).

    Odd events come in runs: of up to 31, or of any length where they are all of one user, who has a wrong device.
    """
    rng = np.random.default_rng(seed)
    steps = np.concatenate([np.append(gap, rng.integers(0, 2 * every + 1, n - 1)) for n, every, gap in spans])
    honest, n = START_MS + np.cumsum(steps), len(steps)
    users = crowd(rng, n) if crowded else [f"u{k % 40}" for k in range(n)]
    odd = np.zeros(n, np.bool_)
    while odd.sum() < odd_share * n:
        start = rng.integers(0, n)
        odd[start : start + rng.choice([1, 2, 7, ODD_TURNS - 1, 300 if one_device else 1])] = True
    odd[: FIRST_TURNS // 2 + 1] = False
    if one_device:
        users = ["wrong" if is_odd else user for user, is_odd in zip(users, odd, strict=True)]
    odd = rare_enough(odd, users)
    said = np.full(n, rng.choice(ODD_TIMES)) if one_device or rng.random() < 0.6 else rng.choice(ODD_TIMES, n)
    return Stream(honest, odd, np.where(odd, said, honest), users)


spans = st.lists(
    st.tuples(
        st.integers(100, 2500),
        st.sampled_from([0, 10, AFTER_MS // 1000, AFTER_MS // 300, AFTER_MS // 100]),
        st.sampled_from([0, AFTER_MS // 20, AFTER_MS // 2, 3 * AFTER_MS, 20 * AFTER_MS]),
    ),
    min_size=1,
    max_size=5,
)
streams = st.builds(made, st.integers(0, 1 << 30), spans, st.sampled_from([0.0, 0.02, 0.1, 0.25]), st.booleans())


def idle_before(stream: Stream) -> NDArray[np.int64]:
    """(N,) the place up to which users are idle, before each event."""
    return advance(new_clock(), stream.interactions(), Expiry(AFTER_MS).pace).idle


@settings(max_examples=300)
@given(streams)
def test_no_user_is_idle_whose_last_honest_event_is_less_than_the_time_ago(stream):
    """Of all users at once: the idle ones are those up to an offset, and no honest event there may be recent."""
    idle = idle_before(stream)
    asked = np.flatnonzero(idle > NOBODY)
    asked = asked[asked > 0]
    honest_so_far = np.maximum.accumulate(np.where(stream.odd, 0, stream.honest_ms))
    away = honest_so_far[asked - 1] - honest_so_far[idle[asked]]
    assert (away > AFTER_MS).all()


@settings(max_examples=100)
@given(streams, st.sampled_from([0.0, 0.1, 0.25]), st.integers(0, 1 << 30))
def test_who_is_away_for_long_is_idle_once_enough_events_came(stream, odd_share, seed):
    """After any stream: when it goes on densely, the clock catches up, and everyone from before is idle."""
    reach = int(stream.honest_ms[-1] - START_MS) // AFTER_MS
    dense = made(seed, [(2 * 256 * (reach + 2) + 8000, AFTER_MS // 2000, 0)], odd_share, False)
    honest = np.concatenate([stream.honest_ms, dense.honest_ms - START_MS + stream.honest_ms[-1]])
    users = stream.users + dense.users
    odd = rare_enough(np.concatenate([stream.odd, dense.odd]), users)
    times = np.where(odd, np.concatenate([stream.times_ms, dense.times_ms]), honest)
    idle = idle_before(Stream(honest, odd, times, users))[-1]
    assert idle >= int(np.searchsorted(honest, honest[-1] - 1.5 * AFTER_MS, side="right")) - 1
    assert idle < int(np.searchsorted(honest, honest[-1] - AFTER_MS))


# --- rows


class Unswept(Processor):
    """Drops idle users only when they come back."""

    def sweep(self, partition: int, rows: int = 0) -> int:
        return 0


def streamed(
    kind: HeadKind, records: Interactions, cuts: list[int], commit_events: int, sweep_rows: int
) -> tuple[Predictions, Progress, dict[bytes, bytes], Processor]:
    """(predictions, progress, rows, the processor); ``sweep_rows`` 0 sweeps never."""
    state = StateSettings(commit_events=commit_events, ring=4, expire_after_days=AFTER_MS / DAY_MS)
    work = (Processor if sweep_rows else Unswept)(small_model(kind), lambda _, layout: MemoryUserStore(layout), state)
    parts = []
    for first, last in pairwise([0, *cuts, len(records)]):
        if sweep_rows:
            work.sweep(0, sweep_rows)
        parts.append(work.process(0, records.take(slice(first, last))))
    store = work.store(0)
    progress = store.progress()
    assert progress is not None
    rows = {user: row.tobytes() for user, row in store.iterate()}
    events = sum(int.from_bytes(row[8:16], "little") for row in rows.values())
    assert (progress.users, progress.events) == (len(rows), events)
    return Predictions(*map(np.concatenate, zip(*parts, strict=True))), progress, rows, work


def live(rows: dict[bytes, bytes], progress: Progress) -> dict[bytes, bytes]:
    """The rows of users who are not idle."""
    idle = idle_up_to(progress.clock)
    return {user: row for user, row in rows.items() if int.from_bytes(row[16:24], "little") > idle}


streams_of_rows = st.builds(
    made,
    st.integers(0, 1 << 30),
    st.lists(
        st.tuples(
            st.integers(300, 1500),
            st.sampled_from([AFTER_MS // 1000, AFTER_MS // 300]),
            st.sampled_from([0, AFTER_MS // 2, 2 * AFTER_MS]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.0, 0.1, 0.25]),
    st.booleans(),
    st.just(True),
)


UNSHRUNK = (Phase.explicit, Phase.reuse, Phase.generate)
"""A failing stream of thousands of events is found in a second, and would be shrunk for minutes."""


@settings(max_examples=60, phases=UNSHRUNK)
@given(
    stream=streams_of_rows,
    seed=st.integers(1, 1 << 20),
    kind=st.sampled_from(HEADS),
    cuts=st.lists(st.integers(1, 1500), max_size=12),
    commits=st.tuples(st.integers(50, 6000), st.integers(50, 6000)),
    sweep_rows=st.sampled_from([1, 5, 30, 2048]),
)
def test_sweeping_and_cutting_change_no_prediction_and_no_row_that_stays(stream, seed, kind, cuts, commits, sweep_rows):
    records = stream.interactions(seed)
    cuts = sorted({cut for cut in cuts if cut < len(records)})
    plain, at_end, rows, _ = streamed(kind, records, [], commits[0], 0)
    swept, swept_at_end, left, work = streamed(kind, records, cuts, commits[1], sweep_rows)
    for one, other in zip(plain, swept, strict=True):
        assert one.tobytes() == other.tobytes()
    assert swept_at_end.clock == at_end.clock
    assert live(left, swept_at_end) == live(rows, at_end)
    assert set(left) <= set(rows)
    work.sweep(0)  # the pass under way
    work.sweep(0)
    assert {user: row.tobytes() for user, row in work.store(0).iterate()} == live(rows, at_end)


@settings(max_examples=60, phases=UNSHRUNK)
@given(stream=streams_of_rows, seed=st.integers(1, 1 << 20), commit_events=st.integers(50, 3000))
def test_a_user_who_is_never_away_for_the_time_keeps_all_events(stream, seed, commit_events):
    records = stream.interactions(seed)
    _, _, rows, _ = streamed("gradient", records, [], commit_events, 2048)
    honest = ~stream.odd
    for code, user in enumerate(records.user_ids):
        mine = records.user == code
        kept = int.from_bytes(rows[user.encode()][8:16], "little") if user.encode() in rows else 0
        came = np.append(stream.honest_ms[mine & honest], stream.honest_ms[honest][-1])
        if mine[honest].any() and (np.diff(came) <= AFTER_MS).all() and honest[np.flatnonzero(mine)[0]]:
            assert kept == mine.sum(), user


@pytest.mark.parametrize("kind", HEADS)
def test_users_do_expire_and_get_swept_in_such_streams(kind):
    """So the properties above are about something."""
    stream = made(3, [(3000, AFTER_MS // 1000, 0), (3000, AFTER_MS // 1000, AFTER_MS // 2)], 0.1, False, True)
    records = stream.interactions(8)
    assert streamed(kind, records, [], 500, 0)[3].counts.users_expired > 20
    counts = streamed(kind, records, [], 500, 2048)[3].counts
    assert counts.users_swept > 20
