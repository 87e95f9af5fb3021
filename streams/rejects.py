"""Records that cannot be used: counted by reason, written down with line and cause, and bounded in share."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TextIO

from streams.exceptions import TooManyRejects

RAW_TEXT_CHARACTERS = 500
"""How much of a rejected line is kept: enough to see the cause, and a broken file cannot fill the disk with it."""
RECORDS_BEFORE_STOP = 1_000
"""Records seen before the share may stop a run: a few bad lines at the top of a long file are not a trend."""


class Reason(StrEnum):
    """Why a record was rejected, in the order in which a record is checked."""

    UNREADABLE_BATCH = "unreadable batch"
    EMPTY_RECORD = "empty record"
    TOO_LARGE = "too large"
    UNKNOWN_SCHEMA = "unknown schema"
    UNUSABLE_SCHEMA = "unusable schema"
    INVALID_TEXT = "invalid text"
    TOO_DEEP = "nested too deeply"
    MALFORMED_LINE = "malformed line"
    MALFORMED_RECORD = "malformed record"
    DUPLICATE_KEY = "duplicate key"
    MISSING_FIELD = "missing field"
    EMPTY_ID = "empty id"
    WRONG_TYPE = "wrong type"
    NOT_FINITE = "not finite"
    LABEL_OUTSIDE_RULE = "label outside the rule"
    TIME_OUT_OF_RANGE = "time out of range"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with a record."""

    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Rejection:
    """One rejected record. ``line`` counts from 1 (a Parquet file's rows do too)."""

    path: str
    line: int
    problem: Problem
    raw: str


class Rejects:
    """Counts one pass over a source and writes its rejects file (JSON lines), if there is one."""

    def __init__(self, path: Path | None, max_share: float) -> None:
        self.path = path
        self.max_share = max_share
        self.records = 0
        """Records seen, good and bad."""
        self.by_reason: Counter[Reason] = Counter()
        self.first: Rejection | None = None
        self._file: TextIO | None = None

    @property
    def count(self) -> int:
        """Records rejected."""
        return self.by_reason.total()

    @property
    def share(self) -> float:
        """Rejected records of all records seen."""
        return self.count / self.records if self.records else 0.0

    def start(self) -> None:
        """Takes away the rejects file of an earlier pass."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def add(self, records: int, rejections: list[Rejection]) -> None:
        """Counts ``records`` more, of which ``rejections`` were bad.

        Raises:
            TooManyRejects: the share is above its bound and ``RECORDS_BEFORE_STOP`` records were seen.
        """
        self.records += records
        if rejections:
            self.first = self.first or rejections[0]
            self.by_reason.update(r.problem.reason for r in rejections)
            self._write(rejections)
        if self.records >= RECORDS_BEFORE_STOP:
            self._check()

    def finish(self) -> None:
        """Ends the pass. Raises TooManyRejects as ``add`` does, however few the records were."""
        self.close()
        self._check()

    def close(self) -> None:
        """Closes the rejects file; counts stay."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def summary(self) -> dict[str, object]:
        """Counts, JSON-ready."""
        return {
            "records": self.records,
            "rejected": self.count,
            "by_reason": {str(reason): count for reason, count in self.by_reason.most_common()},
        }

    def _write(self, rejections: list[Rejection]) -> None:
        if self.path is None:
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("w", encoding="utf-8")
        for r in rejections:
            line = {
                "file": r.path,
                "line": r.line,
                "reason": str(r.problem.reason),
                "detail": r.problem.detail,
                "raw": r.raw[:RAW_TEXT_CHARACTERS],
            }
            self._file.write(json.dumps(line) + "\n")

    def _check(self) -> None:
        if self.share <= self.max_share or self.first is None:
            return
        self.close()
        counts = ", ".join(f"{count} {reason}" for reason, count in self.by_reason.most_common())
        first = self.first
        written = f"; all of them are in {self.path}" if self.path else "; set data.rejects.path to have them written"
        raise TooManyRejects(
            f"{self.count} of {self.records} records cannot be used ({self.share:.1%}, data.rejects.max_share is "
            f"{self.max_share:.1%}): {counts}; first: {first.path} line {first.line}: {first.problem.reason}: "
            f"{first.problem.detail}: {first.raw[:80]!r}{written}; check the mapping under data.events, "
            "or raise data.rejects.max_share"
        )
