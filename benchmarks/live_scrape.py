"""What a running worker says of itself, and what Linux says of processes: read from outside, many times a second.

Reading the worker's whole ``/metrics`` costs it a millisecond or two each time: it is part of what is measured.
"""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from streams.live import metrics as names
from streams.live.metrics import Outcome, Stage

LISTENING = "0A"
"""State of a socket in /proc/net/tcp"""
ANSWER_S = 5.0
_TICKS = os.sysconf("SC_CLK_TCK")
_SAMPLE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')

Labels = frozenset[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram as Prometheus has it: how many values are at most each bound. Two of one metric can be subtracted."""

    bounds: tuple[float, ...]
    """Rising; the last is infinite"""
    counts: tuple[float, ...]
    total: float
    """Sum of the values"""

    def __sub__(self, before: Buckets) -> Buckets:
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Buckets(self.bounds, counts, self.total - before.total)

    def quantile(self, share: float) -> float:
        """As Prometheus' ``histogram_quantile``: linear inside a bucket; NaN where there is no value.

        Above the last finite bound nothing is known: it is infinite there.
        """
        if not self.counts or not self.counts[-1]:
            return float("nan")
        wanted, low, below = share * self.counts[-1], 0.0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count >= wanted and count > below:
                return bound if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
            low, below = bound, count
        return float("inf")


class Scrape:
    """One answer of ``/metrics``. A series that is not there counts as 0."""

    def __init__(self, text: str) -> None:
        self._series: dict[str, dict[Labels, float]] = {}
        for match in _SAMPLE.finditer(re.sub(r"(?m)^#.*$", "", text)):
            labels = frozenset(_LABEL.findall(match["labels"] or ""))
            self._series.setdefault(match["name"], {})[labels] = float(match["value"])

    def value(self, name: str, **labels: str) -> float:
        """Of one series."""
        return self._series.get(name, {}).get(frozenset(labels.items()), 0.0)

    def by(self, name: str, label: str) -> dict[str, float]:
        """Value by what ``label`` is, of a metric that has no other."""
        return {dict(labels)[label]: value for labels, value in self._series.get(name, {}).items()}

    def histogram(self, name: str, **labels: str) -> Buckets | None:
        """None: the worker has no such metric, or nothing with these labels."""
        wanted = labels.items()
        found = [
            (float(dict(found)["le"]), count)
            for found, count in self._series.get(f"{name}_bucket", {}).items()
            if wanted <= dict(found).items()
        ]
        if not found:
            return None
        bounds, counts = zip(*sorted(found), strict=True)
        return Buckets(bounds, counts, self.value(f"{name}_sum", **labels))

    @property
    def applied(self) -> int:
        """Events."""
        return int(self.value(names.EVENTS, outcome=Outcome.APPLIED))

    @property
    def otherwise(self) -> dict[str, int]:
        """Events that came to another end, by which."""
        outcomes = self.by(names.EVENTS, "outcome")
        return {outcome: int(n) for outcome, n in outcomes.items() if n and outcome != Outcome.APPLIED}

    @property
    def pending(self) -> int:
        """Commits that the changelog has not acknowledged."""
        return int(sum(self.by(names.PENDING_COMMITS, "partition").values()))

    @property
    def rows(self) -> int:
        """Acknowledged by the changelog."""
        return int(self.value(names.CHANGELOG_ROWS))

    @property
    def owned(self) -> frozenset[str]:
        """Partitions."""
        return frozenset(p for p, yes in self.by(names.PARTITION_OWNED, "partition").items() if yes)

    def stage_seconds(self) -> dict[str, float]:
        """What each stage has taken so far, waiting included."""
        return {stage.value: self.value(f"{names.STAGE_SECONDS}_sum", stage=stage.value) for stage in Stage}


def scrape(port: int) -> Scrape | None:
    """None: nobody answers (yet)."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=ANSWER_S) as answer:
            return Scrape(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has taken so far."""

    cpu_s: float
    resident: int
    """Bytes now"""
    peak: int
    """The most bytes so far"""


def usage(pid: int) -> Usage:
    """Of a running process. Raises OSError where it is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    resident, peak = (int(status[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, resident, peak)


def listener_of(port: int) -> int | None:
    """The process that listens on a port of this machine; None where Linux does not tell: it is somebody else's."""
    inodes = set(_listening(port))
    for place in Path("/proc").glob("[0-9]*/fd"):
        try:
            if any(os.readlink(entry) in inodes for entry in place.iterdir()):
                return int(place.parent.name)
        except OSError:
            continue
    return None


def _listening(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and int(local.rpartition(":")[2], 16) == port:
                yield f"socket:[{inode}]"


@dataclass(frozen=True, slots=True)
class Look:
    """A worker at one moment."""

    at_s: float
    """Monotonic, before it was asked"""
    applied: int
    pending: int
    rows: int
    worker: Usage
    broker_cpu_s: float
    stages: dict[str, float]

    @staticmethod
    def of(found: Scrape, at_s: float, pid: int, broker_pid: int | None) -> Look:
        """A moment, of a scrape that was asked for at ``at_s``."""
        broker_s = 0.0 if broker_pid is None else usage(broker_pid).cpu_s
        return Look(at_s, found.applied, found.pending, found.rows, usage(pid), broker_s, found.stage_seconds())

    def same_end(self, last: Look) -> bool:
        """Whether nothing was left to do that ``last`` has done."""
        return (self.applied, self.pending, self.rows) == (last.applied, 0, last.rows)


def stretch(looks: Sequence[Look]) -> tuple[Look, Look]:
    """From the last look before the first event was applied to the first look after all was acknowledged.

    The last look is of a worker that has been idle for a while: commits are told after they are applied, so a moment
    with none pending is the end only if no row came after it. Raises ValueError where none of this was seen.
    """
    began = max((look for look in looks if not look.applied), key=lambda look: look.at_s, default=None)
    last = looks[-1]
    if began is None or last.pending or not last.applied:
        raise ValueError("the worker was not seen from its first event to its last acknowledgement")
    ended = next(look for look in looks if look.same_end(last))
    return began, ended


def now_s() -> float:
    """The clock of ``Look``."""
    return time.monotonic()
