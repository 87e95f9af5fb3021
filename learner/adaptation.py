"""Exact per-event adaptation: predict, then learn, one event after the other.

Order inside a user is sacred: an event's prediction knows every earlier event of its user and nothing of its own
label. The equations are those of ``learner.serving.FirstFilter`` and ``SecondFilter``; the second filter takes the
first one's logit z as a feature, [1, z/2, second_psi], and predicts last. All arithmetic is float32 in a fixed
order without reassociation, and an event reads its user's row and its item alone: the bits of rows and predictions
do not depend on how the stream is cut into batches.

Guard: the predicted variance v is never below 0. If anything of an event's prediction or update is not finite, or
larger than ``learner.kernel.LIMIT``, the row keeps its parameters, the prediction is the item's base rate b (0 if
that is not finite either), and the event is counted in the row's ``guarded``; it still enters ledger, ring and
offset, so that a replay agrees.

Symbols: N events, n rows, I items of the batch, d and e widths of the filters, G grades.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from learner import kernel
from learner.serving import FirstFilter, ItemTable, SecondFilter
from learner.user_state import RowLayout, Slab

_KIND = {"full": kernel.FULL, "diagonal": kernel.DIAGONAL, "gradient": kernel.GRADIENT}
_NOTHING = np.zeros(0, np.float32)
_Outputs = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]
"""logit, probability, applied"""


@dataclass(frozen=True, slots=True)
class EventColumns:
    """N events as the kernel takes them, in stream order."""

    slot: NDArray[np.int32]
    """(N,) the user's row in the slab"""
    item: NDArray[np.int32]
    """(N,) index into ``item_row`` and ``item_hash``"""
    label: NDArray[np.int8]
    """(N,) 0 or 1"""
    grade: NDArray[np.int32]
    """(N,) 0 … G − 1, G for none"""
    event_time_ms: NDArray[np.int64]
    """(N,)"""
    offset: NDArray[np.int64]
    """(N,) rising within a user; 0 or more"""
    item_row: NDArray[np.int64]
    """(I,) row of the item table"""
    item_hash: NDArray[np.uint64]
    """(I,) ``learner.user_state.item_hash`` of the item's id"""

    def __len__(self) -> int:
        return len(self.slot)


_NO_EVENTS = EventColumns(
    np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.int8), np.zeros(0, np.int32), np.zeros(0, np.int64),
    np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint64),
)  # fmt: skip


class Adapted(NamedTuple):
    """What the walk returns, in the order of the events."""

    logit: NDArray[np.float32]
    """(N,) before the event's label was used; NaN where the event was skipped"""
    probability: NDArray[np.float32]
    """(N,) σ(logit)"""
    applied: NDArray[np.bool_]
    """(N,) False where the row had applied the offset already"""
    guarded: int
    """events whose update was refused"""


class Adaptation:
    """The kernel bound to one model's filters. Holds no state of users; safe to use from several threads.

    Making it compiles the kernel for the model's widths (some 10 s), or loads it from numba's cache on disk (0.5 s),
    so that no event waits for it. ValueError if the layout is not the model's, or a constant is not finite.
    """

    def __init__(self, layout: RowLayout, first: FirstFilter, second: SecondFilter | None) -> None:
        wanted = RowLayout.of(first, second, layout.ring)
        if wanted != layout:
            raise ValueError(f"the rows are {layout.fingerprint}, but the model needs {wanted.fingerprint}")
        self.layout = layout
        self._constants = _constants(layout, first, second)
        kernel.compile_walk(*_arguments(_NO_EVENTS, _no_items(layout), np.zeros((0, layout.row_bytes), np.uint8),
                                 self._constants, True, _outputs(0)))  # fmt: skip

    def learn(self, slab: Slab, events: EventColumns, items: ItemTable) -> Adapted:
        """Predicts every event, then lets its user's row learn it, in place; ``slab`` is (n, row_bytes)."""
        return self._run(slab, events, items, True)

    def predict(self, slab: Slab, events: EventColumns, items: ItemTable) -> Adapted:
        """Predicts every event from its row as it stands; nothing is learned, skipped or written."""
        return self._run(slab, events, items, False)

    def _run(self, slab: Slab, events: EventColumns, items: ItemTable, learn: bool) -> Adapted:
        _check(slab, events, items, self.layout, len(self._constants.first.target) - 1)
        outputs = _outputs(len(events))
        guarded = kernel.walk(*_arguments(events, items, slab, self._constants, learn, outputs))
        return Adapted(*outputs, guarded)


def _no_items(layout: RowLayout) -> ItemTable:
    second = np.zeros((0, max(layout.second_dim - 2, 0)), np.float32)
    return ItemTable(np.zeros((0, layout.dim), np.float32), _NOTHING, second)


def _constants(layout: RowLayout, first: FirstFilter, second: SecondFilter | None) -> kernel.Constants:
    if second is None:
        second = SecondFilter(_NOTHING, _NOTHING, 0.0, _NOTHING, 0.0)
    kernel_first = kernel.First(
        _KIND[first.kind], (0,) * first.dim, np.float32(first.kappa), _read_only(first.drift, np.float32),
        _read_only(first.rate, np.float32), float(first.tau), float(first.alpha),
        _read_only(first.target, np.float32), _read_only(first.weight, np.float32),
    )  # fmt: skip
    kernel_second = kernel.Second(
        (0,) * second.dim, kernel.FIRST_WORD + first.dim + layout.covariance_width, np.float32(second.kappa),
        _read_only(second.drift, np.float32), np.float32(second.weight),
    )  # fmt: skip
    for name, value in (*kernel_first._asdict().items(), *kernel_second._asdict().items()):
        if not np.isfinite(value).all():
            raise ValueError(f"the model's {name} is not finite: it cannot serve; train it again")
    return kernel.Constants(kernel_first, kernel_second, layout.row_bytes // 8 - layout.ring, layout.ring)


def _arguments(
    events: EventColumns, items: ItemTable, slab: Slab, constants: kernel.Constants, learn: bool, outputs: _Outputs
) -> tuple[Any, ...]:
    """What ``walk`` takes. Inputs go in read-only, whatever they are: numba compiles the two kinds apart."""
    columns = kernel.Columns(
        _read_only(events.slot, np.int32), _read_only(events.item, np.int32), _read_only(events.label, np.int8),
        _read_only(events.grade, np.int32), _read_only(events.event_time_ms, np.int64),
        _read_only(events.offset, np.int64), _read_only(events.item_row, np.int64),
        _read_only(events.item_hash, np.uint64),
    )  # fmt: skip
    table = kernel.Items(*(_read_only(a, np.float32) for a in (items.psi, items.base, items.second_psi)))
    return slab.view(np.float32), slab.view(np.int64), columns, table, constants, learn, *outputs


def _outputs(n: int) -> _Outputs:
    return np.empty(n, np.float32), np.empty(n, np.float32), np.zeros(n, np.bool_)


def _read_only(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array as C-contiguous, read-only ``dtype``: numba compiles writable and read-only arrays apart."""
    view = np.ascontiguousarray(array, dtype).view()
    view.flags.writeable = False
    return view


def _check(slab: Slab, events: EventColumns, items: ItemTable, layout: RowLayout, grades: int) -> None:
    """The kernel checks no bounds, so indices are checked here. ValueError says which one is out of range."""
    if slab.ndim != 2 or slab.shape[1] != layout.row_bytes or not slab.flags.c_contiguous:
        raise ValueError(f"a slab is C-contiguous (n, {layout.row_bytes}), got {slab.shape}")
    if not slab.flags.writeable:
        raise ValueError("the slab is read-only, and the kernel writes past that flag: copy it first")
    if items.psi.shape[1] != layout.dim or items.second_psi.shape[1] != max(layout.second_dim - 2, 0):
        raise ValueError(f"the item table does not fit {layout.fingerprint}")
    for name, index, bound in (
        ("slot", events.slot, len(slab)),
        ("item", events.item, len(events.item_row)),
        ("item_row", events.item_row, len(items.base)),
        ("grade", events.grade, grades + 1),
    ):
        if len(index) and not (index.min() >= 0 and index.max() < bound):
            raise ValueError(f"{name} is outside 0 … {bound - 1}")
    if {len(column) for column in (events.item, events.label, events.grade, events.event_time_ms, events.offset)} != {
        len(events)
    } or len(events.item_hash) != len(events.item_row):
        raise ValueError("event columns differ in length")
