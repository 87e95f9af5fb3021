"""The one that makes versions of the partitions' contributions. Pure: records in, records out.

    receive     a record of ``meta-gradients``; a contribution that is whole and fits waits for the round
    due         enough events wait, or one contribution has waited long enough: who lags holds nobody up
    round       judges, steps, and says what to publish, as one transaction with the position in ``meta-gradients``

What a round has done counts once its transaction is committed. If that fails for good, or the aggregator dies, the next
one is made by ``recover`` from what ``meta-versions`` holds: the round never was, its contributions are read again, for
the position was not committed either; or it was, and they are late. A span starts where the last one that was consumed
ended, so no event counts twice, and none is left out.

A partition contributes findings and a gradient at once, both of the marker before. Where its findings have the head
rejected, the gradients were taken at a version that is no more: the round makes no candidate, and its events come back
only as histories do. A partition that is silent in a round is not measured in it: cohorts that nobody scored do not
judge, and their best is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.settings import MetaSettings
from learner.drift import DriftAlarm
from learner.forgetting import Scores
from learner.gate import Best
from learner.meta_model import Excerpt, MetaModel
from learner.meta_update import GradientRefused, GradientSum, check, take_back
from learner.serving import ServingModel
from state.changelog import Record
from state.lineage import Decision, Parameters, WrongStep, serving_sha256
from state.lineage.history import Version
from state.lineage.record import SERVING
from streams.alarms import Kind as AlarmKind
from streams.meta.contributor import Task, moves_of
from streams.meta.line import EARLIER, Alarm, LineState, MetaLine
from streams.meta.messages import Assembler, Contribution, MessageRefused, decode
from streams.meta.messages.merging import Merged, filled, merged, widened
from streams.meta.published import (
    DELTA,
    MARKER,
    Mark,
    Marker,
    RowForm,
    Shelf,
    moving,
    pack_excerpt,
    pack_vocabulary,
    promoted,
    settled,
    version_key,
)
from streams.meta.recorder import Recorder, recalled, state_records
from streams.meta.replica import Replica, parts_of

FORMAT = 1
"""Of the JSON in ``monitoring``"""


@dataclass(frozen=True, slots=True)
class Round:
    """What is to be published as one transaction, all of it or nothing."""

    versions: tuple[Record, ...]
    """For ``meta-versions``, in order; the marker comes last"""
    monitoring: tuple[Record, ...]
    """For ``monitoring``"""
    position: int | None
    """Where ``meta-gradients`` is to be read from next; None: nothing of it was read"""


@dataclass(frozen=True, slots=True)
class _Waiting:
    contribution: Contribution
    since_s: float


class Aggregator:
    """Made by ``recover``."""

    def __init__(
        self,
        line: MetaLine,
        recorder: Recorder,
        settings: MetaSettings,
        *,
        alarm: Alarm,
        round_timeout_s: float,
        seed: int,
        key: bytes | None = None,
    ) -> None:
        self.line = line
        self.events = 0
        """Of the stream, in all spans consumed"""
        self.consumed: dict[int, int] = {}
        """Partition -> last offset"""
        self._recorder = recorder
        self._settings = settings
        self._moves = moves_of(settings)
        self._alarm = alarm
        self._round_timeout_s = round_timeout_s
        self._seed = seed
        self._key = key
        self._tables, self._others = moving(line.model, self._moves)
        self._form = RowForm(line.model, self._tables)
        self._shelf = Shelf()
        self._assembler = Assembler(self._refuse)
        self._waiting: dict[int, _Waiting] = {}
        self._deltas: dict[int, Excerpt] = {}
        """Of open versions"""
        self._marks: dict[int, Mark] = {}
        """Of versions that serve or are open"""
        self._cohorts: dict[str, list[str]] = {}
        """Partition -> names of the cohorts it has anchors of"""
        self._task: Task | None = None
        self._refused: dict[str, int] = {}
        """As the last round told them"""
        self._sequence = -1
        """Of the last marker"""
        self._position: int | None = None

    @staticmethod
    def recover(
        model: MetaModel,
        initial: ServingModel,
        settings: MetaSettings,
        records: Iterable[Record],
        *,
        seed: int,
        alarm: Alarm,
        round_timeout_s: float,
        now_ms: Callable[[], int],
        key: bytes | None = None,
    ) -> Aggregator:
        """As the last marker in ``records``, all of ``meta-versions``, left it; from version 0 where there is none.

        ``model``: fresh, of the trained model, which ``initial`` serves; it is the aggregator's from here on. Raises
        MessageRefused where the log is damaged, of another model or not signed.
        """
        contents, _ = settled(records)
        replica = Replica(model, initial, key)
        replica.load(contents)
        recorder = Recorder(model, now_ms)
        recorder.recall(contents)
        line = MetaLine(model, initial, settings, recorder, seed=seed, alarm=alarm)
        made = Aggregator(
            line, recorder, settings, alarm=alarm, round_timeout_s=round_timeout_s, seed=seed, key=key
        )  # fmt: skip
        if replica.marker is not None:
            state, own = recalled(contents, replica, recorder.versions)
            line.restore(state)
            made._go_on(replica, replica.marker, own, Shelf(contents))
        else:
            first = recorder.versions[0].record
            made._marks[0] = Mark(0, "initial", first.serving_sha256, len(model.item_ids))
        return made

    def _go_on(self, replica: Replica, marker: Marker, own: Mapping[str, Any], shelf: Shelf) -> None:
        if marker.moves != self._moves:
            raise MessageRefused(
                "moves", f"meta-versions is of a line that moves {marker.moves!a}, and meta.moves is {self._moves!a}: "
                "set it back, or take another topic"
            )  # fmt: skip
        self.events, self.consumed, self._task = marker.events, dict(marker.consumed), marker.task
        self._sequence, self._shelf, self._cohorts = marker.sequence, shelf, dict(own.get("cohorts", {}))
        self._refused = dict(self.line.refused)
        self._deltas = {o.mark.version: o.delta for o in replica.opened}
        self._marks = {mark.version: mark for mark in (marker.current, *marker.open)}

    # --- what comes in ----------------------------------------------------------------------------------------

    @property
    def versions(self) -> tuple[Version, ...]:
        """All of the line, with their decisions."""
        return self._recorder.versions

    @property
    def waiting_events(self) -> int:
        """In contributions that wait for the round."""
        return sum(each.contribution.events for each in self._waiting.values())

    def receive(self, offset: int, key: bytes, value: bytes | None, now_s: float) -> None:
        """The next record of ``meta-gradients``. What cannot be used is counted in ``line.refused``, with an alarm."""
        self._position = offset + 1
        block = self._assembler.add(offset, key, value or b"")
        if block is None:
            return
        try:
            contribution = decode(block, key)
        except MessageRefused as error:
            self._refuse(error)
            return
        self.take(contribution, now_s)

    def take(self, contribution: Contribution, now_s: float) -> str | None:
        """A contribution, whole; why it is refused, or None: it waits for the round. Refusals are counted, no alarm:

        "span": it does not start where the partition's last one ended (a duplicate, or it comes late), or one waits;
        "version": it was made after another marker than the last. Its partition sends again what is still to be told.
        """
        reason = self._unfit(contribution)
        if reason is not None:
            self.line.refused[reason] = self.line.refused.get(reason, 0) + 1
            return reason
        self._waiting[contribution.partition] = _Waiting(contribution, now_s)
        return None

    def due(self, now_s: float) -> bool:
        """Whether it is time for a round."""
        if not self._waiting:
            return False
        oldest = min(each.since_s for each in self._waiting.values())
        return self.waiting_events >= self._settings.every_events or now_s - oldest >= self._round_timeout_s

    def _unfit(self, contribution: Contribution) -> str | None:
        span, line = contribution.span, self.line
        consumed = self.consumed.get(span.partition, -1)
        if span.last <= consumed or span.partition in self._waiting:
            return "span"
        if (contribution.marker, contribution.version) != (self._sequence, line.head):
            return "version"
        if span.first != consumed + 1:
            return "span"
        current = contribution.current
        return None if current is None or current.version == line.current.meta_version else "version"

    def _refuse(self, error: MessageRefused) -> None:
        self.line.refused[error.reason] = self.line.refused.get(error.reason, 0) + 1
        self._alarm(AlarmKind.REFUSED, str(error), {"reason": error.reason})

    # --- a round ----------------------------------------------------------------------------------------------

    def begin(self) -> Round | None:
        """What is to be published before the first contribution; None: there is a marker already."""
        if self._sequence >= 0:
            return None
        self._task = self.line.task()
        return self._published(self.line.state(), len(self.line.model.item_ids), ())

    def round(self) -> Round:
        """Takes in all that waits. ValueError where nothing does."""
        if not self._waiting:
            raise ValueError("no contribution waits: ask due() before a round")
        parts = [each.contribution for each in self._waiting.values()]
        self._waiting = {}
        together, line = merged(parts), self.line
        before, items, head = line.state(), len(line.model.item_ids), line.head
        self.consumed |= {span.partition: span.last for span in together.spans}
        self.events += together.events
        self._measure(parts, together)
        self._judge(together)
        wanted = self._task is not None and line.head == head
        gradients = self._usable(together.gradients) if wanted else []
        line.step(gradients, together.spans, self.events)
        self._note_candidate(gradients)
        self._task = line.task()
        drift = tuple(alarm for part in sorted(parts, key=lambda p: p.partition) for alarm in part.drift)
        return self._published(before, items, drift)

    def _measure(self, parts: list[Contribution], together: Merged) -> None:
        """Takes in what is new about anchors, and makes the reference as wide as they are."""
        line, current = self.line, together.current
        for part in parts:
            if part.current is not None:
                self._cohorts[str(part.partition)] = [cohort.name for cohort in part.current.cohorts]
        if current is None:
            return
        if together.base is not None:
            held = line.state().best.reference
            line.measured(current, together.base)
            silent = set(self._cohorts) - {str(part.partition) for part in parts}
            kept = {name for partition in silent for name in self._cohorts[partition]}
            self._set_best(_with(line.state().best.reference, held, kept))
        self._set_best(widened(line.state().best.reference, current))

    def _judge(self, together: Merged) -> None:
        """By the cohorts that somebody scored; a version in shadow that nobody scored stays where it is."""
        line, findings = self.line, together.findings
        state = line.state()
        if not state.blind:
            shadows = {o.number for o in state.open if o.stage == "shadow"}
            findings = tuple(f for f in findings if f.version not in shadows or (f.scores and f.scores.cohorts))
        asked = {cohort.name for f in findings if f.scores is not None for cohort in f.scores.cohorts}
        held = state.best.reference
        absent = {cohort.name for cohort in held.cohorts} - asked
        if absent:
            line.restore(replace(state, best=state.best.kept(asked)))
        line.judge(findings)
        if absent:
            self._set_best(_with(line.state().best.reference, held, absent))

    def _set_best(self, reference: Scores) -> None:
        state = self.line.state()
        if [*map(id, reference.cohorts)] != [*map(id, state.best.reference.cohorts)]:
            self.line.restore(replace(state, best=Best(reference), blind=not reference.cohorts))

    def _usable(self, gradients: tuple[GradientSum, ...]) -> list[GradientSum]:
        """Those that ``line.step`` will count, filled up with each other's names, and those that it will refuse."""
        line, sound, others = self.line, [], []
        for gradient in gradients:
            try:
                check(gradient, line.model, line.head, self._moves)
                sound.append(gradient)
            except GradientRefused:
                others.append(gradient)
        return filled(sound) + others

    def _note_candidate(self, gradients: list[GradientSum]) -> None:
        """Keeps the delta of a version that was made just now."""
        line = self.line
        made = self._recorder.versions[-1]
        if made.number in self._marks or made.record.round != line.round or made.stage == "rejected":
            return
        touched = [item for g in gradients for item in (*g.item_ids, *g.seen)]
        rows = np.unique(line.model.rows_named(touched))
        self._deltas[made.number] = line.model.excerpt([*self._tables, *self._others], rows[rows >= 0])
        items = len(line.model.item_ids)
        self._marks[made.number] = Mark(made.number, made.stage, made.record.serving_sha256, items)

    # --- by hand ----------------------------------------------------------------------------------------------

    def promote(self, number: int, reason: str = "asked for") -> Round:
        """Makes an open version serve, and those it is built on before it. Raises WrongStep."""
        state = self.line.state()
        if number not in [o.number for o in state.open]:
            raise WrongStep(f"version {number} is not open: a version that is closed is brought back by its tensors")
        for o in state.open:
            if o.number <= number:
                why = reason if o.number == number else f"version {number}, which is built on it, was: {reason}"
                self._recorder.decide(o.number, Decision("promoted by hand", why))
        served = [o for o in state.open if o.number <= number]
        left = tuple(o for o in state.open if o.number > number)
        scores = served[-1].scores or Scores(number, ())
        self.line.restore(replace(state, current=served[-1].model, earlier=_earlier(state), open=left, served=scores))
        return self._by_hand(state)

    def rollback(self, to_version: int, parameters: Parameters, reason: str = "asked for") -> Round:
        """Makes a version that served serve again, as a new one: ``parameters`` are its very tensors.

        Open versions are rejected, and the best is made anew. Raises WrongStep where it never served, serves now, or
        these are not its tensors; nothing has happened then.
        """
        line, state, items = self.line, self.line.state(), len(self.line.model.item_ids)
        undone = self._recorder.undone_by_return_to(to_version)
        restored = self._recorder.versions[to_version].record
        if serving_sha256(parameters.tensors, parameters.item_ids) != restored.serving_sha256:
            raise WrongStep(f"these are not the tensors of version {to_version}: its record has another hash")
        for o in reversed(state.open):
            take_back(line.model, o.step.undo)
        changed = self._loaded(parameters)
        number = self._recorder.next_version
        because = Decision("rejected", f"built on what the rollback to version {to_version} undoes")
        for o in state.open:
            self._recorder.decide(o.number, because)
        evidence = {"to": to_version, "undone": undone, "current before": state.current.meta_version}
        self._recorder.restored(
            replace(
                restored, version=number, parent=to_version, round=state.round, spans=(), undone=undone,
                decision=Decision("rollback", f"{reason}; back to version {to_version}", evidence),
            )
        )  # fmt: skip
        held = len(parameters.item_ids)
        self._deltas[number] = changed
        self._marks[number] = Mark(number, "rollback", restored.serving_sha256, held)
        model = state.current.successor(*parts_of(line.model, held), number)
        nothing = Scores(number, ())
        fresh = replace(state, current=model, earlier=_earlier(state), open=(), served=nothing, best=Best(), blind=True)
        line.restore(fresh)  # it sees again with the first scores of the version that serves
        return self._by_hand(state, items)

    def _loaded(self, parameters: Parameters) -> Excerpt:
        """Loads tensors into the model; all that is other than before."""
        model, names = self.line.model, [*self._tables, *self._others]
        every = np.arange(len(model.item_ids))
        before = model.excerpt(names, every)
        model.load(parameters.tensors, parameters.item_ids)
        after = model.excerpt(names, every)
        rows = (before.item_events != after.item_events) | (before.item_steps != after.item_steps)
        for name in self._tables:
            for old, new in zip(before.tensors[name], after.tensors[name], strict=True):
                rows |= (old != new).reshape(len(every), -1).any(axis=1)
        return model.excerpt(names, np.flatnonzero(rows))

    def _by_hand(self, before: LineState, items: int | None = None) -> Round:
        """What was waiting was made after another marker, and is refused as such."""
        for _ in self._waiting:
            self.line.refused["version"] = self.line.refused.get("version", 0) + 1
        self._waiting, self._task = {}, self.line.task()
        return self._published(before, len(self.line.model.item_ids) if items is None else items, ())

    # --- what goes out ----------------------------------------------------------------------------------------

    def _published(self, before: LineState, items: int, drift: tuple[DriftAlarm, ...]) -> Round:
        """All that has changed since ``before``, when the vocabulary had so many items."""
        line, told, after = self.line, self._recorder.take_told(), self.line.state()
        records = pack_vocabulary(line.model, items)
        opened = {o.number: o.stage for o in after.open}
        for version in told:
            if version.number in opened and version_key(DELTA, version.number) not in self._shelf:
                records += self._shelf.put(
                    version_key(DELTA, version.number), pack_excerpt(self._deltas[version.number])
                )
        rows: dict[bytes, Record] = {}
        for version in told:
            if version.stage in SERVING and version.number in self._deltas:
                given = promoted(self._deltas[version.number], self._form, line.model, self._shelf)
                rows |= {record.key: record for record in given}
        records += rows.values()
        for number in [n for n in self._deltas if n not in opened]:
            del self._deltas[number]
            records += self._shelf.remove(version_key(DELTA, number))
        records += self._recorder.records(told)
        records += state_records(before, after, {"cohorts": self._cohorts}, self._shelf)
        records.append(Record(MARKER, self._marker(after).encode(self._key)))
        before, self._refused = replace(before, refused=self._refused), dict(after.refused)
        return Round(tuple(records), tuple(_monitoring(before, after, told, drift)), self._next_position())

    def _marker(self, state: LineState) -> Marker:
        self._sequence += 1
        current = state.current.meta_version
        stages = {current: self._recorder.versions[current].stage} | {o.number: o.stage for o in state.open}
        self._marks = {number: replace(self._marks[number], stage=stage) for number, stage in stages.items()}
        marks = [self._marks[number] for number in stages]
        return Marker(
            self._sequence, state.current.fingerprint, self._moves, state.round, self.events,
            len(self.line.model.item_ids), marks[0], tuple(marks[1:]), self._settings.gate.canary_share,
            dict(self.consumed), self._task,
        )  # fmt: skip

    def _next_position(self) -> int | None:
        """All that was received and is whole has been taken in, or refused."""
        first = self._assembler.first_offset
        return self._position if first is None else first


def _earlier(state: LineState) -> tuple[ServingModel, ...]:
    """Once its current version serves no more."""
    return (*state.earlier, state.current)[-EARLIER:]


def _with(reference: Scores, held: Scores, names: Iterable[str]) -> Scores:
    """And those cohorts of ``held`` that it has not, if they are named."""
    there, wanted = reference.by_name(), set(names)
    more = tuple(c for c in held.cohorts if c.name in wanted and c.name not in there)
    return replace(reference, cohorts=reference.cohorts + more)


def _monitoring(
    before: LineState, after: LineState, told: list[Version], drift: tuple[DriftAlarm, ...]
) -> Iterable[Record]:
    """Decisions, rows of the matrix, drift and refusals of a round, as JSON keyed by what they are."""
    found: list[dict[str, Any]] = []
    known = {o.number: o.stage for o in before.open}
    for version in told:
        for decision in version.decisions if version.number not in known else version.decisions[-1:]:
            found.append({
                "record": "decision", "version": version.number, "round": version.record.round, "kind": decision.kind,
                "reason": decision.reason, "evidence": dict(decision.evidence), "at_ms": decision.at_ms,
            })  # fmt: skip
    if len(after.matrix.versions) > len(before.matrix.versions):
        found += after.matrix.monitoring()
    found += [{"record": "drift", **alarm.as_dict()} for alarm in drift]
    if after.refused != before.refused:
        found.append({"record": "refused", "round": after.round, "by_reason": dict(after.refused)})
    for record in found:
        value = json.dumps({"format": FORMAT, **record}, sort_keys=True, separators=(",", ":")).encode()
        yield Record(str(record["record"]).encode(), value)
