"""A worker that kills itself: ``python -m tests.faults.live.points POINT PASSES worker …``, the rest as the command's.

The named points are patched into the process before the command runs: the code under test has none.
"""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from aiokafka import AIOKafkaProducer

import streams.cli
import streams.live.recovery
from state.store import RocksUserStore
from streams.live.adaptation import AdaptedPartition
from streams.live.dead_letters import DeadLetters
from streams.transport import BatchConsumer

BEFORE, AFTER = True, False
Applies = Callable[..., bool]


def _always(*_: object) -> bool:
    return True


def _transactional(producer: AIOKafkaProducer) -> bool:
    return producer._txn_manager is not None and producer._txn_manager.transactional_id is not None


POINTS: dict[str, tuple[Any, str, bool, Applies, int]] = {
    "before rows are written": (RocksUserStore, "_write", BEFORE, _always, 8),
    "after rows are written": (RocksUserStore, "_write", AFTER, _always, 8),
    "before a transaction begins": (AIOKafkaProducer, "begin_transaction", BEFORE, _always, 5),
    "after a transaction began": (AIOKafkaProducer, "begin_transaction", AFTER, _always, 5),
    "before a transaction is committed": (AIOKafkaProducer, "commit_transaction", BEFORE, _always, 5),
    "after a transaction is committed": (AIOKafkaProducer, "commit_transaction", AFTER, _always, 5),
    "before offsets are committed": (BatchConsumer, "_commit", BEFORE, _always, 3),
    "after offsets are committed": (BatchConsumer, "_commit", AFTER, _always, 5),
    "after the last owner is fenced off": (AIOKafkaProducer, "start", AFTER, _transactional, 2),
    "before a store and its changelog meet": (streams.live.recovery, "bring_together", BEFORE, _always, 2),
    "after a store and its changelog met": (streams.live.recovery, "bring_together", AFTER, _always, 2),
    "before a partition is let go": (AdaptedPartition, "close", BEFORE, _always, 1),
    "after a partition is let go": (AdaptedPartition, "close", AFTER, _always, 1),
    "before letters are sent": (DeadLetters, "send", BEFORE, _always, 3),
    "after letters are sent": (DeadLetters, "send", AFTER, _always, 3),
}  # fmt: skip
"""Name -> (owner, function, before or after it, which of its calls count, and up to how many may pass)"""


def arm(point: str, passes: int) -> None:
    """Patches this process so that it dies when it has passed the point so often."""
    owner, name, before, applies, _ = POINTS[point]
    original = getattr(owner, name)
    left = [passes]

    def passed(*arguments: object) -> None:
        if applies(*arguments[:1]):
            left[0] -= 1
            if left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(original)
    def patched(*arguments: Any, **named: Any) -> Any:
        if before:
            passed(*arguments)
        result = original(*arguments, **named)
        if not before:
            passed(*arguments)
        return result

    @functools.wraps(original)
    async def patched_coroutine(*arguments: Any, **named: Any) -> Any:
        if before:
            passed(*arguments)
        result = await original(*arguments, **named)
        if not before:
            passed(*arguments)
        return result

    setattr(owner, name, patched_coroutine if inspect.iscoroutinefunction(original) else patched)


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    sys.argv[:] = ["coldstream", *sys.argv[3:]]
    streams.cli.main()
