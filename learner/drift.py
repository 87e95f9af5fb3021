"""Watches the prequential loss: whether the stream has become harder to predict than it was.

Two channels: ``all`` events, and those of ``warm`` users, who had 20 events or more before. New people alone raise the
first; a rise of the second means that tastes or items moved, since its users are known. Two detectors on each, both of
river: ADWIN (Bifet & Gavaldà 2007), whose window adapts and which also finds a slow rise, and Page-Hinkley (Page 1954),
a sum above the mean, which is quick to find a sudden one. A fall of the loss is no alarm.

They look at means of blocks of events. A stream carries few users at a time, and its loss depends on who they are: on
ML-1M the means of 1,024 events spread by 0.037 nats, three times what independent events would, and are hardly
correlated (0.15; those of 64 events 0.4). The spread is therefore measured on each channel's first 30 blocks, and no
alarm is given before; from there on a block counts as so many spreads above their level.

Measured on ML-1M's blocks in random order: four false alarms in 29,800 blocks (30 M events), all of Page-Hinkley. A
rise by 0.08 nats is found by it after 9 blocks (ADWIN: 14), by 0.04 after 27 (41), by 0.02 after 80 if at all. In its
own order ML-1M gives no alarm. An event costs 0.05 µs; the detectors alone would take 0.7 µs of each event.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from river.drift import ADWIN, PageHinkley

Channel = Literal["all", "warm"]
Detector = Literal["adwin", "page_hinkley"]

BLOCK_EVENTS = 1_024
WARM_EVENTS = 20
"""Events that a user of ``warm`` had before: as ``learner.anchors`` has it"""
MEASURED_BLOCKS = 30
"""Blocks that tell a channel's usual spread, within some 13 %"""
SMALLEST_SPREAD = 1e-3
"""Nats; a channel quieter than that is of one user or of none that can be predicted, and would alarm at anything"""
ADWIN_CONFIDENCE = 0.002
"""river's default: chance of a false cut at each look. Its bound has a part that measures the values' variance and one
for values between 0 and 1; in spreads the first is the larger"""
HINKLEY_TOLERANCE, HINKLEY_THRESHOLD = 0.25, 20.0
"""In spreads: rises of less than a quarter of one do not add up"""
LATEST_BLOCKS = 8
"""That an alarm's ``after`` is the mean of"""


@dataclass(frozen=True, slots=True)
class DriftAlarm:
    """One detector on one channel has found that the loss rose."""

    channel: Channel
    detector: Detector
    event: int
    """How many events had been added when the block that gave the alarm was full"""
    before: float
    """Mean loss from the start, or from this detector's last alarm, up to the latest blocks; nats"""
    after: float
    """Mean loss of the latest blocks"""

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


class DriftWatch:
    """The detectors of one stream. How the stream is cut into calls changes nothing. Not serialised: it begins anew."""

    def __init__(self) -> None:
        self._events = 0
        self._channels = (_Channel("all"), _Channel("warm"))

    def add(self, losses: NDArray[np.floating[Any]], index: NDArray[np.int64]) -> list[DriftAlarm]:
        """Alarms in the order of the stream.

        losses (N,): log-loss of each event before it was learned, in stream order; NaN (an event that had been applied
        before) is left out. index (N,): how many events the user had before. ValueError if the lengths differ.
        """
        if len(losses) != len(index):
            raise ValueError(f"{len(losses)} losses, but {len(index)} indices: give one of each per event")
        found = []
        usable = np.isfinite(losses)
        for channel in self._channels:
            chosen = np.flatnonzero(usable if channel.name == "all" else usable & (index >= WARM_EVENTS))
            found += channel.add(losses[chosen].astype(np.float64), chosen + self._events + 1)
        self._events += len(losses)
        return sorted(found, key=lambda alarm: alarm.event)


class _Channel:
    """Cuts its events into blocks, measures the spread of the first, and shows the others to both detectors."""

    def __init__(self, name: Channel) -> None:
        self.name = name
        self._losses: NDArray[np.float64] = np.zeros(0)
        self._first: list[float] = []
        self._level = self._spread = math.nan
        self._detectors = (_Detector("adwin"), _Detector("page_hinkley"))

    def add(self, losses: NDArray[np.float64], event: NDArray[np.int64]) -> list[DriftAlarm]:
        """``event``: what each loss's number in the stream is, from 1."""
        waiting = len(self._losses)
        pending = np.concatenate([self._losses, losses])
        full = len(pending) // BLOCK_EVENTS
        self._losses = pending[full * BLOCK_EVENTS :]
        found = []
        for k, mean in enumerate(pending[: full * BLOCK_EVENTS].reshape(full, BLOCK_EVENTS).mean(axis=1).tolist()):
            found += self._see(mean, int(event[(k + 1) * BLOCK_EVENTS - 1 - waiting]))
        return found

    def _see(self, mean: float, event: int) -> list[DriftAlarm]:
        if len(self._first) < MEASURED_BLOCKS:
            self._first.append(mean)
            self._level = float(np.mean(self._first))
            self._spread = max(float(np.std(self._first)), SMALLEST_SPREAD)
            return []
        spreads = (mean - self._level) / self._spread
        levels = [(d.name, d.rose(spreads, mean)) for d in self._detectors]
        return [DriftAlarm(self.name, name, event, *level) for name, level in levels if level is not None]


class _Detector:
    """One of river's, and the means it has seen since its last alarm."""

    def __init__(self, name: Detector) -> None:
        self.name = name
        # Any: river is typed in part only, and these calls are not.
        make_adwin: Any = ADWIN
        self._adwin: Any = make_adwin(delta=ADWIN_CONFIDENCE, clock=1)
        self._hinkley: Any = PageHinkley(1, HINKLEY_TOLERANCE, HINKLEY_THRESHOLD, mode="up")
        self._start()

    def _start(self) -> None:
        self._latest: deque[float] = deque()
        self._earlier, self._count = 0.0, 0

    def rose(self, spreads: float, mean: float) -> tuple[float, float] | None:
        """(loss before, loss after) if this block, ``spreads`` above the usual level, shows a rise."""
        self._latest.append(mean)
        if len(self._latest) > LATEST_BLOCKS:
            self._earlier, self._count = self._earlier + self._latest.popleft(), self._count + 1
        if not self._alarmed(spreads):
            return None
        after = sum(self._latest) / len(self._latest)
        before = self._earlier / self._count if self._count else after
        self._start()
        return before, after

    def _alarmed(self, spreads: float) -> bool:
        if self.name == "page_hinkley":
            self._hinkley.update(spreads)
            return bool(self._hinkley.drift_detected)
        before = self._adwin.estimation
        self._adwin.update(spreads)
        return bool(self._adwin.drift_detected and self._adwin.estimation > before)
