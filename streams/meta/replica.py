"""A copy of the versions, kept by following ``meta-versions``. Pure: records in, models out.

Whatever the last marker was, the next one is reached in the same way: open versions are taken back, the promoted
version's table takes in what was promoted, and the deltas of those that are open now are put on it again. So a log that
was compacted, a tail, a promotion, a rejection and a rollback are one case; and what a version serves is hashed before
anybody is served by it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from learner.histories import take_rows
from learner.meta_model import Excerpt, MetaModel, Parts, Undo
from learner.meta_update import take_back
from learner.serving import ServingModel
from state.changelog import Record
from state.lineage import serving_sha256
from state.lineage.record import Kind
from streams.meta.contributor import Task
from streams.meta.line import EARLIER
from streams.meta.messages.packing import MessageRefused
from streams.meta.published import (
    DELTA,
    MARKER,
    PARAMETERS,
    ROW,
    Contents,
    Mark,
    Marker,
    RowForm,
    block_of,
    extend,
    moving,
    settled,
    unpack_excerpt,
    version_key,
)
from streams.versions import Serving


@dataclass(frozen=True, slots=True)
class Opened:
    """An open version, as it was put on its parent."""

    mark: Mark
    delta: Excerpt
    undo: Undo
    model: ServingModel


class Replica:
    """The versions up to the last marker that was read; version 0 before any.

    After MessageRefused whoever served goes on to serve, and nothing more is followed: a new replica reads the log from
    its start. ``model`` is not to be changed by others: gradients are taken with no new items, which the contribution
    names instead.
    """

    def __init__(self, model: MetaModel, initial: ServingModel, key: bytes | None = None) -> None:
        """``initial``: version 0, the trained model, whose parameters ``model`` has. ``key``: verifies markers."""
        self.model = model
        self.marker: Marker | None = None
        self._key = key
        self._current = initial
        self._earlier: list[ServingModel] = []
        self._open: list[Opened] = []
        self._unsettled: dict[bytes, bytes | None] = {}
        self._broken = False

    # --- what it knows ----------------------------------------------------------------------------------------

    @property
    def current(self) -> ServingModel:
        """The version that serves everybody but canary users."""
        return self._current

    @property
    def serving(self) -> Serving:
        """Who serves from here on."""
        canary = next((o.model for o in self._open if o.mark.stage == "canary"), None)
        share = self.marker.canary_share if canary is not None and self.marker is not None else 0.0
        return Serving(self._current, canary, share, tuple(self._earlier))

    @property
    def opened(self) -> tuple[Opened, ...]:
        """Versions that are still to be decided on, the oldest first."""
        return tuple(self._open)

    @property
    def open_versions(self) -> tuple[tuple[Kind, ServingModel], ...]:
        """(stage, version) of those, as ``MetaLine`` says it."""
        return tuple((o.mark.stage, o.model) for o in self._open)

    @property
    def head(self) -> int:
        """The version that ``model`` is: where the next gradient is taken."""
        return self._open[-1].mark.version if self._open else self._current.meta_version

    @property
    def task(self) -> Task | None:
        """What the next gradient is to be; None: none is asked for."""
        return None if self.marker is None else self.marker.task

    @property
    def consumed(self) -> Mapping[int, int]:
        """Partition -> the last offset that a round has consumed."""
        return {} if self.marker is None else self.marker.consumed

    # --- what it reads ----------------------------------------------------------------------------------------

    def read(self, records: Iterable[Record]) -> None:
        """The log, compacted or not, from its start to its end: only its last marker is reached. MessageRefused."""
        contents, self._unsettled = settled(records)
        self.load(contents)

    def load(self, contents: Contents) -> None:
        """The same of ``published.settled`` contents."""
        if (value := contents.get(MARKER)) is not None:
            self._reach(contents, value)

    def follow(self, records: Iterable[Record]) -> list[Marker]:
        """What comes next in the log; the markers reached. A transaction counts at its marker. MessageRefused."""
        reached = []
        for key, value in records:
            self._unsettled[key] = value
            if key == MARKER and value is not None:
                contents, self._unsettled = self._unsettled, {}
                reached.append(self._reach(contents, value))
        return reached

    def _reach(self, contents: Contents, value: bytes) -> Marker:
        if self._broken:
            raise MessageRefused("broken", "a transaction of meta-versions was refused: read the log from its start")
        marker = Marker.decode(value, self._key)
        self._fits(marker)
        self._broken = True
        form = RowForm(self.model, moving(self.model, marker.moves)[0])
        known = {each.mark.version: each for each in self._open}
        for each in reversed(self._open):
            take_back(self.model, each.undo)
        extend(self.model, contents)
        if len(self.model.item_ids) != marker.vocabulary:
            raise MessageRefused(
                "incomplete",
                f"the vocabulary has {len(self.model.item_ids)} items, and {marker.vocabulary} are promised",
            )
        self._promote(contents, form)
        current = self._served(marker.current, known)
        self._open = [self._put(mark, contents, known, current, marker.head) for mark in marker.open]
        if current is not self._current and self.marker is not None:
            self._earlier = [*self._earlier, self._current][-EARLIER:]
        self._current, self.marker, self._broken = current, marker, False
        return marker

    def _fits(self, marker: Marker) -> None:
        if marker.model != self._current.fingerprint:
            raise MessageRefused(
                "model", f"meta-versions is of the model {marker.model[:12]!a}, and {self._current.fingerprint[:12]!a} "
                "serves here: a newly trained model takes a topic of its own"
            )  # fmt: skip
        if self.marker is not None and marker.sequence <= self.marker.sequence:
            raise MessageRefused(
                "order", f"marker {marker.sequence} of meta-versions follows {self.marker.sequence}: read it anew"
            )

    def _promote(self, contents: Contents, form: RowForm) -> None:
        """Takes what was promoted into the table."""
        rows = {key: value for key, value in contents.items() if key.startswith(ROW) and value is not None}
        block = block_of(contents, PARAMETERS, "the promoted parameters")
        parameters = None if block is None else unpack_excerpt(block, "the promoted parameters")
        if rows:
            steps = self.model.steps if parameters is None else parameters.steps
            names = [key.removeprefix(ROW).decode(errors="replace") for key in rows]
            self._write(form.unpack(list(rows.values()), self.model.rows_named(names), steps))
        if parameters is not None:
            self._write(parameters)

    def _write(self, excerpt: Excerpt) -> Undo:
        try:
            return self.model.put(excerpt)
        except ValueError as error:
            raise MessageRefused("shape", f"parameters of meta-versions cannot be used: {error}") from None

    def _served(self, mark: Mark, known: Mapping[int, Opened]) -> ServingModel:
        """The version whose parameters the model has now."""
        if mark.version == self._current.meta_version and self.marker is not None:
            return self._current
        self._verify(mark)
        if mark.version == self._current.meta_version:
            return self._current
        if mark.version in known:
            return known[mark.version].model
        return self._current.successor(*self._parts(mark.items), mark.version)

    def _put(
        self, mark: Mark, contents: Contents, known: Mapping[int, Opened], current: ServingModel, head: Mark
    ) -> Opened:
        """Puts an open version's delta on its parent."""
        held = known.get(mark.version)
        if held is not None:
            opened = replace(held, mark=mark, undo=self._write(held.delta))
        else:
            name, what = version_key(DELTA, mark.version), f"the delta of version {mark.version}"
            block = block_of(contents, name, what)
            if block is None:
                raise MessageRefused("incomplete", f"{what} is missing in meta-versions")
            delta = unpack_excerpt(block, what)
            undo = self._write(delta)
            self._verify(mark)
            return Opened(mark, delta, undo, current.successor(*self._parts(mark.items), mark.version))
        if mark is head:
            self._verify(mark)
        return opened

    def _verify(self, mark: Mark) -> None:
        if mark.items > len(self.model.item_ids):
            raise MessageRefused("shape", f"version {mark.version} has more items than the vocabulary")
        found = serving_sha256(self.model.serving_tensors(mark.items), self.model.item_ids[: mark.items])
        if found != mark.sha256:
            raise MessageRefused(
                "hash", f"version {mark.version} is refused: what was read of it serves {found[:12]}, and its marker "
                f"says {mark.sha256[:12]}; read meta-versions from its start"
            )  # fmt: skip

    def _parts(self, items: int) -> Parts:
        return parts_of(self.model, items)


def parts_of(model: MetaModel, items: int) -> Parts:
    """What ``ServingModel`` is made of, with the first ``items`` of the vocabulary."""
    fixed, first, second = model.parts()
    if items < len(fixed.item_ids):
        fixed = replace(
            fixed, item_ids=fixed.item_ids[:items], item_embedding=fixed.item_embedding[:items],
            item_bias=fixed.item_bias[:items], item_features=take_rows(fixed.item_features, np.arange(items)),
        )  # fmt: skip
    return fixed, first, second
