"""One partition's part in the meta-updates: it sums gradients over its users' histories, and measures versions on them.

Events never leave it: what goes out are sums, losses and counts. Its users are those of the partition and a fixed
share of the offline ones; who is held out (``learner.anchors``) is measured on and never learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from configs.settings import MetaSettings
from learner.adaptation import Adaptation
from learner.anchors import AnchorSet, held_out, score
from learner.forgetting import Scores
from learner.histories import Histories
from learner.interactions import Interactions
from learner.meta_model import MetaModel
from learner.meta_update import GradientSum, Moves, gradient_sum
from learner.metrics import event_log_loss
from learner.rebasing import relearn
from learner.serving import RawFeatures, ServingModel
from learner.user_hash import CANARY, OFFLINE, drawn, mixed, user_crcs
from learner.user_state import RowLayout
from state.histories import HistoryBook
from state.lineage import Span
from state.store import UserStore

STREAM_USERS = 256
"""Users of a span on whom two versions are compared: more are no more telling, and cost a walk each"""
SHORT_SLICE = 4
"""After tastes have moved a slice is so many times shorter: until it ends there are no anchors"""
HELD_OUT_USERS = 4096
"""Of a time slice, at most; anchors are drawn from them"""


@dataclass(frozen=True, slots=True)
class Rises:
    """Paired by user: how much worse a version did on the events of one span than the one that serves."""

    rise: NDArray[np.float64]
    """(n,) its log-loss minus the other's, summed over the user's events in the span, nats"""
    events: NDArray[np.int64]
    """(n,)"""

    @staticmethod
    def none() -> Rises:
        """Of nobody."""
        return Rises(np.zeros(0), np.zeros(0, np.int64))

    def __add__(self, other: Rises) -> Rises:
        """Of both partitions' users."""
        return Rises(np.concatenate([self.rise, other.rise]), np.concatenate([self.events, other.events]))


@dataclass(frozen=True, slots=True)
class Findings:
    """What partitions say of one open version."""

    version: int
    scores: Scores | None
    """On their anchors; None where they were not asked"""
    stream: Rises
    """On the latest span, of users whom it would serve, or has served"""


@dataclass(slots=True)
class _Seen:
    """What came since the last round."""

    first: int = -1
    last: int = -1
    events: int = 0
    users: dict[bytes, int] = field(default_factory=dict)
    """Id -> events in the span"""
    items: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """What a round asks for."""

    number: int
    version: int
    """Where the gradient is to be taken"""
    users: int
    recent_share: float
    distillation: float
    """Weight of the draw towards the version that serves"""


class Contributor:
    """Keeps what a partition's next contribution needs. ``store`` and ``book`` are the partition's."""

    def __init__(
        self,
        partition: int,
        store: UserStore,
        book: HistoryBook,
        offline: Histories,
        settings: MetaSettings,
        layout: RowLayout,
        *,
        ordinal: float,
        seed: int,
        segment_of: Callable[[Sequence[str]], list[str]] | None,
        threads: int | None = 1,
    ) -> None:
        """``offline``: this partition's share, without those held out. ``segment_of``: users' cohorts beside others."""
        self.partition = partition
        self._store = store
        self._book = book
        self._offline = offline
        self._settings = settings
        self._layout = layout
        self._ordinal = ordinal
        self._seed = seed
        self._threads = threads
        self._segment_of = segment_of
        self._seen = _Seen()
        self._slice_users: dict[bytes, int] = {}
        """Held out, with their events in the time slice"""
        self._slice_events = 0
        self._slice = 0

    @property
    def events(self) -> int:
        """Since the last round."""
        return self._seen.events

    def observe(self, events: Interactions) -> None:
        """These events were applied."""
        seen = self._seen
        if not len(events):
            return
        events = events.pruned()  # users and items in the order in which they came, however the stream is cut
        seen.first = int(events.offset[0]) if seen.first < 0 else seen.first
        seen.last = int(events.offset[-1])
        seen.events += len(events)
        self._slice_events += len(events)
        counts = np.bincount(events.user, minlength=len(events.user_ids))
        here = np.flatnonzero(counts)
        users = [events.user_ids[k].encode() for k in here.tolist()]
        for user, count in zip(users, counts[here].tolist(), strict=True):
            seen.users[user] = seen.users.get(user, 0) + count
        for item, count in zip(events.item_ids, np.bincount(events.item).tolist(), strict=False):
            if count:
                seen.items[item] = seen.items.get(item, 0) + count
        out = held_out(user_crcs(users), self._settings.anchors.held_out)
        for k in np.flatnonzero(out).tolist():
            if users[k] in self._slice_users or len(self._slice_users) < HELD_OUT_USERS:
                self._slice_users[users[k]] = self._slice_users.get(users[k], 0) + int(counts[here[k]])

    def gradient(
        self,
        model: MetaModel,
        task: Task,
        new_items: Mapping[str, RawFeatures | None],
        teacher: tuple[ServingModel, Adaptation] | None,
    ) -> GradientSum | None:
        """The sum over recent users and a replay of all earlier ones; None where there is nobody."""
        rng = np.random.default_rng([self._seed, self.partition, task.number])
        histories = self._drawn(rng, task.users, task.recent_share)
        histories = histories.take(np.flatnonzero(histories.lengths > 0))
        if not len(histories):
            return None
        logits = None
        if teacher is not None and task.distillation > 0:
            served, adaptation = teacher
            logits = relearn(adaptation, served, histories, served.means_of(histories.features)).logit
        return gradient_sum(
            model, task.version, histories, moves_of(self._settings), seed=(self._seed, self.partition, task.number),
            ordinal=self._ordinal, teacher=logits, distillation=task.distillation, seen=self._seen.items,
            new_items=new_items, threads=self._threads,
        )  # fmt: skip

    def span(self) -> Span:
        """The events since the last round."""
        return Span(self.partition, self._seen.first, self._seen.last)

    def end_span(self) -> None:
        """A round has taken the span."""
        self._seen = _Seen()

    def new_slice(self, anchors: AnchorSet) -> AnchorSet:
        """With the cohorts of the time slice that ends here, if one does: its users' events within it."""
        if self._slice_events < self._settings.anchors.slice_events:
            return anchors
        self._slice_events = 0
        self._slice += 1
        seen, self._slice_users = self._slice_users, {}
        users = list(seen)
        histories = self._histories(users)
        kept = np.flatnonzero(histories.lengths > 0)
        if not len(kept):
            return anchors
        histories, named = histories.take(kept), [users[k] for k in kept.tolist()]
        lengths = histories.lengths
        here = np.minimum(np.array([seen[user] for user in named], np.int64), lengths)
        segments = None if self._segment_of is None else self._segment_of([user.decode() for user in named])
        return anchors.with_slice(self._slice, histories.cut(lengths - here, lengths), user_crcs(named), segments)

    def forget_slice(self) -> None:
        """Tastes have moved: what was seen of the time slice so far is left out, and the next one comes soon."""
        self._slice_users = {}
        slice_events = self._settings.anchors.slice_events
        self._slice_events = slice_events - slice_events // SHORT_SLICE

    def findings(
        self,
        candidate: ServingModel,
        current: ServingModel,
        adaptations: Mapping[ServingModel, Adaptation],
        anchors: AnchorSet | None,
        canary_share: float | None,
    ) -> Findings:
        """How the candidate does on anchors (where they are given), and on the span beside the version that serves.

        ``canary_share``: only users of that share, whom the candidate has served.
        """
        scores = None if anchors is None else score(anchors, candidate, self._layout)
        return Findings(candidate.meta_version, scores, self._compared(candidate, current, adaptations, canary_share))

    def _compared(
        self,
        candidate: ServingModel,
        current: ServingModel,
        adaptations: Mapping[ServingModel, Adaptation],
        canary_share: float | None,
    ) -> Rises:
        users = list(self._seen.users)
        if canary_share is not None:
            users = [users[k] for k in np.flatnonzero(drawn(user_crcs(users), CANARY, canary_share)).tolist()]
        users = users[:STREAM_USERS]
        histories = self._histories(users)
        kept = np.flatnonzero(histories.lengths > 0)
        if not len(kept):
            return Rises.none()
        histories = histories.take(kept)
        counts = np.array([self._seen.users[users[k]] for k in kept.tolist()], np.int64)
        counts = np.minimum(counts, histories.lengths)
        user = np.repeat(np.arange(len(histories)), histories.lengths)
        latest = np.arange(histories.events) >= (histories.starts[1:] - counts)[user]
        losses = []
        for model in (candidate, current):
            logit = relearn(adaptations[model], model, histories, model.means_of(histories.features)).logit[latest]
            losses.append(event_log_loss(histories.label[latest], 1 / (1 + np.exp(-logit.astype(np.float64)))))
        rise = np.bincount(user[latest], losses[0] - losses[1], len(histories)).astype(np.float64)
        return Rises(rise, counts)

    def _drawn(self, rng: np.random.Generator, users: int, recent_share: float) -> Histories:
        """Recent users without repeats, then anybody."""
        recent = list(self._seen.users)
        recent = [recent[k] for k in np.flatnonzero(~self._held_out(user_crcs(recent))).tolist()]
        count = min(len(recent), round(users * recent_share))
        chosen = [recent[k] for k in np.sort(rng.choice(len(recent), count, replace=False)).tolist()] if count else []
        online, offline = self._book.counts().users, len(self._offline)
        everybody = online + offline
        from_stream = int(rng.binomial(users - count, online / everybody)) if everybody else 0
        parts = [self._histories(chosen), self._book.sample(rng, from_stream, skip=self._held_out)]
        if offline:
            parts.append(self._offline.take(rng.integers(offline, size=users - count - from_stream)))
        return Histories.concatenate(parts)

    def _histories(self, users: list[bytes]) -> Histories:
        """As they stand now; empty ones for users who are not kept."""
        if not users:
            return Histories.empty()
        rows = self._layout.rows(self._store.get_many(users)[0])
        return self._book.read(users, rows["events"].astype(np.int64))[0]

    def _held_out(self, crcs: NDArray[np.uint32]) -> NDArray[np.bool_]:
        return held_out(crcs, self._settings.anchors.held_out)


def of_partition(histories: Histories, partition: int, partitions: int) -> Histories:
    """The offline users who count as this partition's; they have no ids here, so their places stand for those."""
    places = np.arange(len(histories), dtype=np.uint32)
    return histories.take(np.flatnonzero(mixed(places, OFFLINE) % np.uint32(partitions) == partition))


def moves_of(settings: MetaSettings) -> Moves:
    """What moves. ValueError where nothing does."""
    if settings.moves == "off":
        raise ValueError("meta.moves is off: nothing is to be learned")
    return settings.moves
