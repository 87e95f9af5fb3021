"""The compiled walk over a batch of events. ``learner.adaptation`` binds it to a model; its module states the contract.

Symbols: N events, n rows, I items, d and e widths of the first and the second filter.

Three things make it fast, and none of them touches a bit of the result:
- d and e reach the compiler as the *lengths of tuples* (``lanes``), which belong to a type: every inner loop has a
  constant count. Each (d, e) is compiled once, and kept in numba's cache on disk.
- Scratch lives on the stack (``_stack``), so the compiler knows that it overlaps no row.
- ``compile_walk`` turns on LLVM's vectorizer of straight-line code, which numba leaves off; half the time at d = 16.
Arithmetic is float32 in a fixed order, and nothing may be reassociated or contracted (no fastmath).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic

from learner.user_state import HEADER_BYTES, MAX_HOURS, NO_GRADE, extend_ledger

LIMIT = 1e15
"""Largest magnitude that a logit, a mean or a variance may reach; useful ones stay below 1e3. Its square is far
inside float32, so an update within it cannot overflow any entry of a covariance."""

FULL, DIAGONAL, GRADIENT = 0, 1, 2
FIRST_WORD = HEADER_BYTES // 4
"""Where the first filter starts, in 4-byte words."""
_EVENTS, _LAST_OFFSET, _FIRST_TIME, _LAST_TIME, _LEDGER, _GUARDED = 1, 2, 3, 4, 5, 7
"""Header fields in 8-byte words; the low half of _GUARDED counts, its high half is reserved."""
_HOUR_MS = 3_600_000


class Columns(NamedTuple):
    """``learner.adaptation.EventColumns``, all arrays read-only."""

    slot: Any
    item: Any
    label: Any
    grade: Any
    event_time_ms: Any
    offset: Any
    item_row: Any
    item_hash: Any


class Items(NamedTuple):
    """``learner.serving.ItemTable``, all arrays read-only."""

    psi: Any
    base: Any
    second_psi: Any


class Constants(NamedTuple):
    """Both filters (``learner.serving``) and where a row has them."""

    kind: int
    lanes: tuple[int, ...]
    """d entries; only the length counts"""
    second_lanes: tuple[int, ...]
    """e entries"""
    kappa: Any
    drift: Any
    rate: Any
    tau: float
    alpha: float
    target: Any
    weight: Any
    second_at: int
    """Where the second filter starts, in 4-byte words"""
    second_kappa: Any
    second_drift: Any
    second_weight: Any
    ring_at: int
    """Where the ring starts, in 8-byte words"""
    ring: int


_inlined = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


@intrinsic  # type: ignore[untyped-decorator]
def _stack(typing_context: Any, rows: Any, columns: Any) -> Any:
    """Pointer to len(rows)·len(columns) floats in the caller's stack frame; both are tuples."""
    count = max(rows.count * columns.count, 1)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), count))
        block.align = 64
        return builder.bitcast(block, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(rows, columns), generate


@_inlined  # type: ignore[untyped-decorator]
def _sigmoid(z):  # type: ignore[no-untyped-def]
    """In double precision, rounded once: its bits then hardly hang on how a C library rounds."""
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(z))))


@_inlined  # type: ignore[untyped-decorator]
def _dot(row, at, x, lanes):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(lanes)):
        total += row[at + np.uint64(i)] * x[i]
    return total


@_inlined  # type: ignore[untyped-decorator]
def _full_gain(row, at, x, lanes, S, gain):  # type: ignore[no-untyped-def]
    """Unpacks the covariance into S (d, d); gain = Sx, summed in column order. Returns v = x'Sx, at least 0.

    Each packed row is copied d entries long, whatever its length: what follows it is overwritten by the mirror
    image, and no copy reaches past the triangle, whose last row has d entries.
    """
    d = len(lanes)
    k = at + np.uint64(d)
    for i in range(d):
        for j in range(d):
            S[i, j] = row[k + np.uint64(j)]
        k += np.uint64(i + 1)
    for i in range(d):
        for j in range(i):
            S[j, i] = S[i, j]
    for i in range(d):
        gain[i] = np.float32(0)
    for j in range(d):
        for i in range(d):
            gain[i] += S[j, i] * x[j]
    v = np.float32(0)
    for i in range(d):
        v += gain[i] * x[i]
    return np.float32(0) if v < np.float32(0) else v


@_inlined  # type: ignore[untyped-decorator]
def _full_update(row, at, lanes, S, gain, step, shrink, drift):  # type: ignore[no-untyped-def]
    """m += step·gain; S += diag(drift) − shrink·gain·gain', packed back.

    As in ``_full_gain`` each row is written d entries long; the next one puts right what it spoils.
    """
    d = len(lanes)
    for i in range(d):
        row[at + np.uint64(i)] += gain[i] * step
        S[i, i] += drift[i]
    k = at + np.uint64(d)
    for i in range(d):
        scaled = shrink * gain[i]
        for j in range(d):
            row[k + np.uint64(j)] = S[i, j] - scaled * gain[j]
        k += np.uint64(i + 1)


@_inlined  # type: ignore[untyped-decorator]
def _sound(row, at, lanes, gain, z, v, step, shrink):  # type: ignore[no-untyped-def]
    """Whether the update leaves every number finite and within LIMIT; NaN compares false."""
    limit = np.float32(LIMIT)
    sound = abs(z) <= limit and v <= limit and abs(step) <= limit and shrink <= limit
    for i in range(len(lanes)):
        sound &= abs(row[at + np.uint64(i)] + gain[i] * step) <= limit
        sound &= shrink * gain[i] * gain[i] <= limit
    return sound


@_inlined  # type: ignore[untyped-decorator]
def _kalman_step(raw, v, kappa, y, r):  # type: ignore[no-untyped-def]
    """z, and step and shrink of the update m += step·Sψ, S −= shrink·(Sψ)(Sψ)'."""
    one = np.float32(1)
    z = raw / np.float32(math.sqrt(one + kappa * v))
    p = _sigmoid(z)
    w = r * p * (one - p)
    k = one / (one + w * v)
    return z, r * (y - p) * k, w * k


@_inlined  # type: ignore[untyped-decorator]
def _first_filter(row, count, x, base, y, r, c, S, gain):  # type: ignore[no-untyped-def]
    """Predicts and prepares the update; returns z, step, shrink and whether the update may be made."""
    at, d = np.uint64(FIRST_WORD), len(c.lanes)
    raw, v = base + _dot(row, at, x, c.lanes), np.float32(0)
    if c.kind == GRADIENT:
        for j in range(d):
            gain[j] = c.rate[j] * x[j]
        decay = np.float32((1.0 + np.float64(count) / c.tau) ** -c.alpha)
        z, step, shrink = raw, r * (y - _sigmoid(raw)) * decay, np.float32(0)
    else:
        if c.kind == FULL:
            v = _full_gain(row, at, x, c.lanes, S, gain)
        else:
            for j in range(d):
                gain[j] = row[at + np.uint64(d + j)] * x[j]
                v += gain[j] * x[j]
            v = np.float32(0) if v < np.float32(0) else v
        z, step, shrink = _kalman_step(raw, v, c.kappa, y, r)
    return z, step, shrink, _sound(row, at, c.lanes, gain, z, v, step, shrink)


@_inlined  # type: ignore[untyped-decorator]
def _update_first(row, c, S, gain, step, shrink):  # type: ignore[no-untyped-def]
    at, d = np.uint64(FIRST_WORD), len(c.lanes)
    if c.kind == FULL:
        _full_update(row, at, c.lanes, S, gain, step, shrink, c.drift)
        return
    for j in range(d):
        row[at + np.uint64(j)] += gain[j] * step
    if c.kind == DIAGONAL:
        for j in range(d):
            row[at + np.uint64(d + j)] += c.drift[j] - shrink * gain[j] * gain[j]


@_inlined  # type: ignore[untyped-decorator]
def _second_filter(row, z, second_psi, y, c, x, S, gain):  # type: ignore[no-untyped-def]
    """As ``_first_filter``, over x = [1, z/2, second_psi] with base 0; fills x."""
    at, e = np.uint64(c.second_at), len(c.second_lanes)
    x[0], x[1] = np.float32(1), z * np.float32(0.5)
    for j in range(2, e):
        x[j] = second_psi[j - 2]
    v = _full_gain(row, at, x, c.second_lanes, S, gain)
    raw = _dot(row, at, x, c.second_lanes)
    z, step, shrink = _kalman_step(raw, v, c.second_kappa, y, c.second_weight)
    return z, step, shrink, _sound(row, at, c.second_lanes, gain, z, v, step, shrink)


@_inlined  # type: ignore[untyped-decorator]
def _log_event(row, events, m, c):  # type: ignore[no-untyped-def]
    """Writes event m into header, ledger and ring; ``row`` is in 8-byte words."""
    count, time, offset = row[_EVENTS], events.event_time_ms[m], events.offset[m]
    hashed, label, grade = events.item_hash[events.item[m]], events.label[m], events.grade[m]
    if count == 0:
        row[_FIRST_TIME] = time
    row[_EVENTS] = count + 1
    row[_LAST_OFFSET] = offset
    row[_LAST_TIME] = time
    row[_LEDGER] = np.int64(extend_ledger(np.uint64(row[_LEDGER]), offset, hashed, label, time))
    if c.ring > 0:
        hours = min(max((time - row[_FIRST_TIME]) // _HOUR_MS, 0), MAX_HOURS)
        kept_grade = NO_GRADE if grade == len(c.target) - 1 else grade
        low = np.uint64(label) << np.uint64(23) | np.uint64(kept_grade) << np.uint64(17) | np.uint64(hours)
        row[c.ring_at + count % c.ring] = np.int64(hashed >> np.uint64(24) << np.uint64(24) | low)


@njit(cache=True, nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def walk(floats, words, events, items, c, learn, logit, probability, applied):  # type: ignore[no-untyped-def]
    """Predicts N events and, if ``learn``, lets their rows learn them; returns how many updates were refused.

    ``floats`` and ``words`` are the same slab in 4- and 8-byte words. Indices are not checked.
    """
    d, e = len(c.lanes), len(c.second_lanes)
    x, gain = carray(_stack(c.lanes, (0,)), (d,)), carray(_stack(c.lanes, (0,)), (d,))
    S = carray(_stack(c.lanes, c.lanes), (d, d))
    x2, gain2 = carray(_stack(c.second_lanes, (0,)), (e,)), carray(_stack(c.second_lanes, (0,)), (e,))
    S2 = carray(_stack(c.second_lanes, c.second_lanes), (e, e))
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
        for j in range(d):
            x[j] = items.psi[i, j]
        z, step, shrink, sound = _first_filter(row, header[_EVENTS], x, base, y, c.weight[grade], c, S, gain)
        if e > 0:
            z, step2, shrink2, sound2 = _second_filter(row, z, items.second_psi[i], label, c, x2, S2, gain2)
            sound = sound and sound2
        if not sound:
            guarded += 1
            z = base if abs(base) <= np.float32(LIMIT) else np.float32(0)
        logit[m], probability[m] = z, _sigmoid(z)
        if learn:
            if sound:
                _update_first(row, c, S, gain, step, shrink)
                if e > 0:
                    _full_update(row, np.uint64(c.second_at), c.second_lanes, S2, gain2, step2, shrink2, c.second_drift)
            else:
                header[_GUARDED] += 1
            _log_event(header, events, m, c)
            applied[m] = True
    return guarded


def compile_walk(*arguments: Any) -> None:
    """Compiles ``walk`` for these arguments, or loads it from the cache, by calling it: give it no events."""
    with global_compiler_lock:
        before = numba.config.SLP_VECTORIZE
        numba.config.SLP_VECTORIZE = 1
        try:
            walk(*arguments)
        finally:
            numba.config.SLP_VECTORIZE = before
