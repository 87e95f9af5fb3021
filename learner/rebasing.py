"""How users' rows come onto another version of the shared parameters.

A row stands on the version it was adapted under: its mean and covariance mean nothing to another one's items. What it
has learned is learned again from the user's events (``relearn``), all of them where they are kept, else the latest;
or the prior alone is exchanged (``exchange_prior``), where the items hardly moved. Header, ledger and ring are the
events' and stay.

Symbols: n rows, d and e widths of the filters, B = n histories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.adaptation import Adaptation, EventColumns
from learner.features import SparseRows
from learner.filters import Float
from learner.histories import Histories, spans, starts_of
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, NO_GRADE, RowLayout, Slab, new_rows

WIDEST = 10.0
"""Times the variance of the new prior's widest direction, beyond which a posterior is no knowledge but a difference of
nearly equal numbers, and its mean goes anywhere"""


class Learned(NamedTuple):
    """What walking histories under a version gave."""

    slab: Slab
    """(B, row_bytes) only the adaptive parts mean something"""
    logit: Float
    """(T,) of every event, before its label was used"""


def relearn(adaptation: Adaptation, model: ServingModel, histories: Histories, means: Float) -> Learned:
    """Walks the histories from the version's start: ``means`` is (B, d), as ``model.means_of`` gives."""
    layout = adaptation.layout
    slab = new_rows(layout, model.first, model.second, means, model.meta_version)
    layout.rows(slab)["events"] = histories.first  # the gradient head's steps shrink with it
    walked = adaptation.learn(slab, event_columns(model, histories), model.items)
    return Learned(slab, walked.logit)


def event_columns(model: ServingModel, histories: Histories) -> EventColumns:
    """The histories as the kernel takes them: slot k is user k, offsets rise from 0."""
    items, item = np.unique(histories.item, return_inverse=True)
    grades = len(model.first.target) - 1
    nothing = np.zeros(histories.events, np.int64)
    return EventColumns(
        np.repeat(np.arange(len(histories)), histories.lengths).astype(np.int32), item.astype(np.int32),
        histories.label, np.minimum(histories.grade, grades).astype(np.int32), nothing,
        np.arange(histories.events), model.rows_of(items), items << np.uint64(24),
    )  # fmt: skip


def put_adaptive(layout: RowLayout, slab: Slab, places: NDArray[np.int64], learned: Slab, version: int) -> None:
    """Gives rows of ``slab`` the adaptive parts of ``learned``, in order, and the version they stand on."""
    end = layout.row_bytes - 8 * layout.ring
    slab[places, HEADER_BYTES:end] = learned[:, HEADER_BYTES:end]
    layout.rows(slab)["meta_version"][places] = version


def latest_events(layout: RowLayout, slab: Slab) -> Histories:
    """What the rings of n rows hold, oldest first, without features."""
    rows = layout.rows(slab)
    events = rows["events"].astype(np.int64)
    kept = np.minimum(events, layout.ring)
    starts, number = spans(events - kept, events)
    user = np.repeat(np.arange(len(events)), kept)
    entries = rows["ring"][user, number % max(layout.ring, 1)] if len(number) else np.zeros(0, np.uint64)
    return Histories(
        starts, entries >> np.uint64(24), (entries >> np.uint64(23) & np.uint64(1)).astype(np.int8),
        (entries >> np.uint64(17) & np.uint64(NO_GRADE)).astype(np.int32), events - kept,
        SparseRows(starts_of(np.zeros(len(events), np.int64)), np.zeros(0, np.int64), np.zeros(0, np.float32)),
    )  # fmt: skip


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
