"""How long chosen calls take while something runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any


@contextmanager
def clocked(stages: Mapping[tuple[type, str], str], seconds: dict[str, float]) -> Iterator[None]:
    """Adds the time of the calls of ``stages``, (class, method) -> name, to ``seconds`` by name while it lasts."""
    with ExitStack() as stack:
        for (owner, name), stage in stages.items():
            original = getattr(owner, name)
            stack.callback(setattr, owner, name, original)
            setattr(owner, name, _timed(original, stage, seconds))
        yield


def _timed(call: Callable[..., Any], stage: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[stage] += time.perf_counter() - start

    return timed
