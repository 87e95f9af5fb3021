"""A live worker on a real broker, both on this machine: throughput, latency, start, takeover, memory, a profile.

    python -m benchmarks.live [--data DIRECTORY] [--case latency] [--scale 0.1] [--json]

The worker is the real command in a process of its own, d = 16 and the rest as by default; it is asked for its metrics
from outside, as Prometheus does. Events are JSON of some 120 bytes on four partitions. For throughput the topic is
filled before the worker starts, and the time runs from the first event applied until every event is applied, durable,
and acknowledged by the changelog. Peers read the same topic in the same run and do nothing with it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import stream_run
from benchmarks.command import Options, Skipped, standalone
from benchmarks.live_delays import latency, start, takeover
from benchmarks.live_events import Events, from_source, generated, records
from benchmarks.live_peers import measure
from benchmarks.live_producer import fill
from benchmarks.live_profile import read
from benchmarks.report import Figure

