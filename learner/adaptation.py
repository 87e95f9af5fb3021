"""The exact per-event kernel: predict, then learn, one event after the other.

Order inside a user is sacred: an event's prediction knows every earlier event of its user and nothing of its own
label. The equations are those of ``learner.serving.FirstFilter`` and ``SecondFilter``; the second filter takes the
first one's logit z as a feature, [1, z/2, second_psi], and predicts last. All arithmetic is float32 in a fixed
order without reassociation, and an event reads its user's row and its item alone: the bits of rows and predictions
do not depend on how the stream is cut into batches.

Guard: the predicted variance v is never below 0. If anything of an event's prediction or update is not finite, or
larger than LIMIT, the row keeps its parameters, the prediction is the item's base rate b, and the event is counted
in the row's ``guarded``; it still enters ledger, ring and offset, so that a replay agrees.

Symbols: N events, n rows, I items of the batch, d and e widths of the filters, G grades.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from learner.serving import FirstFilter, ItemTable, SecondFilter
from learner.user_state import HEADER_BYTES, MAX_HOURS, NO_GRADE, RowLayout, Slab, extend_ledger

LIMIT = 1e15
"""Largest magnitude a mean, a gain or a logit may have. Squares stay far inside float32, so no entry of a covariance
can overflow before its gain is refused; useful values are below 1e3."""

_HEAD = {"full": 0, "diagonal": 1, "gradient": 2}
_FULL, _DIAGONAL = _HEAD["full"], _HEAD["diagonal"]
_FIRST_WORD = HEADER_BYTES // 4
"""Where the first filter starts, in 4-byte words."""
_EVENTS, _LAST_OFFSET, _FIRST_TIME, _LAST_TIME, _LEDGER, _GUARDED = 1, 2, 3, 4, 5, 7
"""Header fields, in 8-byte words; the low half of _GUARDED counts, its high half is reserved."""


@dataclass(frozen=True, slots=True)
class EventColumns:
    """N events as the kernel takes them, in stream order."""

    slot: NDArray[np.int32]
    """(N,) the user's row in the slab"""
    item: NDArray[np.int32]
    """(N,) index into ``item_row`` and ``item_hash``"""
    label: NDArray[np.int8]
    """(N,) 0 or 1"""
    grade: NDArray[np.int32]
    """(N,) 0 … G − 1, G for none"""
    event_time_ms: NDArray[np.int64]
    """(N,)"""
    offset: NDArray[np.int64]
    """(N,) rising within a user; 0 or more"""
    item_row: NDArray[np.int64]
    """(I,) row of the item table"""
    item_hash: NDArray[np.uint64]
    """(I,) ``learner.user_state.item_hash`` of the item's id"""

    def __len__(self) -> int:
        return len(self.slot)


class Adapted(NamedTuple):
    """What the walk returns, in the order of the events."""

    logit: NDArray[np.float32]
    """(N,) before the event's label was used; NaN where the event was skipped"""
    probability: NDArray[np.float32]
    """(N,) σ(logit)"""
    applied: NDArray[np.bool_]
    """(N,) False where the row had applied the offset already"""
    guarded: int
    """events whose update was refused"""


class _Columns(NamedTuple):
    slot: Any
    item: Any
    label: Any
    grade: Any
    time: Any
    offset: Any
    item_row: Any
    item_hash: Any


class _Items(NamedTuple):
    psi: Any
    base: Any
    second_psi: Any


class _Constants(NamedTuple):
    """Both filters, in types that give one compiled signature for every model."""

    kind: int
    d: int
    e: int
    kappa: np.float32
    drift: Any
    rate: Any
    tau: float
    alpha: float
    target: Any
    weight: Any
    second_at: int
    second_kappa: np.float32
    second_drift: Any
    second_weight: np.float32
    ring_at: int
    ring: int


class Adaptation:
    """The kernel bound to one model's filters. Holds no state of users; safe to use from several threads."""

    def __init__(self, layout: RowLayout, first: FirstFilter, second: SecondFilter | None) -> None:
        wanted = RowLayout.of(first, second, layout.ring)
        if wanted != layout:
            raise ValueError(f"the rows are {layout.fingerprint}, but the model needs {wanted.fingerprint}")
        none = np.zeros(0, np.float32)
        self.layout = layout
        self._constants = _Constants(
            kind=_HEAD[first.kind],
            d=first.dim,
            e=layout.second_dim,
            kappa=np.float32(first.kappa),
            drift=_read_only(first.drift, np.float32),
            rate=_read_only(first.rate, np.float32),
            tau=float(first.tau),
            alpha=float(first.alpha),
            target=_read_only(first.target, np.float32),
            weight=_read_only(first.weight, np.float32),
            second_at=_FIRST_WORD + first.dim + layout.covariance_width,
            second_kappa=np.float32(0 if second is None else second.kappa),
            second_drift=_read_only(none if second is None else second.drift, np.float32),
            second_weight=np.float32(0 if second is None else second.weight),
            ring_at=layout.row_bytes // 8 - layout.ring,
            ring=layout.ring,
        )

    def learn(self, slab: Slab, events: EventColumns, items: ItemTable) -> Adapted:
        """Predicts every event, then lets its user's row learn it, in place; ``slab`` is (n, row_bytes)."""
        return self._run(slab, events, items, True)

    def predict(self, slab: Slab, events: EventColumns, items: ItemTable) -> Adapted:
        """Predicts every event from its row as it stands; nothing is learned, skipped or written."""
        return self._run(slab, events, items, False)

    def _run(self, slab: Slab, events: EventColumns, items: ItemTable, learn: bool) -> Adapted:
        _check(slab, events, items, self.layout, len(self._constants.target) - 1)
        n = len(events)
        logit, probability = np.empty(n, np.float32), np.empty(n, np.float32)
        applied = np.zeros(n, np.bool_)
        columns = _Columns(
            _read_only(events.slot, np.int32), _read_only(events.item, np.int32), _read_only(events.label, np.int8),
            _read_only(events.grade, np.int32), _read_only(events.event_time_ms, np.int64),
            _read_only(events.offset, np.int64), _read_only(events.item_row, np.int64),
            _read_only(events.item_hash, np.uint64),
        )  # fmt: skip
        table = _Items(
            _read_only(items.psi, np.float32), _read_only(items.base, np.float32),
            _read_only(items.second_psi, np.float32),
        )  # fmt: skip
        floats, words = slab.view(np.float32), slab.view(np.int64)
        guarded = _walk(floats, words, columns, table, self._constants, learn, logit, probability, applied)
        return Adapted(logit, probability, applied, guarded)


def warm_up(adaptation: Adaptation) -> None:
    """Compiles the kernel, or loads it from numba's cache on disk, before the first event waits for it."""
    layout = adaptation.layout
    slab = np.zeros((0, layout.row_bytes), np.uint8)
    events = EventColumns(
        *(np.zeros(0, t) for t in (np.int32, np.int32, np.int8, np.int32, np.int64, np.int64, np.int64, np.uint64))
    )
    widths = (layout.dim, max(layout.second_dim - 2, 0))
    items = ItemTable(
        np.zeros((0, widths[0]), np.float32), np.zeros(0, np.float32), np.zeros((0, widths[1]), np.float32)
    )
    adaptation.learn(slab, events, items)


def _read_only(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array as C-contiguous, read-only ``dtype``: numba compiles writable and read-only arrays apart."""
    view = np.ascontiguousarray(array, dtype).view()
    view.flags.writeable = False
    return view


def _check(slab: Slab, events: EventColumns, items: ItemTable, layout: RowLayout, grades: int) -> None:
    """The kernel checks no bounds, so indices are checked here. ValueError says which one is out of range."""
    if slab.ndim != 2 or slab.shape[1] != layout.row_bytes or not slab.flags.c_contiguous:
        raise ValueError(f"a slab is C-contiguous (n, {layout.row_bytes}), got {slab.shape}")
    if items.psi.shape[1] != layout.dim or items.second_psi.shape[1] != max(layout.second_dim - 2, 0):
        raise ValueError(f"the item table does not fit {layout.fingerprint}")
    for name, index, bound in (
        ("slot", events.slot, len(slab)),
        ("item", events.item, len(events.item_row)),
        ("item_row", events.item_row, len(items.base)),
        ("grade", events.grade, grades + 1),
    ):
        if len(index) and not (index.min() >= 0 and index.max() < bound):
            raise ValueError(f"{name} is outside 0 … {bound - 1}")
    if {len(column) for column in (events.item, events.label, events.grade, events.event_time_ms, events.offset)} != {
        len(events)
    } or len(events.item_hash) != len(events.item_row):
        raise ValueError("event columns differ in length")


# --- compiled -------------------------------------------------------------------------------------------------
# Scratch arrays: ``gain`` holds Sψ. A row is (words,) float32, a filter starts at word ``at``: mean, then covariance.


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _dot(row, at, x, d):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(d):
        total += row[at + i] * x[i]
    return total


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _full_gain(row, at, x, d, gain):  # type: ignore[no-untyped-def]
    """gain = Sx from the packed triangle, each entry read once. Returns v = x'Sx, at least 0."""
    for i in range(d):
        gain[i] = np.float32(0)
    k = at + d
    for i in range(d):
        xi = x[i]
        below = np.float32(0)
        for j in range(i):
            below += row[k + j] * x[j]
            gain[j] += row[k + j] * xi
        gain[i] += below + row[k + i] * xi
        k += i + 1
    v = np.float32(0)
    for i in range(d):
        v += gain[i] * x[i]
    return np.float32(0) if v < np.float32(0) else v


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _full_update(row, at, d, gain, step, shrink, drift):  # type: ignore[no-untyped-def]
    """m += step·gain; S −= shrink·gain·gain'; diag(S) += drift."""
    k = at + d
    for i in range(d):
        row[at + i] += gain[i] * step
        scaled = shrink * gain[i]
        for j in range(i):
            row[k + j] -= scaled * gain[j]
        row[k + i] += drift[i] - scaled * gain[i]
        k += i + 1


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sound(row, at, d, gain, z, v, step, shrink):  # type: ignore[no-untyped-def]
    """Whether the update would leave every number finite and within LIMIT."""
    limit = np.float32(LIMIT)
    sound = abs(z) <= limit and v <= limit and abs(step) <= limit and shrink <= limit
    for i in range(d):
        sound &= abs(gain[i]) <= limit
        sound &= abs(row[at + i] + gain[i] * step) <= limit
        sound &= abs(shrink * gain[i]) <= limit
    return sound


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _sigmoid(z):  # type: ignore[no-untyped-def]
    """In double precision, rounded once: the bits then do not hang on how a C library rounds expf."""
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(z))))


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _log_event(header, events, m, c):  # type: ignore[no-untyped-def]
    """Writes the event into header, ledger and ring; ``header`` is the whole row in 8-byte words."""
    count, time, offset = header[_EVENTS], events.time[m], events.offset[m]
    hashed, label, grade = events.item_hash[events.item[m]], events.label[m], events.grade[m]
    if count == 0:
        header[_FIRST_TIME] = time
    header[_EVENTS] = count + 1
    header[_LAST_OFFSET] = offset
    header[_LAST_TIME] = time
    header[_LEDGER] = np.int64(extend_ledger(np.uint64(header[_LEDGER]), offset, hashed, label, time))
    if c.ring > 0:
        hours = min(max((time - header[_FIRST_TIME]) // 3_600_000, 0), MAX_HOURS)
        kept_grade = NO_GRADE if grade == len(c.target) - 1 else grade
        low = np.uint64(label) << np.uint64(23) | np.uint64(kept_grade) << np.uint64(17) | np.uint64(hours)
        entry = hashed >> np.uint64(24) << np.uint64(24) | low
        header[c.ring_at + count % c.ring] = np.int64(entry)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _kalman_step(raw, v, kappa, y, r):  # type: ignore[no-untyped-def]
    """z, step and shrink of a logistic Kalman update: m += step·Sψ, S −= shrink·(Sψ)(Sψ)'."""
    one = np.float32(1)
    z = raw / np.float32(math.sqrt(one + kappa * v))
    p = _sigmoid(z)
    w = r * p * (one - p)
    k = one / (one + w * v)
    return z, r * (y - p) * k, w * k


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _first_filter(row, count, x, base, y, r, c, gain):  # type: ignore[no-untyped-def]
    """Predicts and prepares the update; returns z, step, shrink and whether the update may be made."""
    at, d = _FIRST_WORD, c.d
    raw, v = base + _dot(row, at, x, d), np.float32(0)
    if c.kind == _FULL:
        v = _full_gain(row, at, x, d, gain)
        z, step, shrink = _kalman_step(raw, v, c.kappa, y, r)
    elif c.kind == _DIAGONAL:
        for j in range(d):
            gain[j] = row[at + d + j] * x[j]
            v += gain[j] * x[j]
        v = np.float32(0) if v < np.float32(0) else v
        z, step, shrink = _kalman_step(raw, v, c.kappa, y, r)
    else:
        for j in range(d):
            gain[j] = c.rate[j] * x[j]
        decay = np.float32((1.0 + np.float64(count) / c.tau) ** -c.alpha)
        z, step, shrink = raw, r * (y - _sigmoid(raw)) * decay, np.float32(0)
    return z, step, shrink, _sound(row, at, d, gain, z, v, step, shrink)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _second_filter(row, z, second_psi, y, c, x, gain):  # type: ignore[no-untyped-def]
    """As ``_first_filter``, over x = [1, z/2, second_psi]; base 0."""
    at, e = c.second_at, c.e
    x[0], x[1] = np.float32(1), z * np.float32(0.5)
    for j in range(2, e):
        x[j] = second_psi[j - 2]
    v = _full_gain(row, at, x, e, gain)
    z, step, shrink = _kalman_step(_dot(row, at, x, e), v, c.second_kappa, y, c.second_weight)
    return z, step, shrink, _sound(row, at, e, gain, z, v, step, shrink)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _update_first(row, c, gain, step, shrink):  # type: ignore[no-untyped-def]
    at, d = _FIRST_WORD, c.d
    if c.kind == _FULL:
        _full_update(row, at, d, gain, step, shrink, c.drift)
        return
    for j in range(d):
        row[at + j] += gain[j] * step
    if c.kind == _DIAGONAL:
        for j in range(d):
            row[at + d + j] += c.drift[j] - shrink * gain[j] * gain[j]


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _walk(floats, words, events, items, c, learn, logit, probability, applied):  # type: ignore[no-untyped-def]
    """The walk over N events; returns how many were guarded. ``floats`` and ``words`` view the same slab."""
    gain, gain2, x2 = np.empty(c.d, np.float32), np.empty(c.e, np.float32), np.empty(c.e, np.float32)
    step2, shrink2 = np.float32(0), np.float32(0)
    guarded = 0
    for m in range(len(events.slot)):
        row, header = floats[events.slot[m]], words[events.slot[m]]
        if learn and header[_EVENTS] > 0 and events.offset[m] <= header[_LAST_OFFSET]:
            logit[m], probability[m] = np.float32(np.nan), np.float32(np.nan)
            continue
        i, grade, label = events.item_row[events.item[m]], events.grade[m], np.float32(events.label[m])
        y = label if grade == len(c.target) - 1 else c.target[grade]
        base = items.base[i]
        z, step, shrink, sound = _first_filter(row, header[_EVENTS], items.psi[i], base, y, c.weight[grade], c, gain)
        if c.e > 0:
            z, step2, shrink2, sound2 = _second_filter(row, z, items.second_psi[i], label, c, x2, gain2)
            sound = sound and sound2
        if not sound:
            guarded += 1
            z = base if abs(base) <= np.float32(LIMIT) else np.float32(0)
        logit[m], probability[m] = z, _sigmoid(z)
        if learn:
            if sound:
                _update_first(row, c, gain, step, shrink)
                if c.e > 0:
                    _full_update(row, c.second_at, c.e, gain2, step2, shrink2, c.second_drift)
            else:
                header[_GUARDED] += 1
            _log_event(header, events, m, c)
            applied[m] = True
    return guarded
