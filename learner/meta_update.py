"""The online stage, pure: gradient sums over users' histories, and the step that makes the next version of them.

The loss is that of the offline stage: every event of a user's history predicted before its label is used, with full
gradients through the adaptive updates. Whoever has histories sums gradients at one version (``gradient_sum``); whoever
has all sums adds them up and takes one step of Adam (``take_step``), to which the items' prior belongs, since
it is nobody's event. An item's rows move only in a step whose users met it (lazy Adam), and its KL is spread over its
events: a step over n of the N events it ever had carries n/N of it. So a step's cost, and the size of what is
sent, hang on the items met and not on the catalogue.

After *Learning to Recommend via Meta Parameter Partition* (arXiv 1912.04108), the online stage; Kingma & Ba 2015
(arXiv 1412.6980). Symbols: U distinct items of the histories, B users, T events, D the item embedding's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from configs.exceptions import ColdstreamError
from learner.filters import Float
from learner.histories import Histories
from learner.meta_model import MetaModel, Undo
from learner.recommender import ITEM_TABLES, PackedSequences, Recommender, padded
from learner.scan import scan_threads
from learner.serving import RawFeatures

Moves = Literal["initialization", "biases", "everything"]

LOSS_SCALE = 100.0
"""Events a user counts for in the loss, as in the offline stage, so that the clip norm means the same"""
BETA_1, BETA_2 = 0.9, 0.99
"""Adam's. A shorter memory of the second moment than offline: rounds are few"""
EPSILON = 1e-8
UNSETTLED_SHARE = 0.02
"""Share of new events in all events so far, below which the rate falls in proportion: 1/N, as of a running mean. Chosen
inside ML-1M's offline users, where the online stage then gained .0175 AUC from a seventh of them, and .0004 from seven
tenths; at a constant rate .0172 and −.0001"""
WARM_UP_STEPS = 10
"""Until which the rate rises: Adam's first steps have full length in every direction, whatever the gradient says"""
_START = ("head.", "second.", "user_factors", "user_projection", "log_weight", "second_log_weight", "grade_log_weight")
"""What the names of the initialization begin with: φ_0, S_0, W, κ, r, q of both filters"""
_BIASES = ("item_bias", "prior_bias_log_scale")
_FILTERS = ("head.", "second.", "prior_", "grade_", "log_weight", "second_log_weight")
"""Move at twice the rate and without decay, as in the offline stage"""
_MAY_LACK = ("prior_", "ordinal_", "user_", "item_feature_weights")
"""Have no gradient where there are no grades or features, or where the KL alone moves them"""


class GradientRefused(ColdstreamError):
    """A gradient sum that cannot be used. ``reason`` is one of the few words that are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class GradientSum:
    """Σ over users of the gradient of their log-loss at one version. Arrays are float32."""

    version: int
    """Where it was taken"""
    users: int
    events: int
    log_loss: float
    """Σ over the events, in nats"""
    dense: Mapping[str, Float]
    """By parameter that is no item table"""
    item_ids: tuple[str, ...]
    """(U,)"""
    tables: Mapping[str, Float]
    """By item table, (U, …)"""
    item_events: NDArray[np.int64]
    """(U,) events of the histories that each item has"""
    seen: Mapping[str, int] = field(default_factory=dict)
    """Events of the span itself by item: what is new since the last round"""
    new_items: Mapping[str, RawFeatures | None] = field(default_factory=dict)
    """Items outside the version's vocabulary, with their raw features"""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What a step did."""

    undo: Undo
    length: float
    """L2 norm of the change of all parameters"""
    gradient_norm: float
    """Before it was clipped"""


def moves_with(name: str, moves: Moves) -> bool:
    """Whether a parameter moves under the setting."""
    if moves == "everything":
        return True
    return name.startswith(_START) or (moves == "biases" and name.startswith(_BIASES))


def gradient_sum(
    model: MetaModel,
    version: int,
    histories: Histories,
    moves: Moves,
    *,
    seed: Sequence[int],
    ordinal: float = 0.0,
    teacher: Float | None = None,
    distillation: float = 0.0,
    seen: Mapping[str, int] | None = None,
    new_items: Mapping[str, RawFeatures | None] | None = None,
    threads: int | None = 1,
) -> GradientSum:
    """The sum over all users of ``histories``; the model stays as it is, but grows by ``new_items``.

    ``seed``: the same gives the same bits. ``teacher`` (T,): logits of the last good version at each event, towards
    which ``distillation`` draws. Items that the vocabulary does not have count as unknown ones. ``threads`` change no
    bit; None takes every core.
    """
    model.grow(new_items or {})
    rows = model.rows_of(histories.item)
    known, place = np.unique(rows[rows >= 0], return_inverse=True)
    position = np.full(len(rows), len(known))
    position[rows >= 0] = place
    batch = _packed(histories, position, len(model.recommender.spec.grades), model.graded)
    with scan_threads(threads), torch.random.fork_rng(devices=[]):
        part, tables = _with_unknown(model.recommender, torch.from_numpy(known))
        wanted = {**{n: p for n, p in model.parameters.items() if n not in ITEM_TABLES}, **tables}
        wanted = {name: parameter for name, parameter in wanted.items() if moves_with(name, moves)}
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0] >> np.uint64(1)))
        part.train()
        unrolled = part(batch)
        log_loss = F.binary_cross_entropy_with_logits(unrolled.logit, batch.label, reduction="sum")
        loss = log_loss
        if ordinal > 0 and model.graded and hasattr(part, "ordinal_slope"):
            loss = loss + ordinal * part.ordinal_loss(batch, unrolled, _redundant(model))
        if teacher is not None and distillation > 0:
            aim = torch.sigmoid(torch.from_numpy(teacher))
            loss = loss + distillation * F.binary_cross_entropy_with_logits(unrolled.logit, aim, reduction="sum")
        gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    found = {n: p if g is None else g for (n, p), g in zip(wanted.items(), gradients, strict=True) if g is not None}
    return GradientSum(
        version, len(histories), histories.events, float(log_loss.detach()),
        {name: g.numpy() for name, g in found.items() if name not in ITEM_TABLES},
        tuple(model.item_ids[row] for row in known.tolist()),
        {name: g.numpy()[: len(known)] for name, g in found.items() if name in ITEM_TABLES},
        np.bincount(place, minlength=len(known)).astype(np.int64),
        dict(seen or {}), dict(new_items or {}),
    )  # fmt: skip


def add(parts: Sequence[GradientSum]) -> GradientSum:
    """The sum of sums of one version, in the order given. ValueError for none, or for several versions.

    What one of them has no gradient of (no user had a grade, say) counts as zero there.
    """
    if len({part.version for part in parts}) != 1:
        raise ValueError(f"sums of versions {sorted({part.version for part in parts})} cannot be added")
    if len(parts) == 1:
        return parts[0]
    places: dict[str, int] = {}
    for part in parts:
        for item in part.item_ids:
            places.setdefault(item, len(places))
    index = [np.fromiter(map(places.__getitem__, part.item_ids), np.int64, len(part.item_ids)) for part in parts]
    seen: dict[str, int] = {}
    for part in parts:
        for item, count in part.seen.items():
            seen[item] = seen.get(item, 0) + count
    events = np.zeros(len(places), np.int64)
    for part, at in zip(parts, index, strict=True):
        events[at] += part.item_events
    return GradientSum(
        parts[0].version, sum(p.users for p in parts), sum(p.events for p in parts), sum(p.log_loss for p in parts),
        {name: _sum_of([p.dense[name] for p in parts if name in p.dense]) for name in _named(p.dense for p in parts)},
        tuple(places),
        {name: _spread(name, parts, index, len(places)) for name in _named(p.tables for p in parts)},
        events, seen, {item: raw for p in parts for item, raw in p.new_items.items()},
    )  # fmt: skip


def check(gradient: GradientSum, model: MetaModel, version: int, moves: Moves) -> None:
    """Raises GradientRefused, naming what is wrong, for a sum that would not fit or would do damage."""
    if gradient.version != version:
        raise GradientRefused(
            "version", f"the gradient is of version {gradient.version}, and the round is over version {version}"
        )
    _check_shapes(gradient, model, moves)
    rows = (len(gradient.item_ids),)
    if gradient.users < 1 or gradient.item_events.shape != rows or (gradient.item_events < 1).any():
        raise GradientRefused("counts", f"the gradient counts {gradient.users} users and {gradient.item_events} events")
    if min(gradient.seen.values(), default=1) < 1:
        raise GradientRefused("counts", f"the gradient counts {min(gradient.seen.values())} new events of an item")
    if len(set(gradient.item_ids)) < len(gradient.item_ids):
        raise GradientRefused("items", "the gradient names an item twice")
    unknown = [item for item in gradient.item_ids if item not in gradient.new_items and model.rows_named([item])[0] < 0]
    if unknown:
        raise GradientRefused("items", f"the gradient names {unknown[0]!r}, which no vocabulary has")


def _check_shapes(gradient: GradientSum, model: MetaModel, moves: Moves) -> None:
    shapes = {
        name: (len(gradient.item_ids), *p.shape[1:]) if name in ITEM_TABLES else tuple(p.shape)
        for name, p in model.parameters.items()
        if moves_with(name, moves)
    }
    given = {**gradient.dense, **gradient.tables}
    for name, array in given.items():
        if name not in shapes or array.shape != shapes[name]:
            raise GradientRefused(
                "shape", f"the gradient of {name} is {array.shape}, and {shapes.get(name, 'nothing')} is wanted"
            )
        if not np.isfinite(array).all():
            raise GradientRefused("not finite", f"the gradient of {name} is not finite")
    for name, shape in shapes.items():
        if name not in given and not name.startswith(_MAY_LACK):
            raise GradientRefused("shape", f"the gradient has no {name}, and {shape} is wanted")
    if not np.isfinite(gradient.log_loss):
        raise GradientRefused("not finite", "the log-loss is not finite")


def take_step(model: MetaModel, gradient: GradientSum, moves: Moves, *, rate: float, kl_weight: float) -> StepReport:
    """One step of Adam, in place, with the items' prior and the counts of the span's events.

    The gradient is one that ``check`` passed. ``undo`` takes it back.
    """
    with scan_threads(1):
        return _stepped(model, gradient, moves, rate, kl_weight)


def _stepped(model: MetaModel, gradient: GradientSum, moves: Moves, rate: float, kl_weight: float) -> StepReport:
    model.grow({**dict.fromkeys(gradient.seen), **gradient.new_items})
    rows = model.rows_named(gradient.item_ids)
    counted = model.rows_named(list(gradient.seen))
    undo = _before(model, moves, rows)
    np.add.at(model.item_events, counted, np.fromiter(gradient.seen.values(), np.int64, len(counted)))
    grown = {**gradient.dense, **gradient.tables}
    sums = {name: torch.from_numpy(array.copy()) for name, array in grown.items()}
    if kl_weight > 0:
        share = gradient.item_events / np.maximum(model.item_events[rows], gradient.item_events)
        _add_prior(model, sums, torch.from_numpy(rows), torch.from_numpy((kl_weight * share).astype(np.float32)))
    scale = 1 / (gradient.users * LOSS_SCALE)
    norm = scale * math.sqrt(sum(float((g.double() ** 2).sum()) for g in sums.values()))
    scale *= min(1.0, model.training.clip_norm / (norm + 1e-6))
    model.steps += 1
    model.item_steps[rows] += 1
    rate *= min(1.0, model.steps / WARM_UP_STEPS) * min(1.0, _new_share(model, gradient) / UNSETTLED_SHARE)
    with torch.no_grad():
        length = sum(_move(model, name, g * scale, rows, rate) for name, g in sums.items())
    return StepReport(undo, float(np.sqrt(length)), norm)


def take_back(model: MetaModel, undo: Undo) -> None:
    """The step is undone, to the bit; the vocabulary stays as it has grown. Steps are undone in reverse order."""
    rows = torch.from_numpy(undo.rows)
    with scan_threads(1), torch.no_grad():
        for name, saved in undo.tensors.items():
            for target, value in zip((model.parameters[name], *model.moments[name]), saved, strict=True):
                if name in ITEM_TABLES:
                    target[rows] = value
                else:
                    target.copy_(value)
    held = len(undo.item_events)
    model.item_events[:held], model.item_events[held:] = undo.item_events, 0
    model.item_steps[:held], model.item_steps[held:] = undo.item_steps, 0
    model.steps = undo.steps


def _new_share(model: MetaModel, gradient: GradientSum) -> float:
    """Events since the last round as a share of all events so far, whose counts the model has; 1 before any."""
    total = int(model.item_events.sum())
    return sum(gradient.seen.values()) / total if total else 1.0


# --- parts ----------------------------------------------------------------------------------------------------


def _with_unknown(recommender: Recommender, rows: Tensor) -> tuple[Recommender, dict[str, Tensor]]:
    """The model over these rows, and after them one of an unknown item, all zero; and the tables that it has."""
    part = recommender.restricted(torch.cat([rows, rows.new_zeros(1)]))
    tables: dict[str, Tensor] = {
        name: p for name, p in part._parameters.items() if name in ITEM_TABLES and p is not None
    }
    with torch.no_grad():
        for name, table in tables.items():
            table[-1] = -torch.inf if "log_sigma" in name else 0.0
        for name in ("item_features", "item_weights"):
            if (buffer := part._buffers.get(name)) is not None:
                buffer[-1] = 0.0
    return part, tables


def _packed(histories: Histories, position: NDArray[np.int64], grades: int, graded: bool) -> PackedSequences:
    lengths = histories.lengths
    number = np.arange(histories.events) - np.repeat(histories.starts[:-1] - histories.first, lengths)
    grade = np.minimum(histories.grade, grades) if graded else np.full(histories.events, grades)
    columns, weights = padded(histories.features)
    return PackedSequences(
        torch.from_numpy(histories.starts), torch.from_numpy(position),
        torch.from_numpy(histories.label.astype(np.float32)), torch.from_numpy(grade.astype(np.int64)),
        torch.from_numpy(number.astype(np.float32)), columns, weights,
    )  # fmt: skip


def _redundant(model: MetaModel) -> Tensor:
    return torch.from_numpy(np.diff(np.asarray(model.recommender.spec.like_rate)) == 1.0)


def _sum_of(arrays: Sequence[Float]) -> Float:
    total = arrays[0].copy()
    for array in arrays[1:]:
        total += array
    return total


def _spread(name: str, parts: Sequence[GradientSum], index: Sequence[NDArray[np.int64]], count: int) -> Float:
    found = [(part.tables[name], at) for part, at in zip(parts, index, strict=True) if name in part.tables]
    total = np.zeros((count, *found[0][0].shape[1:]), np.float32)
    for array, at in found:
        total[at] += array
    return total


def _named(parts: Iterable[Mapping[str, Float]]) -> dict[str, None]:
    """All names, in the order in which they come."""
    return dict.fromkeys(name for part in parts for name in part)


def _before(model: MetaModel, moves: Moves, rows: NDArray[np.int64]) -> Undo:
    at = torch.from_numpy(rows)
    saved: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, parameter in model.parameters.items():
        if moves_with(name, moves):
            held = (parameter.detach(), *model.moments[name])
            value, first, second = (t[at] if name in ITEM_TABLES else t.clone() for t in held)
            saved[name] = value, first, second
    return Undo(saved, rows, model.item_events.copy(), model.item_steps.copy(), model.steps)


def _add_prior(model: MetaModel, sums: dict[str, Tensor], rows: Tensor, share: Tensor) -> None:
    """Adds the gradient of Σ_rows share·KL(posterior ‖ prior), in closed form, to what moves."""
    held = {name: p.detach() for name, p in model.parameters.items()}
    for table, scale_name in (("item_embedding", "prior_log_scale"), ("item_bias", "prior_bias_log_scale")):
        if table not in sums:
            continue
        weight = share.unsqueeze(1) if held[table].dim() > 1 else share
        precision = torch.exp(-2 * held[scale_name])
        mean = held[table][rows]
        variance = torch.exp(2 * held[f"{table}_log_sigma"][rows])
        sums[table] += weight * mean * precision
        sums[f"{table}_log_sigma"] += weight * (variance * precision - 1)
        slope = (weight * (1 - (variance + mean * mean) * precision)).sum(0)
        sums[scale_name] = sums.get(scale_name, torch.zeros_like(held[scale_name])) + slope
    if "ordinal_item" in sums:
        sums["ordinal_item"] += share.unsqueeze(1) * 4 * held["ordinal_item"][rows]


def _move(model: MetaModel, name: str, gradient: Tensor, rows: NDArray[np.int64], rate: float) -> float:
    """Adam on one parameter, of the rows alone where it is an item table; the squared length of its change."""
    parameter, (first, second) = model.parameters[name], model.moments[name]
    if name in ITEM_TABLES:
        at = torch.from_numpy(rows)
        steps = torch.from_numpy(model.item_steps[rows]).float().view(-1, *[1] * (parameter.dim() - 1))
        m, v, decay = first[at], second[at], 0.0
    else:
        steps, m, v = torch.tensor(float(model.steps)), first, second
        decay = 0.0 if name.startswith(_FILTERS) else model.training.weight_decay
    rate = 2 * rate if name.startswith(_FILTERS) else rate
    m = BETA_1 * m + (1 - BETA_1) * gradient
    v = BETA_2 * v + (1 - BETA_2) * gradient * gradient
    step = rate * (m / (1 - BETA_1**steps)) / (torch.sqrt(v / (1 - BETA_2**steps)) + EPSILON)
    if name in ITEM_TABLES:
        parameter[at] = parameter[at] - step
        first[at], second[at] = m, v
    else:
        step = step + rate * decay * parameter
        parameter.sub_(step)
        first.copy_(m)
        second.copy_(v)
    return float((step.double() ** 2).sum())
