"""One user's updates again, in plain numpy: the kernel's numbers without compiled code, bit for bit.

``learner.kernel`` walks millions of events; this walks the latest few of one user and keeps the state after each, so
that a reader can say what each event did. Every operation is float32, in the kernel's order: sums run from index 0
up, one addition after the other, and nothing is contracted. A test holds the two together.

Symbols: I items, d and e widths of the filters.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.filters import FirstFilter, Float, ItemTable, SecondFilter

LIMIT = np.float32(1e15)
"""``learner.kernel.LIMIT``"""
_ZERO, _ONE, _HALF = np.float32(0), np.float32(1), np.float32(0.5)
_AT_ONCE = 1 << 15
"""Products that are kept at once: for few items one call of numpy is faster than d, for many the memory is slower"""
_EXP_OVERFLOWS = 709.782712893384
"""math.exp raises beyond it, where the kernel's gives infinity"""


class AdaptivePart(NamedTuple):
    """φ_u after ``events`` events. The arrays are the row's fields of the same names; nobody writes to them."""

    events: int
    mean: Float
    covariance: Float
    second_mean: Float
    second_covariance: Float

    @staticmethod
    def of(row: np.void) -> AdaptivePart:
        """A copy of what a row of ``RowLayout.rows`` holds."""
        arrays = (np.array(row[name]) for name in ("mean", "covariance", "second_mean", "second_covariance"))
        return AdaptivePart(int(row["events"]), *arrays)

    def put(self, row: np.void) -> None:
        """Writes it into a row."""
        row["events"] = self.events
        row["mean"], row["covariance"] = self.mean, self.covariance
        row["second_mean"], row["second_covariance"] = self.second_mean, self.second_covariance

    def same_bits(self, other: AdaptivePart) -> bool:
        """Whether the two are equal to the bit, their counts included."""
        return self.events == other.events and all(
            a.tobytes() == b.tobytes()
            for a, b in (
                (self.mean, other.mean),
                (self.covariance, other.covariance),
                (self.second_mean, other.second_mean),
                (self.second_covariance, other.second_covariance),
            )
        )


class Step(NamedTuple):
    """One event: what was predicted, and the state after it."""

    logit: np.float32
    probability: np.float32
    """Before the event's label was used"""
    guarded: bool
    """The update was refused because it was not finite"""
    after: AdaptivePart


class _Update(NamedTuple):
    """One filter at I items: prediction and update."""

    z: Float
    p: Float
    """(I,) logit and probability"""
    v: Float
    """(I,) variance ψ'Sψ; zeros for the gradient head"""
    gain: Float
    """(d, I) Sψ"""
    step: Float
    shrink: Float
    """(I,) of m += step·Sψ, S −= shrink·(Sψ)(Sψ)'"""
    sound: NDArray[np.bool_]
    """(I,) whether it may be made"""


class Retrace:
    """A model's two filters for one user at a time. Holds no state of users."""

    def __init__(self, first: FirstFilter, second: SecondFilter | None) -> None:
        self.first = first
        self.second = second

    def start(self, mean: Float) -> AdaptivePart:
        """The part before the first event of a user who starts at ``mean`` (d,)."""
        none = np.zeros(0, np.float32)
        if self.second is None:
            return AdaptivePart(0, mean, self.first.covariance, none, none)
        return AdaptivePart(0, mean, self.first.covariance, self.second.initialization, self.second.covariance)

    def predict(self, part: AdaptivePart, items: ItemTable, *, exact: bool = True) -> tuple[Float, Float]:
        """(logits, probabilities), each (I,): what the stream would say of these items to this user now.

        Without ``exact`` the probabilities are those of numpy's faster exponential, which may differ in the last bit.
        """
        with np.errstate(all="ignore"):
            first, second = self._updates(part, items, _ZERO, len(self.first.target) - 1, exact)
        final = first if second is None else second
        sound = first.sound if second is None else first.sound & second.sound
        if sound.all():
            return final.z, final.p
        fallen = _fallen(items.base)
        z = np.where(sound, final.z, fallen)
        return z, np.where(sound, final.p, _sigmoid(fallen, exact))

    def learn(self, part: AdaptivePart, item: ItemTable, label: int, grade: int) -> Step:
        """The next event of the user: ``item`` has one row; ``grade`` is len(first.target) − 1 for none."""
        with np.errstate(all="ignore"):
            first, second = self._updates(part, item, np.float32(label), grade, True)
            if not (first.sound[0] and (second is None or second.sound[0])):
                z = _fallen(item.base)
                same = (part.mean, part.covariance, part.second_mean, part.second_covariance)
                return Step(z[0], _sigmoid(z, True)[0], True, AdaptivePart(part.events + 1, *same))
            mean = part.mean + first.gain[:, 0] * first.step[0]
            covariance = self._shrunk(part.covariance, first)
            second_mean, second_covariance = part.second_mean, part.second_covariance
            if self.second is not None and second is not None:
                second_mean = second_mean + second.gain[:, 0] * second.step[0]
                second_covariance = _full_shrunk(second_covariance, second, self.second.drift)
        final = first if second is None else second
        after = AdaptivePart(part.events + 1, mean, covariance, second_mean, second_covariance)
        return Step(final.z[0], final.p[0], False, after)

    def influence(self, part: AdaptivePart, item: ItemTable, label: int, grade: int, number: int) -> Float:
        """(d,) how much of the mean is owed to one event that ``part`` has learned, by first order at ``part``.

        Leaving the event out moves the mean by one Newton step against it: Sψ·r·(y−p)/(1 − w·v), the leave-one-out
        step of a logistic posterior with covariance S. Drift makes w·v, the event's share in what is known along its
        ψ, too large for old events, so at most 1/2 is believed. The gradient head has no S: it is the event's own
        step, decayed as event ``number`` (from 0) was.
        """
        then = part._replace(events=number)
        with np.errstate(all="ignore"):
            update = self._updates(then, item, np.float32(label), grade, True)[0]
            share = self.first.weight[grade] * update.p * (_ONE - update.p) * update.v
            step = update.step * (_ONE + share) / (_ONE - np.minimum(share, _HALF))
            moved: Float = update.gain[:, 0] * step[0]
        return moved

    def _updates(
        self, part: AdaptivePart, items: ItemTable, label: np.float32, grade: int, exact: bool
    ) -> tuple[_Update, _Update | None]:
        psi = np.ascontiguousarray(items.psi.T)
        y = label if grade == len(self.first.target) - 1 else self.first.target[grade]
        first = self._first_filter(part, psi, items.base, y, self.first.weight[grade], exact)
        if self.second is None:
            return first, None
        psi2 = np.empty((self.second.dim, len(items.base)), np.float32)
        psi2[0], psi2[1], psi2[2:] = _ONE, first.z * _HALF, items.second_psi.T
        gain = _matrix_gain(_unpacked(part.second_covariance, self.second.dim), psi2)
        raw = _dot(part.second_mean[:, None], psi2)
        kappa, weight = np.float32(self.second.kappa), np.float32(self.second.weight)
        return first, _kalman(part.second_mean, raw, gain, psi2, kappa, label, weight, exact)

    def _first_filter(
        self, part: AdaptivePart, psi: Float, base: Float, y: np.float32, r: np.float32, exact: bool
    ) -> _Update:
        raw = base + _dot(part.mean[:, None], psi)
        if self.first.kind == "gradient":
            gain = self.first.rate[:, None] * psi
            p = _sigmoid(raw, exact)
            step = r * (y - p) * self._decay(part.events)
            zeros = np.zeros_like(raw)
            return _Update(raw, p, zeros, gain, step, zeros, _sound(part.mean, raw, zeros, gain, step, zeros))
        if self.first.kind == "full":
            gain = _matrix_gain(_unpacked(part.covariance, len(psi)), psi)
        else:
            gain = part.covariance[:, None] * psi
        return _kalman(part.mean, raw, gain, psi, np.float32(self.first.kappa), y, r, exact)

    def _decay(self, events: int) -> np.float32:
        """(1 + n/tau)^−alpha of the gradient head, in double precision, rounded once."""
        grown = float(1.0 + np.float64(events) / np.float64(self.first.tau))
        return np.float32(grown**-self.first.alpha)

    def _shrunk(self, covariance: Float, update: _Update) -> Float:
        if self.first.kind == "full":
            return _full_shrunk(covariance, update, self.first.drift)
        if self.first.kind == "diagonal":
            gain = update.gain[:, 0]
            covariance = covariance + self.first.drift - update.shrink[0] * gain * gain
        return covariance


def _kalman(
    mean: Float, raw: Float, gain: Float, psi: Float, kappa: np.float32, y: np.float32, r: np.float32, exact: bool
) -> _Update:
    v = _dot(gain, psi)
    v = np.where(v < _ZERO, _ZERO, v)
    z = raw / np.sqrt(_ONE + kappa * v)
    p = _sigmoid(z, exact)
    w = r * p * (_ONE - p)
    k = _ONE / (_ONE + w * v)
    step, shrink = r * (y - p) * k, w * k
    return _Update(z, p, v, gain, step, shrink, _sound(mean, z, v, gain, step, shrink))


def _sound(mean: Float, z: Float, v: Float, gain: Float, step: Float, shrink: Float) -> NDArray[np.bool_]:
    """(I,) whether the update leaves every number finite and within LIMIT; NaN compares false."""
    sound = (np.abs(z) <= LIMIT) & (v <= LIMIT) & (np.abs(step) <= LIMIT) & (shrink <= LIMIT)
    sound &= (np.abs(mean[:, None] + gain * step) <= LIMIT).all(axis=0)
    sound &= (shrink * gain * gain <= LIMIT).all(axis=0)
    return sound


def _fallen(base: Float) -> Float:
    """(I,) the logit of a prediction that is not finite: the item's base rate, or 0."""
    return np.where(np.abs(base) <= LIMIT, base, _ZERO)


def _dot(a: Float, b: Float) -> Float:
    """(I,) Σ_i a_i·b_i, in order of i; ``a`` is (d, I) or (d, 1)."""
    return _sum_in_order(a, b, np.zeros(b.shape[1], np.float32))


def _matrix_gain(matrix: Float, psi: Float) -> Float:
    """(d, I) S·ψ, added up column by column of the (d, d) ``matrix``."""
    return _sum_in_order(matrix[:, :, None], psi[:, None, :], np.zeros_like(psi))


def _sum_in_order(a: Float, b: Float, total: Float) -> Float:
    """Adds a[0]·b[0], a[1]·b[1], … to the zeros in ``total``, one after the other."""
    if len(b) * total.size <= _AT_ONCE:
        products: Float = a * b
        products[0] += total  # a sum that starts at 0 is never −0
        added: Float = np.add.accumulate(products, axis=0)[-1]
        return added
    for i in range(len(b)):
        total += a[i] * b[i]
    return total


def _full_shrunk(packed: Float, update: _Update, drift: Float) -> Float:
    """S + diag(drift) − shrink·(Sψ)(Sψ)', packed."""
    gain = update.gain[:, 0]
    rows, columns, diagonal, _ = _packing(len(gain))
    grown = packed.copy()
    grown[diagonal] += drift
    shrunk: Float = grown - (update.shrink[0] * gain)[rows] * gain[columns]
    return shrunk


def _unpacked(packed: Float, dim: int) -> Float:
    """(d, d) from the row-major lower triangle."""
    matrix: Float = packed[_packing(dim)[3]]
    return matrix


@cache
def _packing(dim: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(P,) row and column of a packed entry, (d,) places of the diagonal, (d, d) place of each matrix entry."""
    rows, columns = np.tril_indices(dim)
    low, high = np.minimum.outer(*[np.arange(dim)] * 2), np.maximum.outer(*[np.arange(dim)] * 2)
    steps = np.arange(dim)
    return rows, columns, steps * (steps + 3) // 2, high * (high + 1) // 2 + low


def _sigmoid(z: Float, exact: bool) -> Float:
    """In double precision, rounded once. ``exact`` takes the C library's exponential, as the kernel does."""
    if not exact:
        return (1.0 / (1.0 + np.exp(-z.astype(np.float64)))).astype(np.float32)
    return np.fromiter(map(_sigmoid_of, z.tolist()), np.float32, len(z))


def _sigmoid_of(z: float) -> float:
    return 0.0 if z < -_EXP_OVERFLOWS else 1.0 / (1.0 + math.exp(-z))
