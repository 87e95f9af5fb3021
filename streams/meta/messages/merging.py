"""What contributions of several partitions say together. Pure; always in the order of the partitions.

Symbols: B users of a cohort.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import numpy as np

from learner.forgetting import CohortScores, Scores
from learner.meta_update import GradientSum
from state.lineage import Span
from streams.meta.contributor import Findings
from streams.meta.messages.contribution import Contribution


@dataclass(frozen=True, slots=True)
class Merged:
    """Of one round."""

    spans: tuple[Span, ...]
    events: int
    gradients: tuple[GradientSum, ...]
    findings: tuple[Findings, ...]
    current: Scores | None
    """The version that serves, on the anchors of all partitions that have some"""
    base: Scores | None
    """Version 0 on those that are new; None: none are"""


def merged(contributions: Iterable[Contribution]) -> Merged:
    """They are made after the same marker, one of each partition."""
    parts = sorted(contributions, key=lambda each: each.partition)
    findings: dict[int, Findings] = {}
    for found in (finding for part in parts for finding in part.findings):
        held = findings.get(found.version)
        findings[found.version] = found if held is None else _both(held, found)
    return Merged(
        tuple(part.span for part in parts), sum(part.events for part in parts),
        tuple(part.gradient for part in parts if part.gradient is not None), tuple(findings.values()),
        _total([part.current for part in parts]), _total([part.base for part in parts]),
    )  # fmt: skip


def filled(gradients: Sequence[GradientSum]) -> list[GradientSum]:
    """With zeros for parameters that others have a gradient of: a partition may have met none of their events."""
    dense = {name: array.shape for g in gradients for name, array in g.dense.items()}
    tables = {name: array.shape[1:] for g in gradients for name, array in g.tables.items()}
    return [
        replace(
            g,
            dense={n: g.dense[n] if n in g.dense else np.zeros(shape, np.float32) for n, shape in dense.items()},
            tables={
                n: g.tables[n] if n in g.tables else np.zeros((len(g.item_ids), *shape), np.float32)
                for n, shape in tables.items()
            },
        )
        for g in gradients
    ]


def widened(reference: Scores, current: Scores) -> Scores:
    """The reference, and users of ``current`` whom it lacks: the version that serves is the first that they can be
    compared with. Losses are joined; AUC and counts stay the reference's, since no bound is made of them."""
    found = reference.by_name()
    for cohort in current.cohorts:
        if cohort.finite and len(cohort.user):
            found[cohort.name] = _joined(found[cohort.name], cohort) if cohort.name in found else cohort
    return replace(reference, cohorts=tuple(found.values()))


def _joined(held: CohortScores, cohort: CohortScores) -> CohortScores:
    new = np.flatnonzero(~np.isin(cohort.user, held.user))
    if not len(new):
        return held
    user = np.concatenate([held.user, cohort.user[new]])
    order = np.argsort(user, kind="stable")
    return replace(
        held, user=user[order], loss=np.concatenate([held.loss, cohort.loss[:, new]], axis=1)[:, order],
        events=np.concatenate([held.events, cohort.events[new]])[order],
    )  # fmt: skip


def _both(one: Findings, other: Findings) -> Findings:
    return Findings(one.version, _total([one.scores, other.scores]), one.stream + other.stream)


def _total(parts: Sequence[Scores | None]) -> Scores | None:
    there = [part for part in parts if part is not None]
    return reduce(add, there) if there else None
