"""Reading one user's row beside a live writer: nothing is ever written, and no torch is loaded."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rocksdict import AccessType, Options, Rdict

from learner.user_state import RowLayout, recent_events
from state.exceptions import StoreUnreadable
from state.store import LAYOUT_KEY, user_key

_FINGERPRINT = re.compile(r"row-v\d+ head=(\w+) d=(\d+) second=(\d+) ring=(\d+)")


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
    if not (path / "CURRENT").is_file():
        raise StoreUnreadable(f"{path} holds no store: name a partition's directory under --state of a run")
    fingerprint, packed = _read(path, [LAYOUT_KEY, user_key(user_id.encode())])
    layout = _layout(path, fingerprint)
    if packed is None:
        return None
    row = layout.rows(np.frombuffer(packed, np.uint8).reshape(1, -1))[0]
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


def _read(path: Path, keys: list[Any]) -> list[bytes | None]:
    try:
        db = Rdict(str(path), options=Options(raw_mode=True), access_type=AccessType.read_only())
    except Exception as error:  # rocksdict raises bare Exception for everything RocksDB says
        raise StoreUnreadable(f"the store {path} cannot be read: {error}; restore it, or run again") from error
    try:
        values: Any = db.get(keys)
        return list(values)
    finally:
        db.close()


def _layout(path: Path, fingerprint: bytes | None) -> RowLayout:
    parts = _FINGERPRINT.fullmatch((fingerprint or b"").decode(errors="replace"))
    if parts is None:
        raise StoreUnreadable(f"{path} does not say which rows it holds: it was not made by a run of coldstream")
    kind: Any = parts[1]
    return RowLayout(kind, int(parts[2]), int(parts[3]), int(parts[4]))


def _variance(layout: RowLayout, covariance: Any) -> tuple[float, ...]:
    if layout.kind == "full":
        return tuple(float(covariance[i * (i + 3) // 2]) for i in range(layout.dim))
    return tuple(float(v) for v in covariance)
