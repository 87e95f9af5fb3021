"""How many events the kernel alone predicts and learns in a second on one core, ledger and ring included.

    python -m benchmarks.kernel [--case full] [--json]

d = 16, ring of 32; the events of 1,800 users on 4,000 items come in random order, so rows and items are fetched
from the caches as on a stream. No files, no store, no decoding. The best of five runs counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import get_args

import numpy as np

from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from learner.adaptation import Adaptation, EventColumns
from learner.serving import FirstFilter, ItemTable, SecondFilter
from learner.user_state import HeadKind, RowLayout, Slab, new_rows, packed_width

EVENTS = 1_000_000
USERS = 1_800
ITEMS = 4_000
DIM = 16
SECOND_DIM = 8
RING = 32
REPEATS = 5
TARGET_EVENTS_PER_SECOND = 3e6
"""For the full covariance without the second filter."""


def run(options: Options) -> Iterator[Figure]:
    """Events per second of every kind of first filter, without and with the second."""
    for kind in get_args(HeadKind):
        for second in (False, True):
            case = f"{kind}, second filter" if second else kind
            if options.wants(case):
                target = TARGET_EVENTS_PER_SECOND if case == "full" else None
                rate = events_per_second(kind, second, options.scaled(EVENTS))
                yield Figure(case, "speed", (rate,), "events/s", options.target(target))


def events_per_second(kind: HeadKind, second: bool, events: int, repeats: int = REPEATS) -> float:
    """The best of some runs of ``Adaptation.learn``, each over new users."""
    rng = np.random.default_rng(0)
    first_filter, second_filter = filters(kind, second)
    layout = RowLayout.of(first_filter, second_filter, RING)
    adaptation = Adaptation(layout, first_filter, second_filter)
    items = _items(rng, layout)
    columns = _events(rng, events)
    users = new_rows(layout, first_filter, second_filter, np.zeros((USERS, DIM), np.float32), 1)
    return events / min(_seconds(adaptation, users.copy(), columns, items) for _ in range(repeats))


def filters(kind: HeadKind, second: bool) -> tuple[FirstFilter, SecondFilter | None]:
    """Constants of the size that training finds."""
    covariance = {
        "full": _packed(0.3 * np.eye(DIM)),
        "diagonal": np.full(DIM, 0.3, np.float32),
        "gradient": np.zeros(0, np.float32),
    }
    drift = np.full(DIM, 0.0 if kind == "gradient" else 1e-3, np.float32)
    rate = np.full(DIM, 0.1 if kind == "gradient" else 0.0, np.float32)
    no_grades = np.zeros(1, np.float32), np.ones(1, np.float32)
    start = np.zeros(DIM, np.float32)
    first = FirstFilter(kind, start, covariance[kind], 0.39, drift, rate, 10.0, 0.5, *no_grades)
    if not second:
        return first, None
    trust = np.zeros(SECOND_DIM, np.float32)
    trust[1] = 2.0  # of z/2: the first filter is believed as it is
    small = np.full(SECOND_DIM, 1e-4, np.float32)
    return first, SecondFilter(trust, _packed(0.02 * np.eye(SECOND_DIM)), 0.39, small, 1.0)


def _packed(
    covariance: np.ndarray[tuple[int, int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    lower = covariance[np.tril_indices(len(covariance))].astype(np.float32)
    assert len(lower) == packed_width(len(covariance))
    return lower


def _items(rng: np.random.Generator, layout: RowLayout) -> ItemTable:
    psi = rng.normal(scale=0.3, size=(ITEMS, DIM)).astype(np.float32)
    psi[:, 0] = 1.0
    second = rng.normal(scale=0.1, size=(ITEMS, max(layout.second_dim - 2, 0))).astype(np.float32)
    return ItemTable(psi, np.zeros(ITEMS, np.float32), second)


def _events(rng: np.random.Generator, n: int) -> EventColumns:
    return EventColumns(
        slot=rng.integers(0, USERS, n, np.int32),
        item=rng.integers(0, ITEMS, n, np.int32),
        label=rng.integers(0, 2, n, np.int8),
        grade=np.zeros(n, np.int32),
        event_time_ms=1000 * np.arange(n),
        offset=np.arange(n),
        item_row=np.arange(ITEMS),
        item_hash=rng.integers(0, 1 << 63, ITEMS, np.uint64),
    )


def _seconds(adaptation: Adaptation, users: Slab, events: EventColumns, items: ItemTable) -> float:
    start = time.perf_counter()
    adaptation.learn(users, events, items)
    return time.perf_counter() - start


if __name__ == "__main__":
    standalone("kernel", run, __doc__)
