"""What became of every version: in memory always, and on disk where a lineage is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from state.lineage import Decision, Lineage, Record
from state.lineage.history import History, Version
from state.lineage.record import Decided


class Chronicle:
    """Tells both alike. ``keep``: how many served versions' tensors stay on disk."""

    def __init__(self, lineage: Lineage | None, keep: int, now_ms: Callable[[], int]) -> None:
        self._lineage = lineage
        self._keep = keep
        self._now_ms = now_ms
        self._history = History()

    @property
    def versions(self) -> tuple[Version, ...]:
        """All, with their decisions."""
        return self._history.versions

    @property
    def next_version(self) -> int:
        """The number of the next one."""
        return self._history.next_version

    def add(self, record: Record, tensors: Callable[[], Mapping[str, NDArray[Any]]], item_ids: Sequence[str]) -> None:
        """A version as it is made; ``tensors`` is asked where it goes to the disk. Raises LineageError."""
        if self._lineage is not None:
            record = self._lineage.add(record, tensors(), item_ids).record
        now = self._now_ms()
        self._history.tell(replace(record, made_at_ms=now, decision=replace(record.decision, at_ms=now)))

    def decide(self, number: int, decision: Decision) -> None:
        """What becomes of it. Raises LineageError."""
        if self._lineage is not None:
            self._lineage.decide(number, decision)
            if decision.kind == "promoted":
                self._lineage.prune(self._keep)
        self._history.tell(Decided(number, replace(decision, at_ms=self._now_ms())))
