"""The online stage in one process: what it is worth, what it costs, and what the gate keeps off.

    python -m benchmarks.online_meta [--data DIRECTORY] [--seeds 0,1,2] [--case drift] [--json]

Each part says what it measures: ``online_lift``, ``online_rebase``, ``online_shift``, ``online_guard``,
``online_cost``. What needs MovieLens 1M is skipped without it. A seed, of training and of generated streams, takes some
ten minutes.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import online_cost, online_guard, online_lift, online_rebase, online_shift
from benchmarks.command import Options, Skipped, standalone
from benchmarks.report import Figure

PARTS = (online_lift.run, online_rebase.run, online_shift.run, online_guard.run, online_cost.run)


def run(options: Options) -> Iterator[Figure]:
    """All parts."""
    for part in PARTS:
        try:
            yield from part(options)
        except Skipped as reason:
            options.progress(f"skipped, {reason}")


if __name__ == "__main__":
    standalone("online_meta", run, __doc__)
