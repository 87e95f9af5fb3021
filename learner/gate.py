"""The gate: whether a candidate version may serve. Pure: scores in, a verdict with its evidence out.

What is judged is the *rise* of a cohort's log-loss over the best version that ever served it (``Best``), paired by
user, in nats per event; the best past is the reference so that many small steps cannot add up unseen. Bounds come from
a bootstrap over users, who are drawn for all cohorts alike. A cohort rejects a candidate when

    upper bound of its rise > limit      the rise may be larger than allowed, and
    lower bound of its rise > 0          there is one at all

The upper bound is one-sided at ``confidence`` for this cohort: only rises do harm. It alone (the usual test of
non-inferiority) would refuse nearly all: with 64 users whose paired losses spread by 0.02 to 0.05 nats, the bound of a
version that is as good as the best lies 0.004 to 0.01 above zero. So the lower bound must exclude chance, at the same
confidence *for all cohorts together* (the largest of C studentised means, as in White's reality check, Econometrica
2000, and Romano & Wolf, ibid. 2005): thirty cohorts would else refuse four of five good candidates between them.
With s the standard error of the cohort's rise, Q the quantile of the largest of C (1.6 for one, 2.9 for thirty):

    rejected               a measured rise above max(Q·s, limit − 1.64·s)
    refused by chance      at most 5 % of candidates that are as good as the best everywhere, whatever C
    let through            5 % of true rises of max(limit, (Q + 1.64)·s), fewer of larger ones

A cohort's own bound is thus about the limit once s is below limit / 4.5: 256 users whose paired losses spread by 0.01.
Noisier or smaller ones bound only rises of 4.5·s, and rely on the cohort ``all``, every user of every cohort, which
always judges. The best is replaced only by a version that is *significantly* better, for all cohorts together: the best
of many equal ones is the luckiest, and would refuse the average candidate.

Simulated: 60 rounds, 12 cohorts; each round moves a user's loss by chance, so that versions far apart differ by the
spread. Refused of candidates that are as good as the best everywhere, and of those that improve; and how far a single
cohort gets that loses 0.0005 nats a round, 0.03 in all:

    users   spread   refused, equal   refused, improving   the creeping cohort ends at
    64      0.05     2 %              1 %                  0.0225   (4.5·s = 0.028)
    64      0.02     7 %              4 %                  0.0118   (0.011)
    256     0.02     6 %              1 %                  0.0063   (0.006)
    256     0.01     2 %              0 %                  0.0028   (0.003)

The upper bound alone would refuse 98 % of equal and 75 % of improving candidates in the first line; with the luckiest
version as the best this rule would refuse 46 % and 20 %. A cohort that loses 0.02 at once gets through once in 18
rounds in the first line, never in the others.

Symbols: U users, C cohorts, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner.forgetting import CohortScores, Scores, json_number, kept

Double = NDArray[np.float64]
Outcome = Literal["pass", "reject", "wait"]
Stage = Literal["anchors", "shadow", "canary"]
Finding = Literal["passes", "rises", "not finite", "not scored", "few users", "no reference"]

ALL = "all"
"""Every user of every cohort that has a reference"""
_DRAWN_AT_ONCE = 1 << 21
"""Users drawn in one piece of the bootstrap: 16 MB"""

RATE_SCALE = 0.3
RECENT_SCALE = 0.3
"""About half a decade each: what three rejected rounds in a row need is a step of another size, not a finer one"""
DISTILLATION = 1.0
"""Weight of the distance to the last good version's predictions, beside the loss itself"""
FROZEN = 4
FROZEN_PATIENCES = 8
"""A frozen ladder waits this many times its patience before it tries again"""


@dataclass(frozen=True, slots=True)
class Limits:
    """What the gate allows. ValueError for what can judge nothing."""

    limit: float = 0.003
    """Nats per event by which a cohort's log-loss may rise over its best"""
    confidence: float = 0.95
    """Of each one-sided bound"""
    bootstrap_samples: int = 400
    """The 95 % quantile of so many is within 1 % of the true one"""
    min_users: int = 16
    """A cohort of fewer does not judge alone: a bootstrap of so few is too narrow"""

    def __post_init__(self) -> None:
        if not (self.limit > 0 and 0.5 < self.confidence < 1 and self.bootstrap_samples >= 100 and self.min_users >= 2):
            raise ValueError(
                f"{self} judges nothing: limit must be above 0, confidence between 0.5 and 1, bootstrap_samples at "
                "least 100, min_users at least 2 (meta.gate)"
            )


@dataclass(frozen=True, slots=True)
class Evidence:
    """What one cohort, or the stream, says of a candidate; nats per event, None where nothing was measured."""

    cohort: str
    finding: Finding
    users: int
    """Paired"""
    limit: float
    rise: float | None = None
    lower: float | None = None
    """Bound for all cohorts together"""
    upper: float | None = None
    """Bound for this one"""
    reference: int | None = None
    """Version that the rise is over; None for ``all``, where it is each cohort's own"""

    def sentence(self) -> str:
        """What was found, with its numbers."""
        over = "" if self.reference is None else f" over version {self.reference}"
        if self.rise is None or self.lower is None or self.upper is None:
            return f"{self.cohort}: {self.finding}{over} ({self.users} users)"
        return (
            f"{self.cohort} {'rises' if self.rise > 0 else 'falls'} by {abs(self.rise):.4f} nats{over} "
            f"(bounds {self.lower:.4f} to {self.upper:.4f}, {self.users} users; limit {self.limit:g})"
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, and all it was made on."""

    stage: Stage
    outcome: Outcome
    """``wait``: too few users so far, ask again with more"""
    reason: str
    """One line"""
    evidence: tuple[Evidence, ...]

    @property
    def accepted(self) -> bool:
        """Whether the candidate may go on to the next stage."""
        return self.outcome == "pass"

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {**asdict(self), "evidence": [asdict(evidence) for evidence in self.evidence]}


@dataclass(frozen=True, slots=True)
class Best:
    """Per cohort the best scores of a version that served. Make it anew from the served versions after a rollback."""

    reference: Scores = field(default_factory=lambda: Scores(0, ()))

    def promoted(self, scores: Scores, limits: Limits, seed: int) -> Best:
        """After a version began to serve: its scores replace those it is significantly better than, and are the first
        of cohorts that had none. Cohorts with a loss that is not finite are never the best."""
        best = self.reference.by_name()
        challengers = {c.name: c for c in scores.cohorts if c.finite and len(c.user)}
        pairs = {name: (c, best[name]) for name, c in challengers.items() if name in best}
        pairs = {name: pair for name, pair in pairs.items() if len(_common(*pair)[0]) >= limits.min_users}
        if pairs:
            bounds = bootstrap(*_paired(pairs), limits, seed)
            for name, highest in zip(pairs, bounds.highest.tolist(), strict=False):
                if highest < 0:
                    best[name] = challengers[name]
        for name, challenger in challengers.items():
            best.setdefault(name, challenger)
        return Best(Scores(scores.version, tuple(best.values())))

    def kept(self, names: Iterable[str]) -> Best:
        """Without the cohorts that were retired: those not among the names."""
        return Best(kept(self.reference, names))

    def as_arrays(self) -> dict[str, NDArray[Any]]:
        """For a file; see ``Scores.as_arrays``."""
        return self.reference.as_arrays()

    @staticmethod
    def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> Best:
        """What ``as_arrays`` made. ValueError for anything else."""
        return Best(Scores.from_arrays(arrays))


def judge(candidate: Scores, reference: Scores, limits: Limits, seed: int) -> Verdict:
    """Whether the candidate's rise over the reference (``Best.reference``) stays within the limits on every cohort.

    Also rejected: a loss, prediction or update that is not finite; a cohort of the reference that was not scored; no
    cohort to judge by at all, since nothing serves unmeasured. Cohorts without a reference, or with fewer than
    ``min_users`` users, do not judge alone. The same arguments give the same verdict.
    """
    scored, best = candidate.by_name(), reference.by_name()
    broken = [_unmeasured(c, "not finite", limits, best) for c in candidate.cohorts if not c.finite]
    broken += [
        Evidence(c.name, "not scored", 0, limits.limit, reference=c.version)
        for c in reference.cohorts
        if c.name not in scored
    ]
    sound = [c for c in candidate.cohorts if c.finite]
    pairs = {c.name: (c, best[c.name]) for c in sound if c.name in best and len(_common(c, best[c.name])[0])}
    evidence = [_unmeasured(c, "no reference", limits, best) for c in sound if c.name not in pairs]
    if pairs:
        total, weight = _paired(pairs)
        users = np.count_nonzero(weight, axis=0)
        alone = users >= limits.min_users
        alone[-1] = True
        bounds = bootstrap(total, weight, limits, seed, family=alone)
        references = [*((name, pair[1].version) for name, pair in pairs.items()), (ALL, None)]
        for k, (name, version) in enumerate(references):
            evidence.append(_measured(name, bounds, k, int(users[k]), limits, bool(alone[k]), version))
    elif not broken:
        return Verdict("anchors", "reject", "no cohort to judge by: make anchors before a round", tuple(evidence))
    return _verdict("anchors", (*broken, *evidence))


def judge_stream(
    rise: Double, events: NDArray[np.int64], limits: Limits, seed: int, stage: Stage = "shadow"
) -> Verdict:
    """The same rule on live events that the candidate and the serving version both predicted.

    rise (U,): of each user the candidate's log-loss minus the other's, summed over the user's events, nats; events
    (U,): how many, 1 or more. The mean is per event, the bootstrap over users. ``wait`` below ``min_users`` users, so
    ask once, when a stage has seen what it is to see: each look is another chance to be refused by luck.
    """
    if not np.isfinite(rise).all():
        broken = Evidence("stream", "not finite", len(rise), limits.limit)
        return _verdict(stage, (broken,))
    if len(rise) < limits.min_users:
        few = Evidence("stream", "few users", len(rise), limits.limit)
        return Verdict(stage, "wait", f"{len(rise)} users so far, {limits.min_users} are needed to judge", (few,))
    bounds = bootstrap(rise[:, None], events[:, None].astype(np.float64), limits, seed)
    return _verdict(stage, (_measured("stream", bounds, 0, len(rise), limits, True, None),))


class Bounds(NamedTuple):
    """Of the mean rise of C cohorts, nats; each at ``Limits.confidence``."""

    rise: Double
    """(C,) measured"""
    lowest: Double
    """(C,) below all true rises of the family together"""
    upper: Double
    """(C,) above this cohort's true rise"""
    highest: Double
    """(C,) above all true rises of the family together"""


def bootstrap(
    total: Double, weight: Double, limits: Limits, seed: int, family: NDArray[np.bool_] | None = None
) -> Bounds:
    """Bounds of Σ total / Σ weight over users, for C cohorts from the same draws of users.

    total, weight: (U, C), of each user in each cohort the summed rise and what it counts, 0 and 0 where the user is not
    in it. ``family`` (C,): the cohorts that the joint bounds are for; the others get theirs as if they were members.
    """
    users, cohorts = total.shape
    rise = total.sum(axis=0) / weight.sum(axis=0)
    drawn = np.concatenate([_drawn(total, weight, rise, part, limits, seed) for part in range(_parts(users, limits))])
    members = np.count_nonzero(weight, axis=0)
    small = np.sqrt(members / np.maximum(members - 1, 1))  # the bootstrap's spread is that of n, not n − 1
    error = drawn.std(axis=0) * small
    studentised = drawn / np.where(drawn.std(axis=0) > 0, drawn.std(axis=0), 1.0)
    judging = np.ones(cohorts, np.bool_) if family is None else family
    above = np.quantile(studentised[:, judging].max(axis=1), limits.confidence)
    below = np.quantile(studentised[:, judging].min(axis=1), 1 - limits.confidence)
    own = np.quantile(studentised, 1 - limits.confidence, axis=0)
    return Bounds(rise, rise - above * error, rise - own * error, rise - below * error)


def _parts(users: int, limits: Limits) -> int:
    return -(-limits.bootstrap_samples * users // _DRAWN_AT_ONCE)


def _drawn(total: Double, weight: Double, rise: Double, part: int, limits: Limits, seed: int) -> Double:
    """(S of this part, C) mean of drawn users minus that of all; 0 where none of a cohort was drawn."""
    users, parts = len(total), _parts(len(total), limits)
    samples = (limits.bootstrap_samples * (part + 1)) // parts - (limits.bootstrap_samples * part) // parts
    chosen = np.random.default_rng((seed, part)).integers(users, size=(samples, users))
    places = chosen + users * np.arange(samples)[:, None]
    counts = np.bincount(places.ravel(), minlength=samples * users).reshape(samples, users).astype(np.float64)
    weights = counts @ weight
    return np.where(weights > 0, counts @ total / np.where(weights > 0, weights, 1.0) - rise, 0.0)


def _common(one: CohortScores, other: CohortScores) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Places of the users that both have."""
    if np.array_equal(one.user, other.user):
        return np.arange(len(one.user)), np.arange(len(one.user))
    _, here, there = np.intersect1d(one.user, other.user, return_indices=True)
    return here, there


def _paired(pairs: Mapping[str, tuple[CohortScores, CohortScores]]) -> tuple[Double, Double]:
    """(U, C + 1) total and weight for ``bootstrap``: the cohorts, then ``ALL``. A user of several is one of the U."""
    places = {name: _common(*pair) for name, pair in pairs.items()}
    named = [pairs[name][0].user[here] for name, (here, _) in places.items()]
    users, code = np.unique(np.concatenate(named), return_inverse=True)
    total, weight, done = np.zeros((len(users), len(pairs) + 1)), np.zeros((len(users), len(pairs) + 1)), 0
    for k, (name, (here, there)) in enumerate(places.items()):
        rows = code.reshape(-1)[done : done + len(here)]
        np.add.at(total[:, k], rows, pairs[name][0].loss[0, here] - pairs[name][1].loss[0, there])
        np.add.at(weight[:, k], rows, 1.0)
        done += len(here)
    total[:, -1], weight[:, -1] = total.sum(axis=1), weight.sum(axis=1)
    return total, weight


def _unmeasured(cohort: CohortScores, finding: Finding, limits: Limits, best: Mapping[str, CohortScores]) -> Evidence:
    reference = best[cohort.name].version if cohort.name in best else None
    return Evidence(cohort.name, finding, len(cohort.user), limits.limit, reference=reference)


def _measured(
    cohort: str, bounds: Bounds, k: int, users: int, limits: Limits, alone: bool, reference: int | None
) -> Evidence:
    rises = bool(bounds.upper[k] > limits.limit and bounds.lowest[k] > 0)
    finding: Finding = "few users" if not alone else ("rises" if rises else "passes")
    rise, lowest, upper = (json_number(float(value[k])) for value in (bounds.rise, bounds.lowest, bounds.upper))
    return Evidence(cohort, finding, users, limits.limit, rise, lowest, upper, reference)


def _verdict(stage: Stage, evidence: tuple[Evidence, ...]) -> Verdict:
    against = [e for e in evidence if e.finding in ("not finite", "not scored", "rises")]
    if against:
        more = f", and {len(against) - 1} more" if len(against) > 1 else ""
        return Verdict(stage, "reject", against[0].sentence() + more, evidence)
    return Verdict(stage, "pass", evidence[-1].sentence(), evidence)


@dataclass(frozen=True, slots=True)
class Directive:
    """What the next round is to do; all that a rung adds, and what the rungs below it did."""

    rate_scale: float
    recent_scale: float
    """Of the share of recent users in a round; the others are a replay of all earlier ones"""
    distillation: float
    """Weight of staying near the last good version; 0: none"""
    frozen: bool
    """No round at all, and an alarm"""


@dataclass(frozen=True, slots=True)
class Ladder:
    """What repeated rejection leads to: 1 smaller rate, 2 more replay, 3 distillation, 4 frozen.

    Up after ``patience`` rejections in a row, down one rung after 2·``patience`` promotions in a row: caution is
    learned faster than it is lost. A frozen ladder makes no rounds; it goes back to rung 3 by ``thaw``, or by itself
    after 8·``patience`` rounds that were left out, because a poisoned stretch of a stream passes, and whoever reads
    the alarm may be asleep: one more rejected trial costs ``patience`` rounds, and no user anything.
    """

    patience: int = 3
    rung: int = 0
    rejections: int = 0
    """In a row, on this rung"""
    promotions: int = 0
    left_out: int = 0
    """Rounds since it froze"""

    def __post_init__(self) -> None:
        if self.patience < 1 or not 0 <= self.rung <= FROZEN:
            raise ValueError(f"{self}: patience is at least 1 (meta.gate.patience), and rungs are 0 to {FROZEN}")

    @property
    def directive(self) -> Directive:
        """For the next round."""
        return Directive(
            RATE_SCALE if self.rung >= 1 else 1.0,
            RECENT_SCALE if self.rung >= 2 else 1.0,
            DISTILLATION if self.rung >= 3 else 0.0,
            self.rung == FROZEN,
        )

    def after(self, promoted: bool) -> Ladder:
        """After a candidate was promoted or rejected. On a frozen ladder it was made before, and changes nothing."""
        if self.rung == FROZEN:
            return self
        if promoted:
            if self.rung > 0 and self.promotions + 1 >= 2 * self.patience:
                return Ladder(self.patience, self.rung - 1)
            return Ladder(self.patience, self.rung, promotions=self.promotions + 1)
        if self.rejections + 1 >= self.patience:
            return Ladder(self.patience, self.rung + 1)
        return Ladder(self.patience, self.rung, rejections=self.rejections + 1)

    def round_left_out(self) -> Ladder:
        """After a round was left out because the ladder is frozen; otherwise nothing changes."""
        if self.rung < FROZEN:
            return self
        waited = replace(self, left_out=self.left_out + 1)
        return waited.thaw() if waited.left_out >= FROZEN_PATIENCES * self.patience else waited

    def thaw(self) -> Ladder:
        """Back to rung 3 if it is frozen; otherwise nothing changes."""
        return Ladder(self.patience, FROZEN - 1) if self.rung == FROZEN else self

    def as_dict(self) -> dict[str, int]:
        """Ready for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Ladder:
        """What ``as_dict`` made. ValueError for anything else."""
        names = tuple(Ladder.__slots__)
        if set(found) != set(names) or not all(type(found[name]) is int and found[name] >= 0 for name in names):
            raise ValueError(f"a ladder is {', '.join(names)}, all whole numbers, but this is {dict(found)}")
        return Ladder(**found)
