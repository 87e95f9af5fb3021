"""From gradients to versions: one step a round, judged before anybody is served by it, and taken back if it must be.

Every round (``judge``, then ``step``) moves each open version on by one stage:

    candidate ─► shadow     scored on anchors, and on the next span beside the version that serves
                   └─► canary     serves a share of the users for a span
                          └─► promoted     serves everybody; the next rounds are built on it

Training does not wait: the next candidate is built on the newest open version. Where one is rejected, those built on
it go with it, the parameters are again those of the version that serves, to the bit, and after some rejections in a
row the ladder makes the next rounds more careful (``learner.gate.Ladder``). One line for a whole stream, wherever its
partitions are: it knows neither files nor brokers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from configs.settings import MetaSettings
from learner.forgetting import CohortScores, ForgettingMatrix, Scores, kept
from learner.gate import ALL, Best, Directive, Ladder, Limits, Verdict, judge, judge_stream
from learner.meta_model import MetaModel
from learner.meta_update import GradientRefused, GradientSum, StepReport, add, check, take_back, take_step
from learner.serving import ServingModel
from state.lineage import Decision, Record, Span
from state.lineage.record import Kind
from streams.alarms import Kind as AlarmKind
from streams.meta.chronicle import Chronicle
from streams.meta.contributor import Findings, Task, moves_of
from streams.versions import Serving

MAX_OPEN = 3
"""Versions that are still to be decided on: each holds tables of its own"""
EARLIER = 8
"""Versions that served, kept for rows that exchange priors"""

Alarm = Callable[[AlarmKind, str, Mapping[str, Any]], None]
"""(kind, message, evidence)"""


@dataclass(slots=True)
class _Open:
    number: int
    model: ServingModel
    step: StepReport
    stage: Kind
    scores: Scores | None = None


class OpenVersion(NamedTuple):
    """A version that is still to be decided on."""

    number: int
    model: ServingModel
    step: StepReport
    stage: Kind
    scores: Scores | None
    """On anchors; None: not yet"""


@dataclass(frozen=True, slots=True)
class LineState:
    """All that a line is beside its model and its chronicle."""

    round: int
    current: ServingModel
    earlier: tuple[ServingModel, ...]
    open: tuple[OpenVersion, ...]
    """The oldest first"""
    ladder: Ladder
    best: Best
    served: Scores
    """Of the version that serves"""
    blind: bool
    """There are no anchors"""
    matrix: ForgettingMatrix
    refused: Mapping[str, int]


class MetaLine:
    """The versions of one stream's shared parameters, from version 0 on. ``serving`` is who serves now."""

    def __init__(
        self,
        model: MetaModel,
        initial: ServingModel,
        settings: MetaSettings,
        chronicle: Chronicle,
        *,
        seed: int,
        alarm: Alarm,
    ) -> None:
        """``initial``: version 0, the trained model, whose parameters ``model`` has."""
        self.model = model
        self.matrix = ForgettingMatrix()
        self.round = 0
        self._settings = settings
        self._moves = moves_of(settings)
        self._chronicle = chronicle
        self._seed = seed
        self._alarm = alarm
        gate = settings.gate
        self._limits = Limits(gate.limit, gate.confidence, gate.bootstrap_samples, gate.min_users)
        self._stream_limits = replace(self._limits, min_users=gate.min_stream_users)
        self._ladder = Ladder(gate.patience)
        self._best = Best()
        self._open: list[_Open] = []
        self._current = initial
        self._earlier: list[ServingModel] = []
        self._served = Scores(0, ())
        """Of the version that serves"""
        self._blind = True
        """There are no anchors: the stream alone judges"""
        self.refused: dict[str, int] = {}
        """Gradients that could not be used, by reason"""
        self._chronicle.add(
            Record(0, None, initial.fingerprint, 0, Decision("initial", "the trained model"),
                   settings=settings.model_dump(mode="json", exclude={"alarms"})),  # an address is a secret
            model.tensors, model.item_ids,
        )  # fmt: skip

    @property
    def serving(self) -> Serving:
        """Who serves from here on."""
        canary = next((o.model for o in self._open if o.stage == "canary"), None)
        share = self._settings.gate.canary_share if canary is not None else 0.0
        return Serving(self._current, canary, share, tuple(self._earlier))

    @property
    def current(self) -> ServingModel:
        """The version that serves everybody but canary users."""
        return self._current

    @property
    def open_versions(self) -> tuple[tuple[Kind, ServingModel], ...]:
        """(stage, version) of those still to be decided on, the oldest first."""
        return tuple((o.stage, o.model) for o in self._open)

    @property
    def head(self) -> int:
        """The version that the parameters are of: where the next gradient is taken."""
        return self._open[-1].number if self._open else self._current.meta_version

    @property
    def ladder(self) -> Ladder:
        """How careful rounds are."""
        return self._ladder

    def task(self) -> Task | None:
        """What the next gradient is to be; None where this round makes no version."""
        directive = self._ladder.directive
        if directive.frozen:
            self._ladder = self._ladder.round_left_out()
            return None
        if len(self._open) >= MAX_OPEN:
            return None
        settings = self._settings
        return Task(
            self.round, self.head, settings.users, settings.recent_share * directive.recent_scale,
            directive.distillation,
        )  # fmt: skip

    def measured(self, current: Scores, base: Scores) -> None:
        """What the version that serves, and version 0, are worth on the anchors as they are now.

        To be called whenever there are other anchors, before the next ``judge``. Without any, the stream alone judges.
        """
        names = [cohort.name for cohort in current.cohorts]
        self._blind = not names
        self._served = current
        for candidate in self._open:  # what was said of cohorts that are retired counts no longer
            candidate.scores = None if candidate.scores is None else kept(candidate.scores, names)
        self._best = self._best.kept(names).promoted(current, self._limits, self._seed)
        self.matrix = self.matrix.added(current, base)

    def judge(self, findings: Sequence[Findings]) -> None:
        """Moves every open version on, the oldest first, or takes it back with all that was built on it.

        ``findings``: at most one of each, of all partitions together; a version without any stays where it is, and
        none overtakes one that it was built on.
        """
        found, stays = {f.version: f for f in findings}, False
        for candidate in list(self._open):
            if candidate not in self._open:
                continue
            if (finding := found.get(candidate.number)) is None:
                stays = True
                continue
            verdicts = self._verdicts(candidate, finding)
            against = [v for v in verdicts if v.outcome == "reject"]
            evidence = {"verdicts": [v.as_dict() for v in verdicts], "cohorts": _cohorts(finding.scores)}
            # Where nothing was measured, the next span has more users.
            stays = stays or (candidate.stage == "shadow" and all(v.outcome == "wait" for v in verdicts))
            if against:
                self._reject(candidate, against[0].reason, evidence)
            elif not stays:
                self._advance(candidate, "; ".join(map(_said, verdicts)), evidence)

    def step(self, gradients: Sequence[GradientSum], spans: Sequence[Span], events: int) -> None:
        """Makes the next candidate of the sums that can be used, and counts the others in ``refused``.

        ``events`` of the stream so far. The round is over.
        """
        self.round += 1
        usable = [gradient for gradient in gradients if self._usable(gradient)]
        if not usable:
            return
        directive, total = self._ladder.directive, add(usable)
        settings, narrow = self._settings, self._moves != "everything"
        rate = (settings.narrow_rate if narrow else settings.rate) * directive.rate_scale
        step = take_step(self.model, total, self._moves, rate=rate, kl_weight=settings.kl_weight)
        number, parent = self._chronicle.next_version, self.head
        decision = Decision("candidate", f"{total.users:,} histories of {total.events:,} events")
        if not self.model.finite():
            decision = Decision("rejected", "a parameter is not finite")
        metrics = {
            "events": events, "log_loss": total.log_loss / max(total.events, 1), "users": total.users,
            "step_length": step.length, "gradient_norm": step.gradient_norm, "rung": self._ladder.rung,
        }  # fmt: skip
        record = Record(
            number, parent, self._current.fingerprint, self.round, decision, tuple(spans),
            _told(directive, rate), metrics,
        )  # fmt: skip
        self._chronicle.add(record, self.model.tensors, self.model.item_ids)
        if decision.kind == "rejected":
            take_back(self.model, step.undo)
            self._alarm(AlarmKind.NOT_FINITE, f"version {number} has a parameter that is not finite", metrics)
            self._climb()
            return
        model = self._current.successor(*self.model.parts(), number)
        candidate = _Open(number, model, step, "candidate")
        self._open.append(candidate)
        if self._settings.gate.enabled:
            self._move(candidate, "shadow", "to be scored on anchors and the next span", {})
        else:
            self._promote(candidate, "the gate is off", {})

    # --- its state --------------------------------------------------------------------------------------------

    def state(self) -> LineState:
        """As it is now."""
        opened = tuple(OpenVersion(o.number, o.model, o.step, o.stage, o.scores) for o in self._open)
        return LineState(
            self.round, self._current, tuple(self._earlier), opened, self._ladder, self._best, self._served,
            self._blind, self.matrix, dict(self.refused),
        )  # fmt: skip

    def restore(self, state: LineState) -> None:
        """Goes on from there. The model's parameters are those of the newest open version, or of the current one."""
        self.round, self._current, self._earlier = state.round, state.current, list(state.earlier)
        self._open = [_Open(*opened) for opened in state.open]
        self._ladder, self._best, self._served = state.ladder, state.best, state.served
        self._blind, self.matrix, self.refused = state.blind, state.matrix, dict(state.refused)

    # --- decisions --------------------------------------------------------------------------------------------

    def _verdicts(self, candidate: _Open, finding: Findings) -> list[Verdict]:
        seed, verdicts = self._seed + candidate.number, []
        rises = finding.stream
        if candidate.stage == "shadow":
            candidate.scores = finding.scores or Scores(candidate.number, ())
            if not self._blind:
                verdict = judge(candidate.scores, self._best.reference, self._limits, seed)
                verdicts.append(_or_recovers(verdict, candidate.scores, self._served))
            if self._settings.gate.shadow or self._blind:
                verdicts.append(judge_stream(rises.rise, rises.events, self._stream_limits, seed))
        else:
            verdicts.append(judge_stream(rises.rise, rises.events, self._stream_limits, seed, "canary"))
        return verdicts

    def _advance(self, candidate: _Open, reason: str, evidence: Mapping[str, Any]) -> None:
        share, busy = self._settings.gate.canary_share, any(o.stage == "canary" for o in self._open)
        if candidate.stage == "shadow" and share > 0:
            if not busy:
                self._move(candidate, "canary", reason, evidence)
        else:
            self._promote(candidate, reason, evidence)

    def _move(self, candidate: _Open, stage: Kind, reason: str, evidence: Mapping[str, Any]) -> None:
        candidate.stage = stage
        self._chronicle.decide(candidate.number, Decision(stage, reason, evidence))

    def _promote(self, candidate: _Open, reason: str, evidence: Mapping[str, Any]) -> None:
        self._move(candidate, "promoted", reason, evidence)
        self._open.remove(candidate)
        self._earlier = [*self._earlier, self._current][-EARLIER:]
        self._current = candidate.model
        if candidate.scores is not None and candidate.scores.cohorts:
            self._served = candidate.scores
            self._best = self._best.promoted(candidate.scores, self._limits, self._seed + candidate.number)
            self.matrix = self.matrix.added(candidate.scores)
        if not self._ladder.directive.frozen:  # it was made before
            self._ladder = self._ladder.after(promoted=True)

    def _reject(self, candidate: _Open, reason: str, evidence: Mapping[str, Any]) -> None:
        place = self._open.index(candidate)
        gone, self._open = self._open[place:], self._open[:place]
        for each in reversed(gone):
            take_back(self.model, each.step.undo)
        self._chronicle.decide(candidate.number, Decision("rejected", reason, evidence))
        for each in gone[1:]:
            self._chronicle.decide(each.number, Decision("rejected", f"built on version {candidate.number}"))
        self._alarm(AlarmKind.REJECTED, f"version {candidate.number} was rejected: {reason}", evidence)
        self._climb()

    def _climb(self) -> None:
        frozen = self._ladder.directive.frozen
        self._ladder = self._ladder.after(promoted=False)
        if self._ladder.directive.frozen and not frozen:
            self._alarm(AlarmKind.FROZEN, "meta-updates are frozen after repeated rejections", {"round": self.round})

    def _usable(self, gradient: GradientSum) -> bool:
        try:
            check(gradient, self.model, self.head, self._moves)
        except GradientRefused as error:
            self.refused[error.reason] = self.refused.get(error.reason, 0) + 1
            self._alarm(AlarmKind.REFUSED, str(error), {"reason": error.reason})
            return False
        return True


def _told(directive: Directive, rate: float) -> Mapping[str, Any]:
    return {
        "rate": rate, "recent_scale": directive.recent_scale, "distillation": directive.distillation,
    }  # fmt: skip


def _said(verdict: Verdict) -> str:
    return f"too few users to judge by: {verdict.reason}" if verdict.outcome == "wait" else verdict.reason


def _cohorts(scores: Scores | None) -> dict[str, dict[str, Any]]:
    """A row of the forgetting matrix, for people."""
    return {
        cohort.name: {
            "users": len(cohort.user), "auc": cohort.auc[0], "log_loss": cohort.log_loss[0],
            "zero_shot_auc": cohort.auc[1], "zero_shot_log_loss": cohort.log_loss[1],
        }
        for cohort in (scores.cohorts if scores is not None else ())
    }  # fmt: skip


def _or_recovers(verdict: Verdict, candidate: Scores, served: Scores) -> Verdict:
    """A pass after all, where the candidate is no worse than the version that serves on every cohort that has risen.

    Who serves may stand above the limit itself: a cohort's bound narrows as users come, and its best may have been
    lucky. To refuse what does no more harm would keep it there.
    """
    risen = [e.cohort for e in verdict.evidence if e.finding == "rises"]
    broken = any(e.finding in ("not finite", "not scored") for e in verdict.evidence)
    if verdict.outcome != "reject" or broken or not risen:
        return verdict
    found, now = candidate.by_name(), served.by_name()
    groups = [[name for name in found if name in now] if cohort == ALL else [cohort] for cohort in risen]
    if not all(name in now for group in groups for name in group) or not all(groups):
        return verdict
    if not all(_total(found, group) <= _total(now, group) for group in groups):
        return verdict
    reason = f"{verdict.reason}; but it is no worse there than version {served.version}, which serves"
    return replace(verdict, outcome="pass", reason=reason)


def _total(scores: Mapping[str, CohortScores], names: Sequence[str]) -> float:
    return sum(float(scores[name].loss[0].sum()) for name in names)
