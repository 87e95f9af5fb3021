"""Asking a state directory about users, beside a live writer or not: nothing is written, no torch, no compiled code.

``StateReader(directory)`` keeps stores and model open; ``query`` answers for one user at one point of the stream, and
``diff`` for two points.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from learner.user_state import RowLayout
from state.exceptions import QueryError, SnapshotError, StoreMismatch, StoreUnfinished, StoreUnreadable
from state.expiry import idle_up_to
from state.reading.explain import explain, in_prior_sd
from state.reading.model_view import FILE, ModelView
from state.reading.moving import Moved, moved
from state.reading.point import NOW, Point
from state.reading.reports import (
    DiffReport,
    Found,
    UserReport,
    parameter_change,
    point_report,
    stranger_report,
    user_report,
)
from state.reading.scores import most_changed, scores, top
from state.reading.time_travel import Moment, Stored, Timeline
from state.store import RocksReader

if TYPE_CHECKING:  # few readers follow, and what it imports takes time
    from state.reading.following import FollowingReader

MOST_CHANGED = 5
"""Items that a diff names each way"""
_PARTITION = re.compile(r"partition-(\d+)")
_MANIFEST = "snapshot.json"


class StateReader:
    """The stores and the model of one state directory, kept open. Use as a context, or call ``close``.

    ``partition`` narrows it to one; else a user is looked for in all of them. With ``follow`` it can ``catch_up`` with
    a live writer; without, it answers as of its first question. Not for several threads at once.
    Raises StoreUnreadable, StoreDamaged, StoreMismatch.
    """

    def __init__(self, state: Path, *, partition: int | None = None, follow: bool = False) -> None:
        self.path = state
        self._follow = follow
        self._directories = _partitions(state, partition)
        self._stores: dict[int, RocksReader] = {}
        self._followers: list[FollowingReader] = []
        self._viewed: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases every handle; closing twice does nothing more."""
        self._followers.clear()
        while self._stores:
            self._stores.popitem()[1].close()

    def catch_up(self) -> None:
        """Takes in what the writer has written since; ValueError unless this reader follows."""
        if not self._follow:
            raise ValueError("this reader does not follow its writer: open it with follow=True")
        for follower in self._followers:
            follower.catch_up()
        if _identity(self.path / FILE) != self._viewed:
            self.__dict__.pop("view", None)

    @cached_property
    def view(self) -> ModelView | None:
        """The model beside the rows; None where there is none."""
        self._viewed = _identity(self.path / FILE)
        return None if self._viewed is None else ModelView(self.path)

    def query(
        self,
        user_id: str,
        *,
        items: Sequence[str] = (),
        count: int = 0,
        unseen: bool = False,
        at: Point = NOW,
        snapshots: Path | None = None,
        explained: bool = True,
    ) -> UserReport:
        """The user at a point, with the scores of ``items`` and of the ``count`` best of the catalogue.

        ``unseen`` leaves the user's latest items out of the best. ``explained`` says what moved the user. Raises
        QueryError where the point or what is asked cannot be told, RowDamaged, and StoreDamaged.
        """
        found = self._find(user_id, snapshots)
        view = found.view
        for item in items:
            _bytes(item)
        if view is None:
            if items or count:
                raise QueryError(f"{self.path / FILE} is missing, so no item can be scored: run again to write it")
            if not found.timeline.known:
                return stranger_report(user_id, found)
        moment = found.timeline.at(at)
        row = moment.row
        expired = at.kind == "now" and row is not None and int(row["last_offset"]) <= found.idle_up_to
        part = moment.part if view is None or not expired else view.start(user_id)
        recent = frozenset[int]()
        if view is not None and (items or count):
            recent = frozenset(self._recent_places(view, moment))
        return user_report(
            user_id, found, at, moment, expired=expired, explained=explained,
            scored=() if view is None else scores(view, part, items, recent),
            best=() if view is None or not count else top(view, part, count, recent, unseen=unseen),
        )  # fmt: skip

    def diff(self, user_id: str, before: Point, after: Point, *, snapshots: Path | None = None) -> DiffReport:
        """The user at two points. Raises QueryError where one cannot be told, or the state directory has no model."""
        found = self._find(user_id, snapshots)
        view, timeline = found.view, found.timeline
        if view is None:
            raise QueryError(f"{self.path / FILE} is missing, so no states can be compared: run again to write it")
        one, other = timeline.at(before), timeline.at(after)
        anew = one.first_time_ms not in (None, other.first_time_ms)
        if one.part.events > other.part.events and not anew:
            raise QueryError(f"--diff {before.asked} {after.asked}: the first point is after the second; swap them")
        had = 0 if anew else one.part.events
        learned = explain(view, other.part, other.events, other.bases).events
        between = tuple(event for event in learned if event.number >= had)
        risen, fallen = most_changed(view, one.part, other.part, MOST_CHANGED)
        change = parameter_change(view.layout, one.part, other.part)
        return DiffReport(
            user_id, point_report(before, one), point_report(after, other), one.part.events, other.part.events, anew,
            change, float(np.linalg.norm(change.mean)), in_prior_sd(view.first, np.array(change.mean)), between,
            other.part.events - had - len(between), risen, fallen,
        )  # fmt: skip

    def _find(self, user_id: str, snapshots: Path | None) -> Found:
        """The user in the first store that has a row, else in none."""
        user = _bytes(user_id)
        view = None if self.view is None else self.view.serving(user_id)
        earlier = _snapshots(snapshots) if snapshots is not None else []
        for number in self._directories:
            store = self._store(number)
            live = _stored("the live row", store, user, view)
            past = [
                stored for directory in earlier for stored in _in_snapshot(directory, number, store.layout, user, view)
            ]
            looked_up = (number, live, past, store)
            if live.row is not None or any(stored.row is not None for stored in past):
                break
        number, live, past, store = looked_up
        timeline = Timeline(view, store.layout, user_id, live, past)
        progress = store.progress()
        return Found(
            number if timeline.known else None,
            store.layout,
            view,
            timeline,
            idle_up_to(b"" if progress is None else progress.clock),
            progress.offset if progress is not None and (timeline.known or len(self._directories) == 1) else None,
        )

    def _store(self, number: int) -> RocksReader:
        if number not in self._stores:
            directory = self._directories[number]
            store = self._stores[number] = self._opened(directory)
            if store.restoring():
                raise StoreUnfinished(
                    f"the restore of {directory} from the changelog has not ended, users may be missing: end it first"
                )
            if self.view is not None and self.view.layout != store.layout:
                raise StoreMismatch(
                    f"{self.view.path} is for rows of {self.view.layout.fingerprint}, but {directory} holds rows of "
                    f"{store.layout.fingerprint}: it belongs to another run; restore the one that was with the rows"
                )
        return self._stores[number]

    def _opened(self, directory: Path) -> RocksReader:
        if not self._follow:
            return RocksReader(directory)
        from state.reading.following import FollowingReader

        follower = FollowingReader(directory)
        self._followers.append(follower)
        return follower

    @staticmethod
    def _recent_places(view: ModelView, moment: Moment) -> list[int]:
        latest = [event for event in moment.events if event.number >= moment.part.events - view.layout.ring]
        places = (view.place_of_ring_item(event.ring_item) for event in latest)
        return [place for place in places if place < view.item_count]


def _in_snapshot(snapshot: Path, number: int, layout: RowLayout, user: bytes, view: ModelView | None) -> list[Stored]:
    directory = snapshot / f"partition-{number}"
    if not (directory / "CURRENT").is_file():
        return []
    with RocksReader(directory) as store:
        if store.layout != layout:
            raise SnapshotError(
                f"{directory} holds rows of {store.layout.fingerprint}, the state {layout.fingerprint}: it is of "
                "another run; give the snapshots of this one"
            )
        return [_stored(f"snapshot {snapshot.name}", store, user, view)]


def _stored(name: str, store: RocksReader, user: bytes, view: ModelView | None) -> Stored:
    """What the store says of the user, on the version of the view."""
    rows, found = store.get_many([user])
    progress = store.progress()
    offset = -1 if progress is None else progress.offset
    if not found[0]:
        return Stored(name, None, offset)
    on_view = Moved(store.layout.rows(rows)[0], None) if view is None else moved(view, store, user, rows)
    return Stored(name, on_view.row, offset, on_view.movement)


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that replaces it; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _bytes(user_id: str) -> bytes:
    """The id as a store has it. Raises QueryError for one that is no text."""
    try:
        return user_id.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"the id {user_id!a} is not UTF-8, and all ids are: check the terminal's encoding") from error


def _partitions(state: Path, only: int | None) -> dict[int, Path]:
    """The partitions' directories by number."""
    if only is not None:
        return {only: state / f"partition-{only}"}
    found = {}
    if state.is_dir():
        for directory in state.iterdir():
            named = _PARTITION.fullmatch(directory.name)
            if named is not None and (directory / "CURRENT").is_file():
                found[int(named[1])] = directory
    if not found:
        raise StoreUnreadable(f"{state} holds no store: name the --state directory of a run")
    return dict(sorted(found.items()))


def _snapshots(directory: Path) -> list[Path]:
    """The snapshots in a directory, or the one that it is."""
    if (directory / _MANIFEST).is_file():
        return [directory]
    found = sorted(path.parent for path in directory.glob(f"*/{_MANIFEST}")) if directory.is_dir() else []
    if not found:
        raise SnapshotError(f"{directory} holds no snapshot: name a directory of snapshots, or one snapshot")
    return found
