"""The versions of the shared parameters of one model: where each came from, what was decided, and its tensors.

    lineage.jsonl                   what was told, a chain of lines: ``record``, ``journal``
    lineage.lock                    held by whoever writes
    version-00000012.safetensors    a version's tensors, on the disk before the line that names them

So a crash in between leaves a file that no line names; the version that gets its number replaces it. Tensors are
verified when they are read: their file against the hash in the record, what they serve against the record's serving
hash, and the record against the chain and, with a key, against its signature.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from state.lineage.exceptions import LineageDamaged, TensorsPruned, WrongStep
from state.lineage.history import History, Version
from state.lineage.journal import Journal
from state.lineage.record import Decided, Decision, Pruned, Record, plain
from state.lineage.tensors import PARTIAL, Parameters, file_name, read_tensors, serving_sha256, write_tensors

LOCK_WAIT_S = 10.0
"""Another writer holds the lock for as long as its tensors take to write: for a million items a few seconds"""
REBASED = "users adapted from them are re-based at their next event"


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Lineage:
    """The lineage in a directory; one that is not there yet is empty, and made by the first ``add``.

    Whatever reads, reads what other processes wrote too. One thread uses it at a time; processes may share a directory.
    Raises LineageDamaged where a line of it, or with a key a signature, does not verify.
    """

    def __init__(
        self,
        directory: Path,
        key: bytes | None = None,
        *,
        wait_s: float = LOCK_WAIT_S,
        now_ms: Callable[[], int] = _clock_ms,
    ) -> None:
        """``key``: signs lines and verifies them. ``wait_s``: for another writer, before LineageLocked."""
        if key is not None and not key:
            raise ValueError("an empty key signs nothing: give one, or None")
        self.directory = directory
        self._journal = Journal(directory, key, wait_s)
        self._now_ms = now_ms
        self._journal.refresh()

    @property
    def torn(self) -> bool:
        """Whether a crash left a part of a last line: it does not count, and the next write takes it off."""
        self._journal.refresh()
        return self._journal.torn

    @property
    def signed(self) -> bool:
        """Whether its lines are signed; without a key the signatures are not verified."""
        self._journal.refresh()
        return self._journal.signed

    @property
    def current(self) -> int | None:
        """The version that serves; None: the lineage is empty."""
        return self._history().current

    @property
    def next_version(self) -> int:
        """The number that ``add`` takes next."""
        return self._history().next_version

    def records(self) -> tuple[Version, ...]:
        """Every version with all its decisions, in order of their numbers."""
        return self._history().versions

    def version(self, number: int) -> Version:
        """Raises UnknownVersion."""
        return self._history().version(number)

    def add(self, record: Record, tensors: Mapping[str, NDArray[Any]], item_ids: Sequence[str]) -> Version:
        """Adds the next version; its times and hashes are filled in here, and evidence made ``plain``.

        Raises WrongStep where the record cannot follow (its number is not the next: somebody else added one),
        ValueError or TypeError for what cannot be written. Nothing is told of the version then.
        """
        if record.decision.kind == "rollback" or record.undone:
            raise ValueError("a rollback is made by rollback(), which restores the tensors and says what is undone")
        with self._journal.writing():
            return self._add(record, Parameters(dict(tensors), tuple(item_ids)), [])

    def decide(self, number: int, decision: Decision) -> Version:
        """Tells a further decision. Raises UnknownVersion, WrongStep."""
        with self._journal.writing():
            self._journal.append([Decided(number, self._stamped(decision))])
            return self._journal.history.version(number)

    def tensors(self, number: int) -> Parameters:
        """A version's tensors, verified. Raises UnknownVersion, TensorsPruned, LineageDamaged."""
        return self._tensors(self._history().version(number))

    def promote(self, number: int, reason: str = "asked for") -> Version:
        """Makes an open or a rejected version serve, by hand, once its tensors verify.

        Raises as ``tensors``, and WrongStep where it serves, or served before.
        """
        with self._journal.writing():
            history = self._journal.history
            version = history.version(number)
            if number == history.current:
                raise WrongStep(f"version {number} is the current one already")
            if version.served:
                raise WrongStep(f"version {number} served before: bring it back by a rollback to it")
            self._tensors(version)
            evidence = {"current before": history.current, "stage before": version.stage}
            self._journal.append([Decided(number, self._stamped(Decision("promoted by hand", reason, evidence)))])
            return self._journal.history.version(number)

    def rollback(self, to_version: int, reason: str = "asked for") -> Version:
        """Makes a version that served before serve again: as a new version with its very tensors, the optimizer's too.

        Its record says which versions are undone; an open one that was built on them is rejected. Raises as
        ``tensors``, and WrongStep where the version never served or serves now.
        """
        with self._journal.writing():
            history = self._journal.history
            undone = history.undone_by_return_to(to_version)
            restored = history.version(to_version)
            parameters = self._tensors(restored)
            decision = Decision(
                "rollback", f"{reason}; back to version {to_version}, undoes {_named(undone)}: {REBASED}",
                {"to": to_version, "undone": undone, "current before": history.current},
            )  # fmt: skip
            record = replace(
                restored.record, version=history.next_version, parent=to_version, decision=decision, undone=undone,
                spans=(), round=history.versions[-1].record.round,
            )  # fmt: skip
            because = Decision("rejected", f"built on what the rollback to version {to_version} undoes")
            rejected = [Decided(n, self._stamped(because)) for n in undone if history.version(n).open]
            return self._add(record, parameters, rejected)

    def prune(self, keep: int) -> tuple[int, ...]:
        """Removes tensors, never records; returns of which versions.

        Kept are the current version's, those of the ``keep`` latest that served, and of versions still to be decided
        on. ValueError below 1.
        """
        if keep < 1:
            raise ValueError(f"keep is {keep}: keep at least the current version (meta.keep_versions)")
        with self._journal.writing():
            history = self._journal.history
            kept = {*history.served[-keep:], *(v.number for v in history.versions if v.open)}
            going = tuple(v.number for v in history.versions if v.number not in kept and not v.pruned)
            if going:
                self._journal.append([Pruned(going, self._now_ms())])
            self._remove_all_but(kept)
        return going

    def _history(self) -> History:
        self._journal.refresh()
        return self._journal.history

    def _path(self, number: int) -> Path:
        return self.directory / file_name(number)

    def _stamped(self, decision: Decision) -> Decision:
        return replace(decision, evidence=plain(decision.evidence), at_ms=self._now_ms())

    def _add(self, record: Record, parameters: Parameters, before: list[Decided]) -> Version:
        """Under the lock. ``before``: told in front of the version, in one write."""
        decision = self._stamped(record.decision)
        made = replace(
            record, decision=decision, made_at_ms=decision.at_ms, settings=plain(record.settings),
            metrics=plain(record.metrics), serving_sha256=serving_sha256(parameters.tensors, parameters.item_ids),
        )  # fmt: skip
        self._journal.history.copy().tell(made)  # before anything is written
        written = replace(made, file_sha256=write_tensors(self._path(made.version), parameters))
        self._journal.append([*before, written])
        return self._journal.history.version(made.version)

    def _tensors(self, version: Version) -> Parameters:
        number, record, path = version.number, version.record, self._path(version.number)
        self._require_kept(number)
        try:
            parameters = read_tensors(path, record.file_sha256)
        except FileNotFoundError:
            self._journal.refresh()  # somebody may have pruned it just now
            self._require_kept(number)
            raise LineageDamaged(
                f"version {number} is refused: {path} is missing, and it was not pruned; restore it from a copy, or "
                "use another version"
            ) from None
        except ValueError as error:
            raise LineageDamaged(
                f"version {number} is refused: {path} {error}; restore it from a copy, or use another version"
            ) from None
        if serving_sha256(parameters.tensors, parameters.item_ids) != record.serving_sha256:
            raise LineageDamaged(
                f"version {number} is refused: what {path} serves does not match the serving hash in its record; "
                "restore the directory from a copy, or use another version"
            )
        return parameters

    def _require_kept(self, number: int) -> None:
        history = self._journal.history
        if history.version(number).pruned:
            there = _named([v.number for v in history.versions if not v.pruned])
            raise TensorsPruned(
                f"the tensors of version {number} were pruned (meta.keep_versions); there are those of {there}"
            )

    def _remove_all_but(self, kept: set[int]) -> None:
        """What crashes left goes too: files that no line names, and parts of files."""
        names = {file_name(number) for number in kept}
        for path in self.directory.glob("version-*.safetensors*"):
            if path.name not in names and path.name.removesuffix(PARTIAL).endswith(".safetensors"):
                path.unlink(missing_ok=True)


def _named(numbers: Sequence[int]) -> str:
    """In words: "version 4", "versions 4, 5"."""
    if not numbers:
        return "no version"
    return f"version{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
