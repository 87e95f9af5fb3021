"""Which versions of the shared parameters serve a partition's users, and how a user's row comes onto one.

A row moves at its user's next event, never all at once: it is learned anew from the user's history where that is
kept, else from the events in its ring (``learner.rebasing``), or its prior is exchanged (``learner.prior_exchange``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.adaptation import Adaptation
from learner.features import SparseRows
from learner.prior_exchange import Prior, exchange_prior
from learner.rebasing import latest_events, put_adaptive, relearn
from learner.serving import ServingModel
from learner.user_hash import CANARY, drawn, user_crcs
from learner.user_state import RowLayout, Slab
from state.histories import HistoryBook

Rebase = Literal["history", "ring", "closed"]
Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Serving:
    """From here on, until others are named."""

    model: ServingModel
    canary: ServingModel | None = None
    canary_share: float = 0.0
    """Of the users, by a hash of their id, whom the canary serves"""
    earlier: tuple[ServingModel, ...] = ()
    """Whom rows may still stand on, where priors are exchanged"""

    def groups(self, users: Sequence[bytes]) -> Iterator[tuple[ServingModel, Places]]:
        """(version, places of its users among ``users``), without the empty ones."""
        if self.canary is None or not len(users):
            yield self.model, np.arange(len(users))
            return
        canary = drawn(user_crcs(users), CANARY, self.canary_share)
        for model, chosen in ((self.model, ~canary), (self.canary, canary)):
            if chosen.any():
                yield model, np.flatnonzero(chosen)

    def models(self) -> tuple[ServingModel, ...]:
        """All that serve."""
        return (self.model,) if self.canary is None else (self.model, self.canary)


def share_items(models: Iterable[ServingModel]) -> None:
    """All of them get to know the items that one of them has met, as it met them.

    A version that was made before an item came would else take it for an unknown one in a user's history, until the
    item comes again: where a row moves would then hang on how the stream is cut.
    """
    known = list(models)
    for model in known:
        for other in known:
            if other is not model and (met := other.met_items):
                columns = {
                    field.name: tuple(None if raw is None else raw[k] for raw in met.values())
                    for k, field in enumerate(other.fixed.item_encoder.fields)
                }
                model.item_rows(tuple(met), columns)


class Moved(NamedTuple):
    """Rows on another version, and how many of them took which way."""

    slab: Slab
    ways: Counter[Rebase]


class Mover:
    """Brings rows onto a version."""

    def __init__(self, layout: RowLayout, rebase: Rebase) -> None:
        self._layout = layout
        self._rebase = rebase

    def move(
        self,
        slab: Slab,
        users: Sequence[bytes],
        model: ServingModel,
        adaptation: Adaptation,
        features: Callable[[Places], SparseRows],
        book: HistoryBook | None,
        earlier: Sequence[ServingModel],
    ) -> Moved:
        """The rows of n users, on ``model``; ``slab`` (n, row_bytes) is changed in place and returned.

        ``features(places)``: encoded features of some of the n, for those whose history does not have them.
        """
        left, ways = np.arange(len(users)), Counter[Rebase]()
        if self._rebase == "history" and book is not None:
            left = self._by_history(slab, users, model, adaptation, book)
            ways["history"] = len(users) - len(left)
        if self._rebase == "closed":
            left = self._by_exchange(slab, left, model, features, {other.meta_version: other for other in earlier})
            ways["closed"] = len(users) - len(left)
        if len(left):
            events = latest_events(self._layout, slab[left])
            learned = relearn(adaptation, model, events, model.means_of(features(left)))
            put_adaptive(self._layout, slab, left, learned.slab, model.meta_version)
            ways["ring"] = len(left)
        return Moved(slab, ways)

    def _by_history(
        self, slab: Slab, users: Sequence[bytes], model: ServingModel, adaptation: Adaptation, book: HistoryBook
    ) -> Places:
        """Those who have no history are left."""
        histories = book.read(users, self._layout.rows(slab)["events"].astype(np.int64))[0]
        kept = histories.lengths > 0
        places = np.flatnonzero(kept)
        if len(places):
            known = histories.take(places)
            learned = relearn(adaptation, model, known, model.means_of(known.features))
            put_adaptive(self._layout, slab, places, learned.slab, model.meta_version)
        return np.flatnonzero(~kept)

    def _by_exchange(
        self,
        slab: Slab,
        left: Places,
        model: ServingModel,
        features: Callable[[Places], SparseRows],
        earlier: dict[int, ServingModel],
    ) -> Places:
        """Those are left who stand on a version that is not at hand."""
        stands = self._layout.rows(slab)["meta_version"][left]
        done = np.zeros(len(left), np.bool_)
        for version in np.unique(stands).tolist():
            if (old := earlier.get(version)) is None:
                continue
            places = left[stands == version]
            rows, given = slab[places], features(places)
            exchange_prior(self._layout, rows, _priors(old, given), _priors(model, given), model.meta_version)
            slab[places] = rows
            done |= stands == version
        return left[~done]


def _priors(model: ServingModel, features: SparseRows) -> list[Prior]:
    priors = [Prior(model.means_of(features), model.first.covariance)]
    if model.second is not None:
        second = np.tile(model.second.initialization, (len(features), 1))
        priors.append(Prior(second, model.second.covariance))
    return priors
