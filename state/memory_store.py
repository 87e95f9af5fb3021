"""The twin of ``RocksUserStore`` in a dictionary: the same contract, for tests and for runs that need no durability."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from learner.user_state import RowLayout, Slab
from state import codec
from state.codec import Progress
from state.exceptions import StoreClosed
from state.history_cursor import HistoryCursor, MemoryCursor
from state.keys import HISTORY, NOTHING, OWN, checked_histories, checked_own


class MemoryUserStore:
    """See ``state.store.UserStore``; rows are held as they would be stored."""

    def __init__(self, layout: RowLayout) -> None:
        self.layout = layout
        self._rows: dict[bytes, bytes] | None = {}
        self._progress: bytes | None = None
        self._own: dict[bytes, bytes] = {}
        self._histories: dict[bytes, bytes] = {}
        self._history_keys: list[bytes] = []
        """Those of ``_histories`` in order, but for ``_new_keys``; and some that are gone"""
        self._new_keys: set[bytes] = set()
        self._cursors: weakref.WeakSet[MemoryCursor] = weakref.WeakSet()
        self._restoring = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def get_many(self, users: Sequence[bytes]) -> tuple[Slab, NDArray[np.bool_]]:
        """See ``UserStore``."""
        return codec.decode_found(self.layout, users, list(map(self._held().get, users)))

    def write_batch(
        self,
        users: Sequence[bytes],
        rows: Slab,
        progress: Progress | None,
        *,
        deleted: Sequence[bytes] = (),
        own: Mapping[bytes, bytes | None] = NOTHING,
        histories: Mapping[bytes, bytes | None] = NOTHING,
    ) -> list[bytes]:
        """See ``UserStore``."""
        checked_own(own)
        checked_histories(histories)
        packed = self._progress if progress is None else progress.encode()
        values = codec.seal(self.layout, users, rows)
        self._held().update(zip(users, values, strict=True))
        for user in deleted:
            self._held().pop(user, None)
        _put(self._own, own)
        if (users or deleted) and HISTORY not in histories:
            self._cut_histories(HISTORY)
        self._put_histories(histories)
        self._progress = packed
        return values

    def own(self, prefix: bytes = OWN) -> list[tuple[bytes, bytes]]:
        """See ``UserStore``."""
        self._held()
        return sorted(entry for entry in self._own.items() if entry[0].startswith(prefix))

    def histories(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """See ``UserStore``."""
        self._held()
        return list(map(self._histories.get, keys))

    def history_cursor(self) -> HistoryCursor:
        """See ``UserStore``."""
        self._held()
        known = dict.fromkeys((*self._history_keys, *self._new_keys))
        self._history_keys = sorted(key for key in known if key in self._histories)  # nearly in order: fast
        self._new_keys = set()
        cursor = MemoryCursor(self._history_keys, self._histories.copy())
        self._cursors.add(cursor)
        return cursor

    def cut_histories(self, first: bytes, histories: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """See ``UserStore``."""
        checked_histories(histories)
        self._held()
        self._cut_histories(first)
        self._put_histories(histories)

    def _cut_histories(self, first: bytes) -> None:
        self._put_histories({key: None for key in self._histories if key >= first})

    def _put_histories(self, histories: Mapping[bytes, bytes | None]) -> None:
        self._new_keys.update(histories.keys() - self._histories.keys())
        _put(self._histories, histories)

    def progress(self) -> Progress | None:
        """See ``UserStore``."""
        self._held()
        return None if self._progress is None else Progress.decode(self._progress)

    def iterate(self, after: bytes | None = None) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        """See ``UserStore``."""
        return self._walk(sorted((u, v) for u, v in self._held().items() if after is None or u > after))

    def stored(self, after: bytes | None = None) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """See ``UserStore``; all at once here."""
        rows = sorted((u, v) for u, v in self._held().items() if after is None or u > after)
        if rows:
            yield [user for user, _ in rows], [row for _, row in rows]

    def stored_row(self, user: bytes) -> bytes | None:
        """See ``UserStore``."""
        return self._held().get(user)

    def approximate_count(self) -> int:
        """See ``UserStore``; exact here."""
        return len(self._held())

    def sync(self) -> None:
        """See ``UserStore``; memory has nothing to force."""
        self._held()

    def restoring(self) -> bool:
        """See ``UserStore``."""
        self._held()
        return self._restoring

    def begin_restore(self, *, empty: bool) -> None:
        """See ``UserStore``."""
        held, self._restoring = self._held(), True
        if empty:
            held.clear()
            self._own.clear()
            self._cut_histories(HISTORY)
            self._progress = None

    def end_restore(self, progress: Progress, own: Mapping[bytes, bytes | None] = NOTHING) -> None:
        """See ``UserStore``."""
        self._held()
        _put(self._own, checked_own(own))
        self._progress, self._restoring = progress.encode(), False

    def close(self) -> None:
        """See ``UserStore``; the rows are gone."""
        self._rows = None
        for cursor in list(self._cursors):
            cursor.close()

    def _walk(self, rows: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, NDArray[np.uint8]]]:
        for user, row in rows:
            self._held()
            yield user, codec.decode(self.layout, [user], [row])[0]

    def _held(self) -> dict[bytes, bytes]:
        if self._rows is None:
            raise StoreClosed("the store in memory is closed: make another")
        return self._rows


def _put(held: dict[bytes, bytes], entries: Mapping[bytes, bytes | None]) -> None:
    for key, value in entries.items():
        if value is None:
            held.pop(key, None)
        else:
            held[key] = value
