"""The compiled walk over a batch of events. ``learner.adaptation`` binds it to a model; its module states the contract.

Symbols: N events, n rows, I items, d and e widths of the first and the second filter.

Three things make it fast, and none of them touches a bit of the result:
- d and e reach the compiler as the *lengths of tuples* (``lanes``), which belong to a type: every inner loop has a
  constant count. Each (d, e) is compiled once, and kept in numba's cache on disk.
- Hot data goes by pointer (``_at``, ``_stack``): numba counts references of every array it passes or slices, and
  cannot know that scratch on the heap overlaps no row.
- ``compile_walk`` turns on LLVM's vectorizer of straight-line code, which numba leaves off; half the time at d = 16.
Arithmetic is float32 in a fixed order, and nothing may be reassociated or contracted (no fastmath).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import config, njit, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from learner.ledger import extend_ledger
from learner.user_state import AGE_DIGITS, HEADER_BYTES, MAX_AGE_S, NO_GRADE

LIMIT = 1e15
"""Largest magnitude that a logit, a mean or a variance may reach; useful ones stay below 1e3. Its square is far
inside float32, so an update within it cannot overflow any entry of a covariance."""

FULL, DIAGONAL, GRADIENT = 0, 1, 2
FIRST_WORD = HEADER_BYTES // 4
"""Where the first filter starts, in 4-byte words."""
_EVENTS, _LAST_OFFSET, _FIRST_TIME, _LAST_TIME, _LEDGER, _GUARDED = 1, 2, 3, 4, 5, 7
"""Header fields in 8-byte words; the low half of _GUARDED counts, its high half is the owner."""
_VECTORIZER = "SLP_VECTORIZE"
"""numba's switch for LLVM's vectorizer of straight-line code (environment: NUMBA_SLP_VECTORIZE)"""


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


class First(NamedTuple):
    """``learner.serving.FirstFilter``, without the start."""

    kind: int
    lanes: tuple[int, ...]
    """d entries; only the length counts"""
    kappa: Any
    drift: Any
    rate: Any
    tau: float
    alpha: float
    target: Any
    weight: Any


class Second(NamedTuple):
    """``learner.serving.SecondFilter``, without the start."""

    lanes: tuple[int, ...]
    """e entries"""
    at: int
    """Where it starts in a row, in 4-byte words"""
    kappa: Any
    drift: Any
    weight: Any


class Constants(NamedTuple):
    """What the walk takes of a model and its rows' layout."""

    first: First
    second: Second
    ring_at: int
    """Where the ring starts in a row, in 8-byte words"""
    ring: int


_compiled: Any = njit(cache=True, nogil=True, error_model="numpy")
_inlined: Any = njit(cache=True, nogil=True, error_model="numpy", forceinline=True)


def _stack_block(typing_context: Any, rows: Any, columns: Any) -> Any:
    """Pointer to len(rows)·len(columns) floats in the caller's stack frame; both are tuples."""
    count = max(rows.count * columns.count, 1)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        block = cgutils.alloca_once(builder, ir.ArrayType(ir.FloatType(), count))  # type: ignore[no-untyped-call]
        block.align = 64
        return builder.bitcast(block, ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(rows, columns), generate  # type: ignore[no-untyped-call]


def _pointer_into(typing_context: Any, array: Any, index: Any) -> Any:
    """Pointer to element ``index`` of a C-contiguous array, counted flat. The array must outlive it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = make_array(signature.args[0])(context, builder, arguments[0]).data  # type: ignore[no-untyped-call]
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate  # type: ignore[no-untyped-call]


_stack: Any = intrinsic(_stack_block)
_at: Any = intrinsic(_pointer_into)


@_inlined
def _sigmoid(z):  # type: ignore[no-untyped-def]
    """In double precision, rounded once: its bits then hardly hang on how a C library rounds."""
    return np.float32(1.0 / (1.0 + math.exp(-np.float64(z))))


@_inlined
def _dot(a, b, lanes):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(len(lanes)):
        total += a[i] * b[i]
    return total


@_inlined
def _full_gain(m, x, lanes, S, gain):  # type: ignore[no-untyped-def]
    """Unpacks the covariance after the mean ``m`` into S (d, d); gain = Sx, in column order; returns v = x'Sx ≥ 0.

    Each packed row is copied d entries long, whatever its length: what follows it is overwritten by the mirror
    image, and no copy reaches past the triangle, whose last row has d entries.
    """
    d = len(lanes)
    k = d
    for i in range(d):
        for j in range(d):
            S[i * d + j] = m[k + j]
        k += i + 1
    for i in range(d):
        for j in range(i):
            S[j * d + i] = S[i * d + j]
    for i in range(d):
        gain[i] = np.float32(0)
    for j in range(d):
        for i in range(d):
            gain[i] += S[j * d + i] * x[j]
    v = _dot(gain, x, lanes)
    return np.float32(0) if v < np.float32(0) else v


@_inlined
def _full_update(m, lanes, S, gain, step, shrink, drift):  # type: ignore[no-untyped-def]
    """m += step·gain; S += diag(drift) − shrink·gain·gain', packed back behind ``m``.

    As in ``_full_gain`` each row is written d entries long; the next one puts right what it spoils.
    """
    d = len(lanes)
    for i in range(d):
        m[i] += gain[i] * step
        S[i * d + i] += drift[i]
    k = d
    for i in range(d):
        scaled = shrink * gain[i]
        for j in range(d):
            m[k + j] = S[i * d + j] - scaled * gain[j]
        k += i + 1


@_inlined
def _sound(m, lanes, gain, z, v, step, shrink):  # type: ignore[no-untyped-def]
    """Whether the update leaves every number finite and within LIMIT; NaN compares false."""
    limit = np.float32(LIMIT)
    sound = (abs(z) <= limit) & (v <= limit) & (abs(step) <= limit) & (shrink <= limit)
    for i in range(len(lanes)):
        sound &= abs(m[i] + gain[i] * step) <= limit
        sound &= shrink * gain[i] * gain[i] <= limit
    return sound


@_inlined
def _kalman_step(raw, v, kappa, y, r):  # type: ignore[no-untyped-def]
    """z, σ(z), and step and shrink of the update m += step·Sψ, S −= shrink·(Sψ)(Sψ)'."""
    one = np.float32(1)
    z = raw / np.float32(math.sqrt(one + kappa * v))
    p = _sigmoid(z)
    w = r * p * (one - p)
    k = one / (one + w * v)
    return z, p, r * (y - p) * k, w * k


@_inlined
def _first_filter(kind, m, x, lanes, raw, y, r, kappa, rate, decay, S, gain):  # type: ignore[no-untyped-def]
    """Fills gain (and S); returns z, σ(z), step, shrink and whether the update may be made."""
    d, v = len(lanes), np.float32(0)
    if kind == GRADIENT:
        for j in range(d):
            gain[j] = rate[j] * x[j]
        p = _sigmoid(raw)
        z, step, shrink = raw, r * (y - p) * decay, np.float32(0)
    else:
        if kind == FULL:
            v = _full_gain(m, x, lanes, S, gain)
        else:
            for j in range(d):
                gain[j] = m[d + j] * x[j]
            v = _dot(gain, x, lanes)
            v = np.float32(0) if v < np.float32(0) else v
        z, p, step, shrink = _kalman_step(raw, v, kappa, y, r)
    return z, p, step, shrink, _sound(m, lanes, gain, z, v, step, shrink)


@_inlined
def _update_first(kind, m, lanes, S, gain, step, shrink, drift):  # type: ignore[no-untyped-def]
    d = len(lanes)
    if kind == FULL:
        _full_update(m, lanes, S, gain, step, shrink, drift)
        return
    for j in range(d):
        m[j] += gain[j] * step
    if kind == DIAGONAL:
        for j in range(d):
            m[d + j] = m[d + j] + drift[j] - shrink * gain[j] * gain[j]


@_inlined
def _log_event(row, offset, hashed, label, kept_grade, time, ring_at, ring):  # type: ignore[no-untyped-def]
    """Writes one event into header, ledger and ring; ``row`` is in 8-byte words."""
    count = row[_EVENTS]
    if count == 0:
        row[_FIRST_TIME] = time
    row[_EVENTS] = count + 1
    row[_LAST_OFFSET] = offset
    row[_LAST_TIME] = time
    row[_LEDGER] = np.int64(extend_ledger(np.uint64(row[_LEDGER]), offset, hashed, label, time))
    if ring > 0:
        age = min(max((time - row[_FIRST_TIME]) // 1000, 0), MAX_AGE_S)
        dropped = 0
        while age >> (dropped + AGE_DIGITS) > 0:
            dropped += 1
        code = (dropped << (AGE_DIGITS - 1)) + (age >> dropped)
        low = np.uint64(label) << np.uint64(23) | np.uint64(kept_grade) << np.uint64(17) | np.uint64(code)
        place = ring_at + np.int64(np.uint64(count) % np.uint64(ring))
        row[place] = np.int64(hashed >> np.uint64(24) << np.uint64(24) | low)


@_compiled
def walk(floats, words, events, items, c, learn, logit, probability, applied):  # type: ignore[no-untyped-def]
    """Predicts N events and, if ``learn``, lets their rows learn them; returns how many updates were refused.

    ``floats`` and ``words`` are the same slab in 4- and 8-byte words. Indices are not checked.
    """
    slots, item_codes, labels, grades, times, offsets, item_rows, item_hashes = events
    psi, bases, second_psi = items
    kind, lanes, kappa, drift, rate, tau, alpha, targets, weights = c.first
    lanes2, at2, kappa2, drift2, weight2 = c.second
    d, e, no_grade = len(lanes), len(lanes2), len(targets) - 1
    drift, rate, drift2 = _at(drift, 0), _at(rate, 0), _at(drift2, 0)
    gain, S = _stack(lanes, (0,)), _stack(lanes, lanes)
    x2, gain2, S2 = _stack(lanes2, (0,)), _stack(lanes2, (0,)), _stack(lanes2, lanes2)
    step2, shrink2, sound2 = np.float32(0), np.float32(0), True
    decay, guarded = np.float32(1), 0
    for n in range(len(slots)):
        row = _at(words, slots[n] * words.shape[1])
        if learn and row[_EVENTS] > 0 and offsets[n] <= row[_LAST_OFFSET]:
            logit[n], probability[n] = np.float32(np.nan), np.float32(np.nan)
            continue
        item = item_codes[n]
        i, grade, label = item_rows[item], grades[n], np.float32(labels[n])
        y = label if grade == no_grade else targets[grade]
        if kind == GRADIENT:
            decay = np.float32((1.0 + np.float64(row[_EVENTS]) / tau) ** -alpha)

        x, m = _at(psi, i * d), _at(floats, slots[n] * floats.shape[1] + FIRST_WORD)
        raw = bases[i] + _dot(m, x, lanes)
        r = weights[grade]
        z, p, step, shrink, sound = _first_filter(kind, m, x, lanes, raw, y, r, kappa, rate, decay, S, gain)
        m2 = _at(floats, slots[n] * floats.shape[1] + at2)
        if e > 0:
            x2[0], x2[1] = np.float32(1), z * np.float32(0.5)
            for j in range(2, e):
                x2[j] = second_psi[i, j - 2]
            v2 = _full_gain(m2, x2, lanes2, S2, gain2)
            z, p, step2, shrink2 = _kalman_step(_dot(m2, x2, lanes2), v2, kappa2, label, weight2)
            sound2 = _sound(m2, lanes2, gain2, z, v2, step2, shrink2)
        if not (sound and sound2):
            guarded += 1
            z = bases[i] if abs(bases[i]) <= np.float32(LIMIT) else np.float32(0)
            p = _sigmoid(z)
        logit[n], probability[n] = z, p
        if not learn:
            continue
        if sound and sound2:
            _update_first(kind, m, lanes, S, gain, step, shrink, drift)
            if e > 0:
                _full_update(m2, lanes2, S2, gain2, step2, shrink2, drift2)
        else:
            row[_GUARDED] += 1
        kept_grade = NO_GRADE if grade == no_grade else grade
        _log_event(row, offsets[n], item_hashes[item], labels[n], kept_grade, times[n], c.ring_at, c.ring)
        applied[n] = True
    return guarded


def compile_walk(*arguments: Any) -> None:
    """Compiles ``walk`` for these arguments, or loads it from the cache, by calling it: give it no events."""
    with global_compiler_lock:
        before = getattr(config, _VECTORIZER)
        setattr(config, _VECTORIZER, 1)
        try:
            walk(*arguments)
        finally:
            setattr(config, _VECTORIZER, before)
