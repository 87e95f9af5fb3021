"""A query of one user: from the shell, inside a process, and beside a live writer whose log has to be replayed.

    python -m benchmarks.query [--case "4,000 items"] [--json]

d = 16 with the full covariance, a second filter of 8, a ring of 32 that holds every event of the asked user, so that
the explanation replays all of them. From the shell is the whole command: the median of 20, the files in the system's
cache and the modules compiled to byte code, as an installed program has them; beside it what Python takes to start, to
load numpy, RocksDB and typer, and to end, with nothing done between. Warm is one row with the scores of 20 items, the
median of 2,000. Beside a live writer 50,000 rows (55 MB) stand in the log alone: whoever opens the store reads all of
them, every time, and one that stays open reads what is new.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from benchmarks.command import Options, standalone
from benchmarks.report import Figure
from configs.settings import StateSettings
from learner.features import FeatureEncoder, SparseRows
from learner.interactions import Interactions
from learner.serving import FirstFilter, FixedPart, SecondFilter, ServingModel
from learner.user_state import packed_width
from state.query import StateReader
from state.reading.model_view import write_model_view
from streams.processor import Processor
from streams.replay import rocks_stores

COLD_TARGET_MS, WARM_TARGET_MS = 150, 1
ITEMS, MANY_ITEMS = 4_000, 1_000_000
RUNS, WARM_RUNS = 20, 2_000
ASKED, ASKED_ITEMS = "asked", tuple(f"i{k}" for k in range(20))
USERS, LOGGED_ROWS, BATCH = 2_000, 50_000, 5_000
RING = 32
DIM, SECOND_DIM, ITEM_DIM = 16, 8, 24
FLOOR = "import numpy, rocksdict, typer"


def run(options: Options) -> Iterator[Figure]:
    """Both sizes of a catalogue, then a live writer."""
    for items in (ITEMS, MANY_ITEMS):
        case = f"{options.scaled(items):,} items"
        if options.wants(case):
            with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
                prepare(Path(folder), options.scaled(items)).close()
                yield from cold(case, Path(folder), options)
                yield from warm(case, Path(folder), options)
    if options.wants("beside a live writer"):
        with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
            yield from beside_a_writer("beside a live writer", Path(folder), options)


def prepare(directory: Path, items: int) -> Processor:
    """A state directory with USERS users of ten events and the asked one of 32; its processor is still open."""
    model = synthetic_model(items)
    settings = StateSettings(ring=RING)
    processor = Processor(model, rocks_stores(directory, settings), settings)
    write_model_view(directory, model, processor.layout, None)
    processor.process(0, _events(items))
    return processor


def synthetic_model(items: int) -> ServingModel:
    """Random constants: how long a query takes does not depend on what they are."""
    rng = np.random.default_rng(0)
    fixed = FixedPart(
        item_ids=tuple(f"i{k}" for k in range(items)),
        item_embedding=_normal(rng, (items, ITEM_DIM)),
        item_bias=_normal(rng, (items,)),
        item_features=SparseRows(np.zeros(items + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)),
        item_feature_weights=np.zeros((0, ITEM_DIM), np.float32),
        base_weight=_normal(rng, (ITEM_DIM,)),
        base_bias=0.0,
        projection=_normal(rng, (ITEM_DIM, DIM - 1)),
        projection_bias=_normal(rng, (DIM - 1,)),
        second_projection=_normal(rng, (ITEM_DIM, SECOND_DIM - 2)),
        second_projection_bias=np.zeros(SECOND_DIM - 2, np.float32),
        user_feature_weights=np.zeros((0, DIM), np.float32),
        item_encoder=FeatureEncoder(),
        user_encoder=FeatureEncoder(),
        grades=np.zeros(0, np.float32),
    )
    one = np.ones(1, np.float32)
    first = FirstFilter(
        "full", _normal(rng, (DIM,)), _packed_diagonal(DIM, 0.3), 0.3, np.full(DIM, 1e-4, np.float32),
        np.zeros(DIM, np.float32), 1.0, 0.0, 0 * one, one,
    )  # fmt: skip
    second = SecondFilter(
        _normal(rng, (SECOND_DIM,)), _packed_diagonal(SECOND_DIM, 0.05), 0.3, np.full(SECOND_DIM, 1e-4, np.float32), 1.0
    )
    return ServingModel(fixed, first, second)


def cold(case: str, state: Path, options: Options) -> Iterator[Figure]:
    """The command from the shell."""
    runs = options.scaled(RUNS)
    command = _command(state)
    yield Figure(case, "Python, numpy, RocksDB, typer", (_shell([sys.executable, "-c", FLOOR], runs),), "ms")
    yield Figure(case, "cold", (_shell(command, runs),), "ms", options.target(COLD_TARGET_MS), at_most=True)
    yield Figure(case, "cold, scores of 20 items", (_shell([*command, "--items", ",".join(ASKED_ITEMS)], runs),), "ms")
    yield Figure(case, "cold, best 10 of the catalogue", (_shell([*command, "--top", "10"], runs),), "ms")


def warm(case: str, state: Path, options: Options) -> Iterator[Figure]:
    """Inside a process that keeps the store open and the model mapped."""
    runs = options.scaled(WARM_RUNS)
    with StateReader(state) as reader:
        plain = _clocked(lambda: reader.query(ASKED, items=ASKED_ITEMS, explained=False), runs)
        yield Figure(case, "warm, row and scores of 20 items", (plain,), "ms", options.target(WARM_TARGET_MS), True)
        yield Figure(case, "warm, explained too", (_clocked(lambda: reader.query(ASKED), runs // 20 + 1),), "ms")
        best = _clocked(lambda: reader.query(ASKED, count=10, explained=False), runs // 200 + 1)
        yield Figure(case, "warm, best 10 of the catalogue", (best,), "ms")


def beside_a_writer(case: str, state: Path, options: Options) -> Iterator[Figure]:
    """As above, while a writer is open whose latest rows are in the log alone."""
    processor = prepare(state, options.scaled(ITEMS))
    try:
        logged = _fill_log(processor, options.scaled(LOGGED_ROWS))
        yield Figure(case, "log to replay", (logged / 1e6,), "MB")
        yield Figure(case, "cold", (_shell(_command(state), options.scaled(RUNS)),), "ms")
        start = time.perf_counter()
        with StateReader(state, follow=True) as reader:
            reader.query(ASKED, explained=False)
            yield Figure(case, "opening a follower", ((time.perf_counter() - start) * 1e3,), "ms")
            _fill_log(processor, options.scaled(BATCH))
            yield Figure(
                case, f"catching up with {options.scaled(BATCH):,} rows", (_clocked(reader.catch_up, 1),), "ms"
            )
            runs = options.scaled(WARM_RUNS)
            yield Figure(case, "catching up with nothing", (_clocked(reader.catch_up, runs),), "ms")
            plain = _clocked(lambda: reader.query(ASKED, items=ASKED_ITEMS, explained=False), runs)
            yield Figure(case, "warm, row and scores of 20 items", (plain,), "ms", options.target(WARM_TARGET_MS), True)
    finally:
        processor.close()


def _events(items: int) -> Interactions:
    rng = np.random.default_rng(1)
    users = [*(f"u{k}" for k in np.tile(np.arange(USERS), 10).tolist()), *[ASKED] * RING]
    n = len(users)
    return Interactions.from_columns(
        users, [f"i{k}" for k in rng.integers(0, items, n).tolist()], rng.integers(0, 2, n).astype(np.int8),
        1_600_000_000_000 + 60_000 * np.arange(n),
    )  # fmt: skip


def _fill_log(processor: Processor, rows: int) -> int:
    """Writes rows of other users; returns the bytes that stand in the log."""
    store = processor.store(0)
    held, _ = store.get_many([ASKED.encode()])
    for start in range(0, rows, BATCH):
        users = [f"filler {k}".encode() for k in range(start, min(start + BATCH, rows))]
        store.write_batch(users, np.repeat(held, len(users), axis=0), store.progress())
    directory: Path = store.path  # type: ignore[attr-defined]
    return sum(path.stat().st_size for path in directory.glob("*.log"))


def _command(state: Path) -> list[str]:
    installed = Path(sys.executable).with_name("coldstream")
    program = [str(installed)] if installed.is_file() else [sys.executable, "-m", "streams.cli"]
    return [*program, "query", ASKED, "--state", str(state)]


def _shell(command: list[str], runs: int) -> float:
    """Milliseconds of a process from its start to its end, after one that is not counted and leaves the byte code."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory(prefix="coldstream-bench-") as folder:
        if len(environment) < len(os.environ):
            environment["PYTHONPYCACHEPREFIX"] = folder

        def process() -> None:
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

        process()
        return _clocked(process, runs)


def _clocked(call: Callable[[], object], runs: int) -> float:
    """The median of the call's milliseconds."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return (rng.normal(size=shape) / 4).astype(np.float32)


def _packed_diagonal(dim: int, variance: float) -> NDArray[np.float32]:
    packed = np.zeros(packed_width(dim), np.float32)
    packed[np.arange(dim) * (np.arange(dim) + 3) // 2] = variance
    return packed


if __name__ == "__main__":
    standalone("query", run, __doc__)
