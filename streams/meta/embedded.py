"""The online stage of a run in one process: a round every so many events, between two calls of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

import numpy as np

from configs.exceptions import SettingsError
from configs.settings import AlarmSettings, Settings
from learner.adaptation import Adaptation
from learner.anchors import AnchorSet, score
from learner.artifact import Artifact
from learner.drift import DriftAlarm, DriftWatch
from learner.features import Catalogue
from learner.histories import Histories
from learner.interactions import Interactions
from learner.meta_model import MetaModel
from learner.metrics import event_log_loss
from learner.offline_histories import OfflineHistories
from learner.serving import ServingModel
from state.lineage import Lineage
from streams.alarms import DRAIN_S, Alarms, Kind
from streams.kafka.secrets import read_secret
from streams.meta.chronicle import Chronicle
from streams.meta.contributor import Contributor
from streams.meta.line import MetaLine
from streams.meta.result import MetaResult
from streams.processor import Predictions, Processor
from streams.versions import Serving, share_items

OFFLINE_SLICE = 0
NO_ANCHORS = (
    "The model was trained without held-out users (meta.moves was off, or they were too few), so there are no anchors "
    "until a time slice of the stream has ended (meta.anchors.slice_events): until then the stream alone judges "
    "versions. Train it again with meta.moves set to have anchors from the start."
)


class EmbeddedMeta:
    """Streams through ``processor`` and learns from the stream. Use ``process`` in place of the processor's.

    Raises SettingsError for an alarm's address or a segment that cannot be used, LineageError. Use as a context.
    """

    def __init__(
        self,
        artifact: Artifact,
        offline: OfflineHistories,
        serving: ServingModel,
        processor: Processor,
        settings: Settings,
        users: Catalogue,
        *,
        partition: int,
    ) -> None:
        meta, seed = settings.meta, settings.training.seed
        self._settings = meta
        self._processor = processor
        self._partition = partition
        self._initial = serving
        self._chronicle = Chronicle(_lineage(settings), meta.keep_versions, _now_ms)
        self._line = MetaLine(
            MetaModel(artifact, offline.item_events), serving, meta, self._chronicle, seed=seed,
            alarm=self._alarm,
        )  # fmt: skip
        replayed, held = offline.histories(artifact.fixed.item_ids)
        self._contributor = Contributor(
            partition, processor.store(partition), processor.book(partition), replayed, meta, processor.layout,
            ordinal=settings.learner.ordinal_auxiliary, seed=seed, segment_of=_segments(users, meta.anchors.segment),
            threads=settings.training.threads,
        )  # fmt: skip
        self._anchors = self._first_anchors(held, seed)
        self._notes = () if self._anchors.cohorts else (NO_ANCHORS,)
        self._drift = DriftWatch()
        self._alarmed: list[DriftAlarm] = []
        self._seconds = 0.0
        self._events = 0
        self._alarms = alarms_of(meta.alarms)  # the last: it has a thread

    def process(self, records: Interactions) -> Predictions:
        """As ``Processor.process``, with rounds in between."""
        done, parts = 0, []
        while done < len(records):
            left = self._settings.every_events - self._contributor.events
            piece = records.take(slice(done, done + left)).pruned()  # nothing of what comes later, not even its ids
            said = self._processor.process(self._partition, piece)
            parts.append(said)
            done += len(piece)
            self._events += len(piece)
            self._contributor.observe(piece)
            self._watch(piece, said)
            if self._contributor.events >= self._settings.every_events:
                started = time.perf_counter()
                self._round()
                self._seconds += time.perf_counter() - started
        return _joined(parts)

    def result(self) -> MetaResult:
        """So far."""
        return MetaResult(
            self._chronicle.versions, self._line.matrix, tuple(self._alarmed), self._seconds, self._line.round,
            dict(self._processor.moved), dict(self._line.refused), self._notes,
        )  # fmt: skip

    @property
    def current(self) -> ServingModel:
        """The version that serves."""
        return self._line.current

    @property
    def serving(self) -> Serving:
        """Who serves now, a canary included."""
        return self._line.serving

    @property
    def newest(self) -> int:
        """The highest version number given so far."""
        return self._chronicle.next_version - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._alarms.close(DRAIN_S)

    # --- a round ----------------------------------------------------------------------------------------------

    def _round(self) -> None:
        line, contributor = self._line, self._contributor
        share_items((line.current, *(model for _, model in line.open_versions)))
        adaptations = self._adaptations()
        canary_share = self._settings.gate.canary_share
        line.judge([
            contributor.findings(
                model, line.current, adaptations, self._anchors if stage == "shadow" else None,
                canary_share if stage == "canary" else None,
            )
            for stage, model in line.open_versions
        ])  # fmt: skip
        task, gradients = line.task(), []
        if task is not None:
            new_items = line.model.lacks(line.current.met_items)
            teacher = (line.current, adaptations[line.current]) if task.distillation > 0 else None
            gradient = contributor.gradient(line.model, task, new_items, teacher)
            gradients = [] if gradient is None else [gradient]
        line.step(gradients, [contributor.span()], self._events)
        contributor.end_span()
        self._processor.book(self._partition).shrink()
        self._processor.serve(self._partition, line.serving)
        self._renew_anchors(contributor.new_slice(self._anchors))

    def _adaptations(self) -> dict[ServingModel, Adaptation]:
        models = (self._line.current, *(model for _, model in self._line.open_versions))
        layout = self._processor.layout
        return {model: Adaptation(layout, model.first, model.second) for model in models}

    def _first_anchors(self, held: Histories, seed: int) -> AnchorSet:
        meta = self._settings.anchors
        anchors = AnchorSet(meta.users, meta.query, seed)
        if len(held):
            anchors = anchors.with_slice(OFFLINE_SLICE, held, np.arange(len(held), dtype=np.uint32))
        self._measure(anchors)
        return anchors

    def _renew_anchors(self, anchors: AnchorSet) -> None:
        if anchors is not self._anchors:
            self._measure(anchors)
            self._anchors = anchors

    def _measure(self, anchors: AnchorSet) -> None:
        layout = self._processor.layout
        self._line.measured(score(anchors, self._line.current, layout), score(anchors, self._initial, layout))

    def _alarm(self, kind: Kind, message: str, evidence: Mapping[str, Any]) -> None:
        self._alarms.raise_alarm(kind, message, evidence)

    def _watch(self, records: Interactions, said: Predictions) -> None:
        """Tells the drift detectors; where tastes have moved, older anchors measure what nobody likes any more."""
        applied = np.flatnonzero(said.applied)
        loss = event_log_loss(records.label[applied], said.probability[applied])
        alarms = self._drift.add(loss, said.number[applied])
        for alarm in alarms:
            self._alarm(
                Kind.DRIFT, f"log-loss of {alarm.channel} users rose from {alarm.before:.4f} to {alarm.after:.4f}",
                alarm.as_dict(),
            )  # fmt: skip
        self._alarmed += alarms
        if any(alarm.channel == "warm" for alarm in alarms):
            self._contributor.forget_slice()
            self._renew_anchors(self._anchors.retired(self._anchors.slices))


def alarms_of(settings: AlarmSettings) -> Alarms:
    """Raises SettingsError for an address that cannot be used."""
    try:
        return Alarms(settings.webhook, settings.min_interval_s)
    except ValueError as error:
        raise SettingsError(f"meta.alarms.webhook: {error}") from None


def _segments(users: Catalogue, name: str | None) -> Callable[[Sequence[str]], list[str]] | None:
    if name is None:
        return None
    names = [f.name for f in users.fields if f.kind == "categorical"]
    if name not in names:
        nearest = get_close_matches(name, names, 1)
        raise SettingsError(
            f"meta.anchors.segment: {name!r} is no categorical feature of the users' catalogue"
            f"{f', nearest: {nearest[0]!r}' if nearest else ''}; there are: {', '.join(names) or 'none'}"
        )
    place = [f.name for f in users.fields].index(name)

    def segment_of(ids: Sequence[str]) -> list[str]:
        return [users.rows[user][place] or "" if user in users.rows else "" for user in ids]

    return segment_of


def _lineage(settings: Settings) -> Lineage | None:
    meta = settings.meta
    if meta.directory is None:
        return None
    key = read_secret(meta.hmac, "meta.hmac").reveal().encode() if meta.hmac.given else None
    return Lineage(meta.directory, key)


def _joined(parts: Sequence[Predictions]) -> Predictions:
    """Of no parts: of no events."""
    none = Predictions(np.zeros(0, np.float32), np.zeros(0, np.float32), np.zeros(0, np.bool_), np.zeros(0, np.int64))
    logit, probability, applied, number = zip(none, *parts, strict=True)
    return Predictions(
        np.concatenate(logit), np.concatenate(probability), np.concatenate(applied), np.concatenate(number)
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
