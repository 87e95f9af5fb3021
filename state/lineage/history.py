"""What a lineage's entries add up to, and which entry may follow. Pure.

    initial (version 0)   serves from the start
    candidate             -> shadow, canary, promoted, rejected
    shadow                -> canary, promoted, rejected
    canary                -> promoted, rejected
    rollback              serves at once

A version may also be rejected or promoted as it is made (a gate that is switched off). Somebody may promote an open
or a rejected version by hand. What served once is taken back, or brought back, by a rollback alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from state.lineage.exceptions import UnknownVersion, WrongStep
from state.lineage.record import KINDS, OPEN, SERVING, Decided, Decision, Entry, Kind, Pruned, Record

_FIRST: frozenset[Kind] = frozenset({"candidate", "promoted", "rejected", "rollback"})
"""What a version other than 0 may be as it is made"""
_NEXT: Mapping[Kind, frozenset[Kind]] = {
    "candidate": frozenset({"shadow", "canary", "promoted", "rejected", "promoted by hand"}),
    "shadow": frozenset({"canary", "promoted", "rejected", "promoted by hand"}),
    "canary": frozenset({"promoted", "rejected", "promoted by hand"}),
    "rejected": frozenset({"promoted by hand"}),
}
"""Which decisions may follow one; after any other none may"""


@dataclass(frozen=True, slots=True)
class Version:
    """A version with all that was decided about it."""

    record: Record
    decisions: tuple[Decision, ...]
    """In their order, that of the record first"""
    pruned: bool = False
    """Whether its tensors were removed"""
    undone_by: int | None = None
    """The rollback that took its effect back, the latest one"""

    @property
    def number(self) -> int:
        """From 0."""
        return self.record.version

    @property
    def stage(self) -> Kind:
        """What was decided last."""
        return self.decisions[-1].kind

    @property
    def served(self) -> bool:
        """Whether it is, or was, the current one."""
        return self.stage in SERVING

    @property
    def open(self) -> bool:
        """Whether a decision is still to come."""
        return self.stage in OPEN


class History:
    """Versions, as the entries told so far leave them. Starts without any."""

    def __init__(self) -> None:
        self._versions: list[Version] = []
        self._served: list[int] = []

    @property
    def versions(self) -> tuple[Version, ...]:
        """All, in order of their numbers."""
        return tuple(self._versions)

    @property
    def next_version(self) -> int:
        """Number of the version that comes next."""
        return len(self._versions)

    @property
    def current(self) -> int | None:
        """The version that serves; None: there is none yet."""
        return self._served[-1] if self._served else None

    @property
    def served(self) -> tuple[int, ...]:
        """Versions that serve or served, the current one last."""
        return tuple(self._served)

    def version(self, number: int) -> Version:
        """Raises UnknownVersion."""
        if 0 <= number < len(self._versions):
            return self._versions[number]
        if not self._versions:
            raise UnknownVersion(f"there is no version {number}: the lineage is empty")
        last = len(self._versions) - 1
        there = "there is only version 0" if last == 0 else f"there are versions 0 to {last}"
        raise UnknownVersion(f"there is no version {number}: {there}; the nearest is {0 if number < 0 else last}")

    def ancestors(self, number: int) -> set[int]:
        """The version, and all that it came from."""
        found: set[int] = set()
        at: int | None = number
        while at is not None:
            found.add(at)
            at = self.version(at).record.parent
        return found

    def undone_by_return_to(self, number: int) -> tuple[int, ...]:
        """Versions whose effect goes when an earlier one serves again: since then served, or open and built on those.

        Raises UnknownVersion, and WrongStep where the version never served or serves now.
        """
        if not self.version(number).served:
            raise WrongStep(f"version {number} never served (it is {self._versions[number].stage}): promote it instead")
        current = self.current
        if current is None or current == number:
            raise WrongStep(f"version {number} is the current one already")
        gone = self.ancestors(current) - self.ancestors(number)
        pending = {v.number for v in self._versions if v.open and self.ancestors(v.number) & gone}
        return tuple(sorted(gone | pending))

    def tell(self, entry: Entry) -> None:
        """Takes an entry in. Raises UnknownVersion or WrongStep for one that cannot come now, and changes nothing."""
        if isinstance(entry, Record):
            self._made(entry)
        elif isinstance(entry, Decided):
            self._decided(entry)
        else:
            self._pruned(entry)

    def copy(self) -> History:
        """Another one that says the same; telling it leaves this one alone."""
        other = History()
        other._versions, other._served = list(self._versions), list(self._served)
        return other

    def _made(self, record: Record) -> None:
        number, kind = record.version, record.decision.kind
        if number != self.next_version:
            raise WrongStep(
                f"version {number} cannot be added: the next one is {self.next_version}; somebody else may have added "
                "to this lineage, so read it again"
            )
        if number == 0 and (kind != "initial" or record.parent is not None):
            raise WrongStep(f"version 0 is the trained model, initial and without a parent, but this one is {kind}")
        if number > 0 and kind not in _FIRST:
            raise WrongStep(f"version {number} cannot be {kind} as it is made: {', '.join(sorted(_FIRST))}")
        if number > 0:
            self._fits(record)
        for undone in record.undone:
            self._versions[undone] = replace(self.version(undone), undone_by=number)
        self._versions.append(Version(record, (record.decision,)))
        if kind in SERVING:
            self._served.append(number)

    def _fits(self, record: Record) -> None:
        model = self._versions[0].record.model
        if record.model != model:
            raise WrongStep(
                f"version {record.version} is of the model {record.model[:12]}, this lineage is of {model[:12]}: a "
                "newly trained model takes a directory of its own"
            )
        if record.parent is None:
            raise WrongStep(f"version {record.version} names no parent: only version 0 has none")
        for named in (record.parent, *record.undone):
            self.version(named)

    def _decided(self, entry: Decided) -> None:
        version, kind = self.version(entry.version), entry.decision.kind
        allowed = _NEXT.get(version.stage, frozenset())
        if kind not in allowed:
            can = f"it can become {', '.join(k for k in KINDS if k in allowed)}" if allowed else "that is final"
            undo = "; roll back to the version that is to serve" if version.served else ""
            raise WrongStep(f"version {entry.version} is {version.stage} and cannot become {kind}: {can}{undo}")
        self._versions[entry.version] = replace(version, decisions=(*version.decisions, entry.decision))
        if kind in SERVING:
            self._served.append(entry.version)

    def _pruned(self, entry: Pruned) -> None:
        for number in entry.versions:
            version = self.version(number)
            if version.open or number == self.current:
                raise WrongStep(f"version {number} is in use ({version.stage}): its tensors cannot be removed")
        for number in entry.versions:
            self._versions[number] = replace(self._versions[number], pruned=True)
