"""Another prior under a posterior that stays: what a user's Gaussians become where the shared prior has moved.

Plain numpy, so that a reader without compiled code exchanges as the stream does, to the bit (``state.reading``).

Symbols: n rows, d and e widths of the filters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.filters import Float
from learner.user_state import RowLayout, Slab

WIDEST = 10.0
"""Times the variance of the new prior's widest direction, beyond which a posterior is no knowledge but a difference of
nearly equal numbers, and its mean goes anywhere"""


class Prior(NamedTuple):
    """Where a version's users start: (n, d) or (n, e) means, and one packed covariance."""

    mean: Float
    covariance: Float


def exchange_prior(layout: RowLayout, slab: Slab, old: Sequence[Prior], new: Sequence[Prior], version: int) -> None:
    """Takes the old prior out of each Gaussian and puts the new one in, in place: (n, row_bytes).

    In natural parameters: Λ' = Λ − Λ_old + Λ_new, and η likewise; where that is no covariance, or one beyond WIDEST
    (the drift has made the posterior wider than its prior), for a damaged row, and for the gradient head, the mean
    moves with the prior and the rest stays.
    ``old`` and ``new``: of the first filter, and of the second where there is one.
    """
    rows = layout.rows(slab)
    names = (("mean", "covariance"), ("second_mean", "second_covariance"))
    for (mean, covariance), before, after in zip(names, old, new, strict=False):
        if not before.covariance.size:
            rows[mean] += after.mean - before.mean
            continue
        m, S = _exchanged(rows[mean], rows[covariance], before, after)
        rows[mean], rows[covariance] = m, S
    rows["meta_version"] = version


def _exchanged(mean: Float, covariance: Float, old: Prior, new: Prior) -> tuple[Float, Float]:
    dim = mean.shape[1]
    diagonal = covariance.shape[1] == dim and dim > 1
    S, before, after = (_matrices(a, dim, diagonal) for a in (covariance, old.covariance[None], new.covariance[None]))
    sound = np.isfinite(S).all((1, 2)) & np.isfinite(mean).all(1)
    sound &= _least(_or_one(S, sound)) > 0
    kept = np.where(sound[:, None], mean, 0)
    precision, out, into = np.linalg.inv(_or_one(S, sound)), np.linalg.inv(before), np.linalg.inv(after)
    eta = _times(precision, kept) - _times(out, old.mean) + _times(into, new.mean)
    wanted = precision - out + into
    sound &= _least(wanted) > _least(into) / WIDEST
    result = np.linalg.inv(_or_one(wanted, sound))
    m = np.where(sound[:, None], _times(result, eta), mean + new.mean - old.mean)
    lower = np.arange(dim), np.arange(dim)
    if not diagonal:
        lower = np.tril_indices(dim)
    packed = np.where(sound[:, None], result[:, lower[0], lower[1]], covariance)
    return m.astype(np.float32), packed.astype(np.float32)


def _matrices(packed: Float, dim: int, diagonal: bool) -> NDArray[Any]:
    """(n, d, d) of packed lower triangles, or of diagonals."""
    full = np.zeros((len(packed), dim, dim))
    if diagonal:
        full[:, np.arange(dim), np.arange(dim)] = packed
        return full
    rows, columns = np.tril_indices(dim)
    full[:, rows, columns] = packed
    full[:, columns, rows] = packed
    return full


def _or_one(matrix: NDArray[Any], sound: NDArray[np.bool_]) -> NDArray[Any]:
    """(n, d, d) the identity in place of those that are not sound."""
    return np.where(sound[:, None, None], matrix, np.eye(matrix.shape[1]))


def _least(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """(n,) smallest eigenvalues."""
    values: NDArray[np.float64] = np.linalg.eigvalsh(matrix)[:, 0]
    return values


def _times(matrix: NDArray[Any], vector: NDArray[Any]) -> NDArray[np.float64]:
    product: NDArray[np.float64] = np.einsum("nij,nj->ni", np.broadcast_to(matrix, (len(vector), *matrix.shape[1:])),
                                             vector.astype(np.float64))  # fmt: skip
    return product
