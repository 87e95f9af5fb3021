"""What a line is beside its parameters, as records of ``meta-versions``: versions with decisions, ladder, best, matrix.

Each round tells only what it changed; ``recalled`` puts together what all of them left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from learner.forgetting import Column, ForgettingMatrix, Scores
from learner.gate import Best, Ladder
from learner.meta_model import MetaModel
from learner.meta_update import StepReport
from state import changelog
from state.lineage import Decision, LineageError, Record, serving_sha256
from state.lineage.history import Version
from state.lineage.record import Decided, Entry, plain
from streams.meta.chronicle import Chronicle
from streams.meta.line import LineState, OpenVersion
from streams.meta.messages.packing import MessageRefused, pack, unpack
from streams.meta.published import (
    BEST,
    LINE,
    MATRIX,
    SCORES,
    SERVED,
    VERSION,
    Contents,
    Shelf,
    block_of,
    opened,
    sealed,
    version_key,
)
from streams.meta.replica import Replica


class Recorder(Chronicle):
    """A chronicle that hashes what each version serves, and knows which versions it was told of since it was asked."""

    def __init__(self, model: MetaModel, now_ms: Callable[[], int]) -> None:
        super().__init__(None, 1, now_ms)
        self._model = model
        self._told: dict[int, None] = {}
        self._order: dict[int, list[int]] = {}
        """Of each version's decisions: their places among all"""
        self._decisions = 0

    def add(self, record: Record, tensors: Callable[[], Mapping[str, NDArray[Any]]], item_ids: Sequence[str]) -> None:
        """As ``Chronicle.add``. Version 0 of a line that goes on was told before."""
        if record.version == 0 and self.next_version > 0:
            return
        self._note(record.version)
        sha256 = serving_sha256(self._model.serving_tensors(len(item_ids)), item_ids)
        super().add(_plain(replace(record, serving_sha256=sha256)), tensors, item_ids)

    def restored(self, record: Record) -> None:
        """A version whose hash is known, since it serves what an earlier one did."""
        self._note(record.version)
        super().add(_plain(record), dict, ())

    def decide(self, number: int, decision: Decision) -> None:
        """As ``Chronicle.decide``."""
        self._note(number)
        super().decide(number, replace(decision, evidence=plain(decision.evidence)))

    def undone_by_return_to(self, number: int) -> tuple[int, ...]:
        """See ``History.undone_by_return_to``."""
        return self._history.undone_by_return_to(number)

    def take_told(self) -> list[Version]:
        """Versions made or decided on since the last call."""
        told, self._told = self._told, {}
        return [self._history.version(number) for number in told]

    def records(self, versions: Sequence[Version]) -> list[changelog.Record]:
        """v/ of these."""
        return [
            changelog.Record(
                version_key(VERSION, v.number),
                sealed({
                    "record": msgspec.to_builtins(v.record), "decisions": msgspec.to_builtins(v.decisions),
                    "order": self._order[v.number],
                }),
            )
            for v in versions
        ]  # fmt: skip

    def recall(self, contents: Contents) -> None:
        """All v/ of a line that goes on, told in the order in which they were. Raises MessageRefused."""
        entries: list[tuple[int, Entry]] = []
        for key in sorted(key for key in contents if key.startswith(VERSION)):
            record, decisions, order = _version(
                contents[key] or b"", f"{key.decode(errors='replace')} of meta-versions"
            )
            self._order[record.version] = order
            said: list[Entry] = [record, *(Decided(record.version, decision) for decision in decisions[1:])]
            entries += zip(order, said, strict=True)
        try:
            for _, entry in sorted(entries, key=lambda each: each[0]):
                self._history.tell(entry)
        except LineageError as error:
            raise MessageRefused("incomplete", f"the versions of meta-versions do not add up: {error}") from None
        self._decisions = len(entries)

    def _note(self, number: int) -> None:
        self._told[number] = None
        self._order.setdefault(number, []).append(self._decisions)
        self._decisions += 1


def _version(value: bytes, what: str) -> tuple[Record, tuple[Decision, ...], list[int]]:
    content = opened(value, what)
    try:
        record = msgspec.convert(content["record"], Record)
        decisions = msgspec.convert(content["decisions"], tuple[Decision, ...])
        order = msgspec.convert(content["order"], list[int])
    except (msgspec.ValidationError, KeyError, TypeError) as error:
        raise MessageRefused("shape", f"{what} holds no version: {error}") from None
    if not len(decisions) == len(order) > 0:
        raise MessageRefused("shape", f"{what} has {len(decisions)} decisions in {len(order)} places")
    return record, decisions, order


# --- the line's state -----------------------------------------------------------------------------------------


def state_records(before: LineState, after: LineState, own: Mapping[str, Any], shelf: Shelf) -> list[changelog.Record]:
    """What has changed from one state to the next; ``own``: the aggregator's, JSON."""
    line = {"ladder": after.ladder.as_dict(), "blind": after.blind, "refused": dict(after.refused), **own}
    records = [changelog.Record(LINE, sealed(line))]
    if after.best is not before.best:
        records += shelf.put(BEST, _pack_scores(after.best.reference))
    if after.served is not before.served:
        records += shelf.put(SERVED, _pack_scores(after.served))
    held = {o.number: o.scores for o in before.open}
    for o in after.open:
        if o.scores is not None and o.scores is not held.pop(o.number, None):
            records += shelf.put(version_key(SCORES, o.number), _pack_scores(o.scores))
    for number in {o.number for o in before.open} - {o.number for o in after.open}:
        records += shelf.remove(version_key(SCORES, number))
    for row in range(len(before.matrix.versions), len(after.matrix.versions)):
        records.append(changelog.Record(version_key(MATRIX, row), _pack_row(after.matrix, row)))
    return records


def recalled(contents: Contents, replica: Replica, versions: Sequence[Version]) -> tuple[LineState, dict[str, Any]]:
    """(the state that ``state_records`` told, what the aggregator told of its own). Raises MessageRefused."""
    marker = replica.marker
    assert marker is not None, "there is nothing to recall before the first marker"
    line = opened(contents.get(LINE) or b"", "s/line of meta-versions")
    metrics = {v.number: v.record.metrics for v in versions}
    open_versions = []
    for o in replica.opened:
        number = o.mark.version
        told = metrics.get(number, {})
        step = StepReport(o.undo, float(told.get("step_length", 0.0)), float(told.get("gradient_norm", 0.0)))
        scores = _scores(contents, version_key(SCORES, number))
        open_versions.append(OpenVersion(number, o.model, step, o.mark.stage, scores))
    try:
        ladder, blind, refused = Ladder.from_dict(line.pop("ladder")), bool(line.pop("blind")), line.pop("refused")
    except (KeyError, TypeError, ValueError) as error:
        raise MessageRefused("shape", f"s/line of meta-versions is no line's: {error!r}") from None
    nothing = Scores(0, ())
    state = LineState(
        marker.round, replica.current, (), tuple(open_versions), ladder, Best(_scores(contents, BEST) or nothing),
        _scores(contents, SERVED) or nothing, blind, _matrix(contents), refused,
    )  # fmt: skip
    return state, line


def _pack_scores(scores: Scores) -> bytes:
    arrays = scores.as_arrays()
    return pack("scores", {}, arrays, set(arrays))


def _scores(contents: Contents, name: bytes) -> Scores | None:
    what = f"{name.decode()} of meta-versions"
    block = block_of(contents, name, what)
    if block is None:
        return None
    try:
        return Scores.from_arrays(unpack(block, "scores", what).arrays)
    except (ValueError, KeyError, TypeError) as error:
        raise MessageRefused("shape", f"{what} holds no scores: {error}") from None


def _pack_row(matrix: ForgettingMatrix, row: int) -> bytes:
    content = {"version": matrix.versions[row], "columns": [list(column) for column in matrix.columns]}
    return pack("matrix row", content, {"values": matrix.values[row], "base": matrix.base}, {"values", "base"})


def _matrix(contents: Contents) -> ForgettingMatrix:
    keys = sorted(key for key in contents if key.startswith(MATRIX))
    if not keys:
        return ForgettingMatrix()
    rows = [unpack(contents[key] or b"", "matrix row", key.decode()) for key in keys]
    try:
        columns = tuple(Column(*column) for column in rows[-1].content["columns"])
        values = np.full((len(rows), len(columns), 2, 2), np.nan)
        for k, row in enumerate(rows):
            values[k, : len(row.arrays["values"])] = row.arrays["values"]
        versions = tuple(int(row.content["version"]) for row in rows)
        return ForgettingMatrix(versions, columns, values, rows[-1].arrays["base"].copy())
    except (ValueError, KeyError, TypeError) as error:
        raise MessageRefused("shape", f"the forgetting matrix of meta-versions cannot be used: {error!r}") from None


def _plain(record: Record) -> Record:
    """With JSON values alone, so that what is recalled is what was told."""
    decision = replace(record.decision, evidence=plain(record.decision.evidence))
    return replace(record, decision=decision, settings=plain(record.settings), metrics=plain(record.metrics))
