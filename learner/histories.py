"""Histories of users: each one's events in order, packed one user after the other. Arrays only; nothing is learned.

They are what meta-updates train on and what a user's row is re-derived from. An event is what a ring entry of
``learner.user_state`` keeps of it, without the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.features import SparseRows


@dataclass(frozen=True, slots=True)
class Histories:
    """Histories of B users, packed, each in its own event order; T events."""

    starts: NDArray[np.int64]
    """(B + 1,) user b owns the events ``starts[b]:starts[b + 1]``"""
    item: NDArray[np.uint64]
    """(T,) ``learner.user_state.ring_item`` of the event's item (40 bits)"""
    label: NDArray[np.int8]
    """(T,) 0 or 1"""
    grade: NDArray[np.int32]
    """(T,) NO_GRADE where there was none"""
    first: NDArray[np.int64]
    """(B,) number (from 0) of the user's first event here; above 0 where older ones were dropped"""
    features: SparseRows
    """B rows: the users' encoded feature columns"""

    def __post_init__(self) -> None:
        if len(self.first) != len(self) or len(self.features) != len(self):
            raise ValueError(
                f"histories of {len(self)} users, but first is of {len(self.first)} and features of "
                f"{len(self.features)}: each has one entry per user"
            )
        if not len(self.item) == len(self.label) == len(self.grade) == int(self.starts[-1]):
            raise ValueError(f"starts end at {int(self.starts[-1])} events, but the columns hold {len(self.item)}")

    def __len__(self) -> int:
        """B."""
        return len(self.starts) - 1

    @property
    def events(self) -> int:
        """T."""
        return len(self.item)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """(B,) events of each user."""
        return np.diff(self.starts)

    def take(self, users: NDArray[np.int64]) -> Histories:
        """These users, in that order; repeats are allowed. IndexError for one that is not there."""
        starts, events = spans(self.starts[:-1][users], self.starts[1:][users])
        return Histories(
            starts, self.item[events], self.label[events], self.grade[events], self.first[users],
            take_rows(self.features, users),
        )  # fmt: skip

    def cut(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> Histories:
        """Of each user k the events ``first[k]:last[k]``, places in what is kept here; ``first`` moves along.

        ValueError unless 0 ≤ first ≤ last ≤ length.
        """
        lengths = self.lengths
        if len(first) != len(self) or len(last) != len(self):
            raise ValueError(f"a cut of {len(self)} users needs one first and one last of each")
        if not ((first >= 0) & (first <= last) & (last <= lengths)).all():
            k = int(np.flatnonzero(~((first >= 0) & (first <= last) & (last <= lengths)))[0])
            raise ValueError(f"user {k} has {lengths[k]} events here, {first[k]}:{last[k]} is no part of them")
        starts, events = spans(self.starts[:-1] + first, self.starts[:-1] + last)
        return Histories(
            starts, self.item[events], self.label[events], self.grade[events], self.first + first, self.features
        )

    @staticmethod
    def concatenate(parts: Sequence[Histories]) -> Histories:
        """The users of all parts, in order."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return Histories.empty()
        if len(parts) == 1:
            return parts[0]
        return Histories(
            starts_of(np.concatenate([part.lengths for part in parts])),
            np.concatenate([part.item for part in parts]),
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.grade for part in parts]),
            np.concatenate([part.first for part in parts]),
            SparseRows(
                starts_of(np.concatenate([np.diff(part.features.starts) for part in parts])),
                np.concatenate([part.features.columns for part in parts]),
                np.concatenate([part.features.weights for part in parts]),
            ),
        )

    @staticmethod
    def empty() -> Histories:
        """Of no users."""
        none = np.zeros(1, np.int64)
        return Histories(
            none, np.zeros(0, np.uint64), np.zeros(0, np.int8), np.zeros(0, np.int32), np.zeros(0, np.int64),
            SparseRows(none, np.zeros(0, np.int64), np.zeros(0, np.float32)),
        )  # fmt: skip


def starts_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(B + 1,) where each of B parts of these lengths begins, and where the last one ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=starts[1:])
    return starts


def spans(first: NDArray[np.int64], last: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(starts (B + 1,), places (T,)): the ranges ``first[k]:last[k]`` one after the other."""
    lengths = last - first
    starts = starts_of(lengths)
    return starts, np.arange(starts[-1]) + np.repeat(first - starts[:-1], lengths)


def take_rows(rows: SparseRows, chosen: NDArray[np.int64]) -> SparseRows:
    """These rows, in that order; repeats are allowed."""
    starts, cells = spans(rows.starts[:-1][chosen], rows.starts[1:][chosen])
    return SparseRows(starts, rows.columns[cells], rows.weights[cells])
