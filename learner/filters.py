"""What a user's filters and the items are to the stream: plain arrays. Here so that a reader needs no compiled code.

Symbols: I items, d width of the first filter, e width of the second (0 when off), G grades, P packed covariance
entries d(d+1)/2 (row-major lower triangle: (0,0) (1,0) (1,1) (2,0) …).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from learner.user_state import HeadKind

Float = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class FirstFilter:
    """Meta-learned constants of a user's first filter.

    full and diagonal (extended Kalman filter, logistic observation):
        v = ψ'Sψ; z = (b + m·ψ) / sqrt(1 + kappa·v); p = σ(z); w = r·p(1−p); k = 1/(1 + w·v)
        m += Sψ·r·(y−p)·k; S −= w·k·(Sψ)(Sψ)'; diag(S) += drift
    gradient:
        z = b + m·ψ; m_j += rate_j·r·ψ_j·(y−p)·(1 + n/tau)^−alpha, n the user's events so far
    """

    kind: HeadKind
    initialization: Float
    """φ_0: (d,)"""
    covariance: Float
    """S_0: (P,) packed when full, (d,) when diagonal, (0,) when gradient"""
    kappa: float
    """Already multiplied by π/8 (0.3927)."""
    drift: Float
    """q: (d,), zeros for gradient"""
    rate: Float
    """(d,) step sizes of the gradient head, zeros otherwise"""
    tau: float
    alpha: float
    target: Float
    """(G + 1,) the y of an event by grade; entry G is unused (an event without a grade uses its label)"""
    weight: Float
    """(G + 1,) the r of an event by grade; entry G is for an event without a grade"""

    @property
    def dim(self) -> int:
        """d"""
        return len(self.initialization)


@dataclass(frozen=True, slots=True)
class SecondFilter:
    """A full-covariance filter over ψ2 = [1, z/2, second_psi_i], base 0, whose prediction is the final one."""

    initialization: Float
    """(e,)"""
    covariance: Float
    """(e(e+1)/2,) packed"""
    kappa: float
    drift: Float
    weight: float
    """r; the target is always the label"""

    @property
    def dim(self) -> int:
        """e"""
        return len(self.initialization)


@dataclass(frozen=True, slots=True)
class ItemTable:
    """All that prediction needs of an item; row of an unknown item without features: ψ of the zero embedding."""

    psi: Float
    """(I, d), first column 1"""
    base: Float
    """(I,)"""
    second_psi: Float
    """(I, e − 2), or (I, 0)"""

    def grown(self, capacity: int) -> ItemTable:
        """A copy with room for ``capacity`` rows; rows past the old ones are zero."""
        return ItemTable(*(_grown(a, capacity) for a in (self.psi, self.base, self.second_psi)))


def _grown(array: Float, capacity: int) -> Float:
    larger = np.zeros((capacity, *array.shape[1:]), np.float32)
    larger[: len(array)] = array
    return larger
