"""What a run's online stage was worth, and what it decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from learner.drift import DriftAlarm
from learner.forgetting import MEASURES, ForgettingMatrix
from state.lineage.history import Version
from state.lineage.record import plain

FROZEN = "frozen"
"""The baseline beside the online stage: the trained model, which the stream does not improve"""


@dataclass(frozen=True, slots=True)
class MetaResult:
    """What became of the online stage."""

    versions: tuple[Version, ...]
    """With their decisions"""
    matrix: ForgettingMatrix
    drift: tuple[DriftAlarm, ...]
    seconds: float
    """Wall-clock, of all rounds"""
    rounds: int
    moved: Mapping[str, int] = field(default_factory=dict)
    """Rows that came onto another version, by the way they took"""
    refused: Mapping[str, int] = field(default_factory=dict)
    """Gradients that could not be used, by reason"""
    notes: tuple[str, ...] = ()
    """What a reader must know"""

    def decided(self, kind: str) -> int:
        """Versions whose last decision it is."""
        return sum(version.stage == kind for version in self.versions)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; every decision with its evidence."""
        return {
            "rounds": self.rounds,
            "seconds": self.seconds,
            "decisions": {kind: self.decided(kind) for kind in ("promoted", "rejected", "shadow", "canary")},
            "versions": [_version(version) for version in self.versions],
            "forgetting": self.matrix.as_dict(),
            "measures": {name: self.matrix.measures(name).as_dict() for name in MEASURES},
            "drift": [alarm.as_dict() for alarm in self.drift],
            "moved": dict(self.moved),
            "refused": dict(self.refused),
            "notes": list(self.notes),
        }


def _version(version: Version) -> dict[str, Any]:
    record = version.record
    return {
        "version": version.number,
        "parent": record.parent,
        "round": record.round,
        "metrics": plain(record.metrics),  # a step that went wrong has numbers that JSON has not
        "settings": plain(record.settings) if version.number else {},
        "decisions": [{"kind": d.kind, "reason": d.reason, "evidence": plain(d.evidence)} for d in version.decisions],
    }
