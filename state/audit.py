"""Is a store what a stream must have left? Every row is read and counted; nothing is written.

By itself a store tells whether its rows are sound (checksum, owner, version), lie within its progress, and add up to
it. Held against what a source's events give (``Expected``, see ``learner.tally``) it tells whether every user has
applied the same events, each of them once. Damage is counted, and the walk goes on after it where it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.user_state import RowLayout, Rows
from state import codec
from state.codec import UNKNOWN, Progress
from state.exceptions import RowDamaged, StoreUnreadable
from state.store import RocksReader

MOST_FINDINGS = 1000
"""Findings that a report keeps; those beyond are counted"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be."""

    kind: str
    """damaged, unreadable, unfinished, progress, totals, missing, extra, differs, clock, source, erased"""
    text: str
    """One line"""
    user: bytes | None = None
    offset: int | None = None
    """The first offset that it concerns, as far as it is known"""
    exact: bool = False
    """Whether it begins just at ``offset``; else there or before"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        user = None if self.user is None else self.user.decode(errors="backslashreplace")
        return {"kind": self.kind, "user": user, "offset": self.offset, "exact": self.exact, "text": self.text}


class Expected(NamedTuple):
    """What a source's events up to the store's offset give, for U users."""

    users: Mapping[bytes, int]
    """Id -> place in the arrays"""
    events: NDArray[np.int64]
    """(U,) 0: the user must not be there"""
    ledgers: NDArray[np.uint64]
    """(U,)"""
    last_offsets: NDArray[np.int64]
    """(U,)"""
    idle_up_to: int
    """Users whose latest event has this offset or an earlier one may have been swept out"""


class Difference(NamedTuple):
    """A user on whom store and source disagree."""

    user: bytes
    held: tuple[int, int] | None
    """(events, last offset) of the row; None: there is no row"""
    due: tuple[int, int] | None
    """(events, last offset) after the source; None: it has no such user"""

    @property
    def bound(self) -> int:
        """The disagreement begins at this offset or before it; or, where the row ends too early, after it."""
        return min(side[1] for side in (self.held, self.due) if side is not None)


@dataclass(slots=True)
class Audit:
    """What an audit has found."""

    path: Path
    progress: Progress | None
    users: int = 0
    """Sound rows"""
    events: int = 0
    """The sum of theirs"""
    findings: list[Finding] = field(default_factory=list)
    found: int = 0
    """All findings, of which ``findings`` keeps MOST_FINDINGS"""
    damaged: int = 0
    """Rows that are not what was written"""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, and why"""
    source_events: int | None = None
    """Events of the source up to the store's offset; None: it was not compared with one"""
    differences: list[Difference] = field(default_factory=list)
    """Not yet findings: whoever has the source can say more of them"""

    @property
    def sound(self) -> bool:
        """Whether nothing was found."""
        return self.found == 0 and not self.differences

    @property
    def first(self) -> Finding | None:
        """The finding with the smallest offset."""
        placed = [finding for finding in self.findings if finding.offset is not None]
        return min(placed, key=lambda finding: finding.offset or 0, default=None)

    def add(
        self, kind: str, text: str, user: bytes | None = None, offset: int | None = None, exact: bool = False
    ) -> None:
        """Puts a finding down."""
        self.found += 1
        if len(self.findings) < MOST_FINDINGS:
            self.findings.append(Finding(kind, text, user, offset, exact))


def audit(store: RocksReader, expected: Expected | None = None) -> Audit:
    """Walks a whole store, beside a writer or not. What disagrees with ``expected`` becomes ``Audit.differences``.

    Raises StoreDamaged when its progress cannot be read: nothing can be compared with it.
    """
    result = Audit(store.path, store.progress())
    seen = None if expected is None else np.zeros(len(expected.users), np.bool_)
    complete = True
    if store.restoring():
        result.add("unfinished", f"a restore into {store.path} was interrupted, rows may be missing: restore it again")
    try:
        for users, values in store.stored():
            kept, rows = _sound_rows(result, store.layout, users, values)
            result.users += len(kept)
            result.events += int(rows["events"].sum())
            _check_rows(result, kept, rows)
            if expected is not None and seen is not None:
                _compare(result, expected, seen, kept, rows, set(users))
    except StoreUnreadable as error:
        result.add("unreadable", f"{error}; the rows from there on were not read")
        complete = False
    if complete:
        _check_totals(result)
        if expected is not None and seen is not None:
            result.differences += _missing(expected, seen)
    else:
        result.notes.append("totals and missing users were not checked: not all rows could be read")
    return result


def shown(user: bytes) -> str:
    """An id in a line of text: printable, and not too long."""
    name = ascii(user.decode(errors="backslashreplace"))
    return name if len(name) <= 80 else f"{name[:60]}… ({len(user):,} bytes)"


def _sound_rows(result: Audit, layout: RowLayout, users: list[bytes], values: list[bytes]) -> tuple[list[bytes], Rows]:
    """Those of the rows that are what was written; the others become findings."""
    try:
        return users, layout.rows(codec.decode(layout, users, values))
    except RowDamaged:
        pass
    kept: list[bytes] = []
    slabs = [np.zeros((0, layout.row_bytes), np.uint8)]
    for user, value in zip(users, values, strict=True):
        try:
            slabs.append(codec.decode(layout, [user], [value]))
            kept.append(user)
        except RowDamaged as error:
            result.damaged += 1
            result.add("damaged", f"the row of user {shown(user)} {error.damage}", user)
    return kept, layout.rows(np.concatenate(slabs))


def _check_rows(result: Audit, users: Sequence[bytes], rows: Rows) -> None:
    """Each row against the store's progress."""
    progress = result.progress
    if progress is None:
        for user in users:
            result.add("progress", f"user {shown(user)} has a row, but the store says it has applied nothing", user)
        return
    for k in np.flatnonzero(rows["events"] < 1).tolist():
        result.add("progress", f"user {shown(users[k])} has a row without events", users[k])
    for k in np.flatnonzero(rows["last_offset"] > progress.offset).tolist():
        offset = int(rows["last_offset"][k])
        text = f"user {shown(users[k])} has applied offset {offset}, the store only offsets up to {progress.offset}"
        result.add("progress", text, users[k], offset)
    for k in np.flatnonzero(rows["meta_version"] > progress.meta_version).tolist():
        version = int(rows["meta_version"][k])
        text = f"user {shown(users[k])} starts from meta version {version}, the store is at {progress.meta_version}"
        result.add("progress", text, users[k])


def _check_totals(result: Audit) -> None:
    progress = result.progress
    if progress is None:
        return
    if progress.users == UNKNOWN:
        result.notes.append("totals were not checked: the store was written by a version that did not count them")
        return
    if result.damaged:
        result.notes.append(f"totals were not checked: {result.damaged:,} rows are damaged")
        return
    for name, held, said in (("users", result.users, progress.users), ("events", result.events, progress.events)):
        if held != said:
            result.add("totals", f"the rows are of {held:,} {name}, the store says {said:,}")


def _compare(
    result: Audit, expected: Expected, seen: NDArray[np.bool_], users: Sequence[bytes], rows: Rows, named: set[bytes]
) -> None:
    """The rows of ``users`` against the source; ``named`` has the damaged ones too, who are not missing."""
    for user in named.difference(users):
        if user in expected.users:
            seen[expected.users[user]] = True
    places = np.fromiter((expected.users.get(user, -1) for user in users), np.int64, len(users))
    due = places >= 0
    due[due] = expected.events[places[due]] > 0
    seen[places[due]] = True
    differs = np.ones(len(users), np.bool_)
    differs[due] = rows["ledger"][due] != expected.ledgers[places[due]]
    differs[due] |= rows["events"][due] != expected.events[places[due]].astype(np.uint64)
    for k in np.flatnonzero(differs).tolist():
        held = int(rows["events"][k]), int(rows["last_offset"][k])
        place = int(places[k])
        result.differences.append(Difference(users[k], held, _due(expected, place) if due[k] else None))


def _missing(expected: Expected, seen: NDArray[np.bool_]) -> Iterator[Difference]:
    """Users of the source without a row, who were not idle."""
    absent = ~seen & (expected.events > 0) & (expected.last_offsets > expected.idle_up_to)
    if not absent.any():
        return
    for user, place in expected.users.items():
        if absent[place]:
            yield Difference(user, None, _due(expected, place))


def _due(expected: Expected, place: int) -> tuple[int, int]:
    return int(expected.events[place]), int(expected.last_offsets[place])
