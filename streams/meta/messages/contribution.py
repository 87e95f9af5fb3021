"""What a partition has to say of a span of its events: topic ``meta-gradients``, keyed by the partition.

A block (``packing``) of kind "contribution". Its arrays:

    dense.<parameter>   tables.<item table> (U, …)   item_events (U,)   items.text items.ends      the gradient's sum
    seen.text seen.ends seen_events                                                                the span's items
    rise.<k> events.<k>                                         k-th open version beside the one that serves
    scores.<k>.…   current.…   base.…                           ``Scores.as_arrays``, deflated

Item rows are named by the items' ids, once, since two programs may count their vocabularies differently. Only items
that the histories met are there, so the size hangs on those and not on the catalogue: some 0.5 kB each at 64
dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from learner.drift import DriftAlarm
from learner.forgetting import Scores
from learner.meta_update import GradientSum
from state.changelog import Record
from state.lineage import Span
from streams.meta.contributor import Findings, Rises
from streams.meta.messages.chunks import cut
from streams.meta.messages.packing import Array, MessageRefused, pack, pack_texts, unpack, unpack_texts

KIND = "contribution"
_GRADIENT = ("item_events", "seen_events")


@dataclass(frozen=True, slots=True)
class Contribution:
    """Of one partition, made after one marker of ``meta-versions``."""

    marker: int
    """That marker's sequence"""
    version: int
    """Its head: where the gradient was taken"""
    span: Span
    """Offsets: from the one after the last that was consumed to the last that is covered"""
    events: int
    """In the span"""
    gradient: GradientSum | None
    """None: nobody to learn from, or no version was asked for"""
    findings: tuple[Findings, ...] = ()
    """Of each open version at most one"""
    current: Scores | None = None
    """The version that serves, on the partition's anchors; None: it has none"""
    base: Scores | None = None
    """Version 0 on the same; given where the anchors are not those of the last contribution that was consumed"""
    drift: tuple[DriftAlarm, ...] = ()
    """Since then"""

    @property
    def partition(self) -> int:
        """Whose events they are."""
        return self.span.partition


def key_of(partition: int) -> bytes:
    """Of the records of a partition's contributions."""
    return str(partition).encode()


def records(contribution: Contribution) -> list[Record]:
    """What is to be sent, in order."""
    key = key_of(contribution.partition)
    return [Record(key, value) for value in cut(encode(contribution))]


def encode(contribution: Contribution) -> bytes:
    """As a block."""
    c, arrays = contribution, dict[str, Array]()
    gradient = None if c.gradient is None else _pack_gradient(c.gradient, arrays)
    findings = []
    for k, finding in enumerate(c.findings):
        arrays |= {f"rise.{k}": finding.stream.rise, f"events.{k}": finding.stream.events}
        findings.append({"version": finding.version, "scores": _pack_scores(finding.scores, f"scores.{k}", arrays)})
    content = {
        "partition": c.partition, "marker": c.marker, "version": c.version, "first": c.span.first, "last": c.span.last,
        "events": c.events, "gradient": gradient, "findings": findings,
        "current": _pack_scores(c.current, "current", arrays), "base": _pack_scores(c.base, "base", arrays),
        "drift": [alarm.as_dict() for alarm in c.drift],
    }  # fmt: skip
    deflated = {name for name in arrays if name.startswith(("scores.", "current.", "base."))}
    return pack(KIND, content, arrays, deflated)


def decode(block: bytes, key: bytes) -> Contribution:
    """Of a block whose records had this key. Raises MessageRefused, naming what is wrong."""
    what = f"the contribution of partition {key.decode(errors='replace')}"
    content, arrays = unpack(block, KIND, what)
    try:
        found = _decoded(content, arrays)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise MessageRefused("shape", f"{what} does not hold what it should: {error!r}") from None
    if key_of(found.partition) != key:
        raise MessageRefused("shape", f"{what} says that it is of partition {found.partition}")
    return found


def _decoded(content: Mapping[str, Any], arrays: Mapping[str, Array]) -> Contribution:
    span = Span(int(content["partition"]), int(content["first"]), int(content["last"]))
    if span.partition < 0 or not -1 < span.first <= span.last or content["events"] < 1:
        raise ValueError(f"{content['events']} events in {span}")
    version, named = int(content["version"]), [int(f["version"]) for f in content["findings"]]
    if len(set(named)) < len(named):
        raise ValueError(f"findings of versions {named}: one of each")
    findings = tuple(
        Findings(named[k], _scores(f["scores"], f"scores.{k}", arrays, named[k]), _rises(arrays, k))
        for k, f in enumerate(content["findings"])
    )
    return Contribution(
        int(content["marker"]), version, span, int(content["events"]),
        None if content["gradient"] is None else _gradient(content["gradient"], version, arrays), findings,
        _scores(content["current"], "current", arrays), _scores(content["base"], "base", arrays, 0),
        tuple(DriftAlarm(**alarm) for alarm in content["drift"]),
    )  # fmt: skip


# --- parts ----------------------------------------------------------------------------------------------------


def _pack_gradient(gradient: GradientSum, arrays: dict[str, Array]) -> dict[str, Any]:
    arrays |= {f"dense.{name}": array for name, array in gradient.dense.items()}
    arrays |= {f"tables.{name}": array for name, array in gradient.tables.items()}
    arrays |= pack_texts(gradient.item_ids, "items") | pack_texts(list(gradient.seen), "seen")
    arrays["item_events"] = gradient.item_events
    arrays["seen_events"] = np.fromiter(gradient.seen.values(), np.int64, len(gradient.seen))
    return {
        "users": gradient.users, "events": gradient.events, "log_loss": repr(float(gradient.log_loss)),
        "new_items": [[item, raw] for item, raw in gradient.new_items.items()],
    }  # fmt: skip


def _gradient(content: Mapping[str, Any], version: int, arrays: Mapping[str, Array]) -> GradientSum:
    parts: dict[str, dict[str, Any]] = {"dense": {}, "tables": {}}
    for name, array in arrays.items():
        part, _, parameter = name.partition(".")
        if part in parts:
            parts[part][parameter] = _of_type(array, name, "<f4")
    item_events, seen_events = (_of_type(arrays[name], name, "<i8") for name in _GRADIENT)
    seen = unpack_texts(arrays, "seen")
    if (seen_events < 1).any():
        raise ValueError("an item was seen in the span without an event")
    new_items = {str(item): None if raw is None else tuple(raw) for item, raw in content["new_items"]}
    if not all(text is None or type(text) is str for raw in new_items.values() for text in raw or ()):
        raise ValueError("the features of a new item are no texts")
    return GradientSum(
        version, int(content["users"]), int(content["events"]), float(content["log_loss"]), parts["dense"],
        unpack_texts(arrays, "items"), parts["tables"], item_events,
        dict(zip(seen, seen_events.tolist(), strict=True)), new_items,
    )  # fmt: skip


def _of_type(array: Array, name: str, wanted: str) -> Array:
    if array.dtype.str != wanted:
        raise ValueError(f"{name} is {array.dtype}, not {wanted}")
    return array


def _pack_scores(scores: Scores | None, name: str, arrays: dict[str, Array]) -> bool:
    if scores is not None:
        arrays |= {f"{name}.{part}": array for part, array in scores.as_arrays().items()}
    return scores is not None


def _scores(there: bool, name: str, arrays: Mapping[str, Array], version: int | None = None) -> Scores | None:
    """``version``: that they must be of. Others' are added to them, so they must be what they say."""
    if not there:
        return None
    prefix = f"{name}."
    scores = Scores.from_arrays({n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)})
    if version is not None and scores.version != version:
        raise ValueError(f"{name} is of version {scores.version}, not {version}")
    for cohort in scores.cohorts:
        if cohort.version != scores.version or cohort.name != f"slice {cohort.column.slice} / {cohort.column.kind}":
            raise ValueError(f"{name} has the scores of version {cohort.version} on {cohort.name!a}")
    if len(scores.by_name()) < len(scores.cohorts):
        raise ValueError(f"{name} has a cohort twice")
    return scores


def _rises(arrays: Mapping[str, Array], k: int) -> Rises:
    rise, events = _of_type(arrays[f"rise.{k}"], "rise", "<f8"), _of_type(arrays[f"events.{k}"], "events", "<i8")
    if rise.shape != events.shape or rise.ndim != 1 or (events < 1).any():
        raise ValueError(f"rises of shape {rise.shape} over events of shape {events.shape}")
    return Rises(rise, events)
