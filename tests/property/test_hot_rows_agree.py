"""Partitions that share a small memory answer as dictionaries would, whatever fails and in whatever order they come."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from learner.user_state import RowLayout
from state.exceptions import StoreWriteFailed
from state.hot_rows import HotMemory, HotRows
from state.memory_store import MemoryUserStore

LAYOUT = RowLayout("gradient", 2, 0, 0)
CAPACITY = 5
PARTITIONS = st.integers(0, 2)
NAMES = st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"])
COMMITS = st.dictionaries(NAMES, st.integers(0, 3), max_size=CAPACITY)
"""User -> how many events it applies"""


class Refusing(MemoryUserStore):
    """Refuses its next write when told to, before or after it is done."""

    refuse: str | None = None

    def write_batch(self, users, rows, progress, **more):
        refuse, self.refuse = self.refuse, None
        if refuse is None:
            return super().write_batch(users, rows, progress, **more)
        if refuse != "before":
            super().write_batch(users, rows, progress, **more)
        raise StoreWriteFailed("the store in memory refuses")


class HotRowsAgainstDictionaries(RuleBasedStateMachine):
    """Three partitions, one memory; of each partition a dictionary: user -> events applied."""

    @initialize()
    def open(self) -> None:
        self.memory = HotMemory(LAYOUT, CAPACITY)
        self.stores = [Refusing(LAYOUT) for _ in range(3)]
        self.hots = [HotRows(store, self.memory) for store in self.stores]
        self.expected: list[dict[bytes, int]] = [{}, {}, {}]
        self.offset = 0

    @rule(partition=PARTITIONS, commit=COMMITS, refuse=st.sampled_from([None, None, "before", "after"]))
    def commit(self, partition: int, commit: dict[bytes, int], refuse: str | None) -> None:
        hot, expected, users = self.hots[partition], self.expected[partition], list(commit)
        slots, unknown = hot.acquire(users)
        assert {users[k] for k in unknown.tolist()} == set(users) - set(expected)
        assert len(set(slots.tolist())) == len(users)
        assert self.memory.rows["events"][slots].tolist() == [expected.get(user, 0) for user in users]
        self.memory.rows["events"][slots] += np.fromiter(commit.values(), np.uint64, len(commit))
        self.offset += 1
        self.stores[partition].refuse = refuse
        if refuse is None:
            hot.write(slots, self.offset, 0)
        else:
            with pytest.raises(StoreWriteFailed):
                hot.write(slots, self.offset, 0)
            assert not any(self.memory._owners[k] is hot._index for k in np.flatnonzero(self.memory._held).tolist())
        if refuse != "before":
            self.expected[partition] = expected | {user: expected.get(user, 0) + n for user, n in commit.items()}

    @rule(partition=PARTITIONS, commit=COMMITS)
    def abandon(self, partition: int, commit: dict[bytes, int]) -> None:
        """The walk fails after it has changed rows in memory."""
        slots = self.hots[partition].acquire(list(commit)).slots
        self.memory.rows["events"][slots] += np.uint64(77)
        self.hots[partition].forget()

    @rule(partition=PARTITIONS, users=st.lists(NAMES, min_size=CAPACITY + 1, max_size=8, unique=True))
    def ask_too_much(self, partition: int, users: list[bytes]) -> None:
        with pytest.raises(ValueError, match="more than the 5 rows"):
            self.hots[partition].acquire(users)

    @rule(partition=PARTITIONS, users=st.sets(NAMES))
    def forget(self, partition: int, users: set[bytes]) -> None:
        self.hots[partition].forget(sorted(users))

    @rule(partition=PARTITIONS, commit=COMMITS)
    def set_the_store_back(self, partition: int, commit: dict[bytes, int]) -> None:
        """A commit that the store loses afterwards, as after power loss."""
        store, before = self.stores[partition], dict(self.expected[partition])
        rows, progress = dict(store._rows), store._progress
        self.commit(partition, commit, None)
        store._rows, store._progress, self.expected[partition] = rows, progress, before

    @invariant()
    def the_stores_hold_what_the_dictionaries_say(self) -> None:
        for store, expected in zip(getattr(self, "stores", []), getattr(self, "expected", []), strict=True):
            found = {user: int(LAYOUT.rows(row[None])["events"][0]) for user, row in store.iterate()}
            assert found == expected
            progress = store.progress()
            if progress is not None:
                assert (progress.users, progress.events) == (len(expected), sum(expected.values()))

    @invariant()
    def every_slot_has_one_owner_who_knows_it(self) -> None:
        if not hasattr(self, "memory"):
            return
        memory = self.memory
        held = np.flatnonzero(memory._held).tolist()
        assert len(held) <= CAPACITY
        indexes = {id(hot._index): hot._index for hot in self.hots}
        assert sum(map(len, indexes.values())) == len(held)
        for slot in held:
            assert memory._owners[slot][memory.users[slot]] == slot
        free = [*memory._free, *range(memory._fresh, CAPACITY)]
        assert sorted(free + held) == list(range(CAPACITY))


TestHotRowsAgainstDictionaries = HotRowsAgainstDictionaries.TestCase
TestHotRowsAgainstDictionaries.settings = settings(
    max_examples=max(120, settings.default.max_examples // 5), stateful_step_count=30
)
