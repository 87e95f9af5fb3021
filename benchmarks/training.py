"""How long the offline stage takes on MovieLens 1M with the profile ml-1m, all epochs.

python -m benchmarks.training --data DIRECTORY [--json]
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from configs.settings import Settings
from streams.replay import RunProgress, prepared, train_offline

PROFILE = "ml-1m"
TARGET_SECONDS = 60.0


def run(options: Options) -> Iterator[Figure]:
    """Seconds of the stage on the first 70 % of users."""
    if options.wants(PROFILE):
        yield from measure(options.settings(PROFILE, "ml-1m"), PROFILE, options.target(TARGET_SECONDS))


def measure(settings: Settings, case: str, target: float | None = None) -> Iterator[Figure]:
    """Seconds to read and order the events, and of the stage from events to a model.

    In the first run after an installation the stage compiles its kernel, once.
    """
    start = time.perf_counter()
    with prepared(settings, RunProgress()) as data:
        ready = time.perf_counter()
        artifact = train_offline(data, settings, RunProgress())
        seconds = time.perf_counter() - ready
    yield Figure(case, "offline stage", (seconds,), "s", target, at_most=True)
    yield Figure(case, "an epoch", (seconds / settings.training.epochs,), "s")
    yield Figure(case, "reading and ordering", (ready - start,), "s")
    yield Figure(case, "offline events", (artifact.metrics["offline_events"],))
    yield Figure(case, "last epoch's log-loss", (artifact.metrics["train_log_loss"][-1],), "nats")


if __name__ == "__main__":
    standalone("training", run, __doc__)
