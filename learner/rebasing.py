"""How users' rows come onto another version of the shared parameters.

A row stands on the version it was adapted under: its mean and covariance mean nothing to another one's items. What it
has learned is learned again from the user's events (``relearn``), all of them where they are kept, else the latest;
or its prior alone is exchanged (``learner.prior_exchange``), where the items hardly moved. Header, ledger and ring are
the events' and stay.

Symbols: n rows, d and e widths of the filters, B = n histories.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.adaptation import Adaptation, EventColumns
from learner.features import SparseRows
from learner.filters import Float
from learner.histories import Histories, spans, starts_of
from learner.serving import ServingModel
from learner.user_state import HEADER_BYTES, NO_GRADE, RowLayout, Slab, new_rows


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
