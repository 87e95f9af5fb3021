"""A live worker on a real broker, both on this machine: throughput, latency, start, takeover, memory, a profile.

    python -m benchmarks.live [--data DIRECTORY] [--case takeover] [--scale 0.1] [--json]

The worker is the real command in a process of its own, d = 16 and the rest as by default; it is asked for its metrics
from outside, as Prometheus does. Events are JSON of some 120 bytes on four partitions. For throughput the topic is
filled before the worker starts, and time runs from the first event applied until every event is applied, durable, and
acknowledged by the changelog. Peers read the same topic in the same run, and do nothing with it.
Brokers are those of KAFKA_BOOTSTRAP, else one that is started for the run.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.command import Options, Skipped, standalone
from benchmarks.live_bench import ML_1M, UNIFORM, ZIPF, Bench
from benchmarks.live_delays import latency, start, takeover
from benchmarks.live_speed import memory, profile, throughput
from benchmarks.live_stage import broker
from benchmarks.report import Figure

PARTS: tuple[Callable[[Bench], Iterator[Figure]], ...] = (
    *(partial(throughput, stream=stream) for stream in (ML_1M, ZIPF, UNIFORM)),
    latency,
    start,
    takeover,
    *(partial(memory, stream=stream) for stream in (UNIFORM, ML_1M)),
    profile,
)


def run(options: Options) -> Iterator[Figure]:
    """Every case that is asked for; one that lacks its data says so."""
    if not Path("/proc/self/status").exists():
        raise Skipped("needs Linux: a process's CPU time and memory are read from /proc")
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder, broker(Path(folder)) as at:
        bench = Bench(options, Path(folder), at)
        for part in PARTS:
            try:
                yield from part(bench)
            except Skipped as reason:
                options.progress(f"  skipped, {reason}")


if __name__ == "__main__":
    standalone("live", run, __doc__)
