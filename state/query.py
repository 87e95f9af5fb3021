"""Reading one user's row beside a live writer: nothing is ever written, and no torch is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from learner.user_state import RowLayout, recent_events
from state.store import RocksReader


@dataclass(frozen=True, slots=True)
class UserReport:
    """What a store knows of one user."""

    user_id: str
    events: int
    first_event_ms: int
    last_event_ms: int
    last_offset: int
    ledger: str
    """Hash chain over the applied events, in hex"""
    meta_version: int
    guarded: int
    """Updates refused because they were not finite"""
    mean: tuple[float, ...]
    """(d,) the adaptive part m"""
    variance: tuple[float, ...]
    """(d,) the diagonal of S; empty for the gradient head"""
    recent_labels: tuple[int, ...]
    """Labels of the latest events, oldest first"""

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def query_user(path: Path, user_id: str) -> UserReport | None:
    """The user's row in the store at ``path``; None for a user it has never learned from.

    Raises StoreUnreadable when there is no store, or RocksDB refuses it.
    """
    with RocksReader(path) as store:
        layout = store.layout
        rows, found = store.get_many([user_id.encode()])
    if not found[0]:
        return None
    row = layout.rows(rows)[0]
    recent = recent_events(layout, row)
    return UserReport(
        user_id,
        int(row["events"]),
        int(row["first_time_ms"]),
        int(row["last_time_ms"]),
        int(row["last_offset"]),
        f"{int(row['ledger']):016x}",
        int(row["meta_version"]),
        int(row["guarded"]),
        tuple(float(m) for m in row["mean"]),
        _variance(layout, row["covariance"]),
        tuple(int(label) for label in recent.label),
    )


def _variance(layout: RowLayout, covariance: Any) -> tuple[float, ...]:
    if layout.kind == "full":
        return tuple(float(covariance[i * (i + 3) // 2]) for i in range(layout.dim))
    return tuple(float(v) for v in covariance)
