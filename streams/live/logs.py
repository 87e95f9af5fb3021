"""How a worker logs: one stream for structlog and the standard library's loggers, JSON lines or text for a terminal.

Secrets that were told to ``Secrets`` are blotted out of every text, and fields with a secret's name of their value.
Tracebacks show no variables. Warnings and errors that say the same again and again are let through once a minute.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import TextIO
from urllib.parse import quote

import structlog
from structlog.stdlib import ProcessorFormatter
from structlog.typing import EventDict, Processor

OWN_LOGGERS = ("coldstream", "configs", "learner", "state", "streams")
"""Heard from INFO on; all others, and so aiokafka, kafka, faust and mode, from WARNING on"""
REPEAT_S = 60.0
"""Between two warnings that say the same"""
REPEAT_KEYS = 1_000
"""Different warnings that are remembered, the latest ones: some 200 kB"""
SHORTEST_SECRET = 4
"""Characters: a shorter one would be found, and blotted out, in half of all words"""
BLOT = "***"
_SECRET_NAME = re.compile(r"passw|secret|token|credential|authorization|jaas", re.IGNORECASE)
_SECRET_IN_TEXT = re.compile(
    r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)|(?<=password=)(\"[^\"]*\"|'[^']*'|[^\s,;&)]+)", re.IGNORECASE
)


class Secrets:
    """What must not be read in a log. May be added to at any time, by any thread."""

    def __init__(self) -> None:
        self._forms: tuple[str, ...] = ()
        """The longest first: one may be a part of another"""
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"Secrets({len(self._forms)} forms)"

    def add(self, secret: str) -> None:
        """From here on it is blotted out. One of fewer than ``SHORTEST_SECRET`` characters is not."""
        if len(secret) < SHORTEST_SECRET:
            return
        with self._lock:
            self._forms = tuple(sorted({*self._forms, *_forms(secret)}, key=len, reverse=True))

    def blot(self, text: str) -> str:
        """The text without secrets, without the user and password of an address, and without ``password=...``."""
        for form in self._forms:
            text = text.replace(form, BLOT)
        return _SECRET_IN_TEXT.sub(BLOT, text)

    def processor(self, logger: object, name: str, event: EventDict) -> EventDict:
        """structlog's: every text of the event, however deep, and every field with a secret's name."""
        return {key: BLOT if _SECRET_NAME.search(key) else self._clean(value) for key, value in event.items()}

    def _clean(self, value: object) -> object:
        if isinstance(value, dict):
            return self.processor(None, "", {str(key): inner for key, inner in value.items()})
        if isinstance(value, (list, tuple, set, frozenset)):
            return [self._clean(inner) for inner in value]
        if value is None or isinstance(value, (bool, int, float)):
            return value
        # A text of another class may have reasons to show itself otherwise.
        return self.blot(str(value) if isinstance(value, str) else repr(value))


def _forms(secret: str) -> set[str]:
    """How a text may come up in another: as it is, and escaped by Python, JSON or a URL."""
    plain = "".join(secret)
    return {plain, repr(plain)[1:-1], repr(plain.encode())[2:-1], json.dumps(plain)[1:-1], quote(plain, safe="")}


class RepeatLimit:
    """Lets a thing through once in ``interval_s``, and counts how often it was kept back meanwhile.

    The ``size`` things that were let through or kept back latest are remembered. Not for several threads at once.
    """

    def __init__(self, interval_s: float, size: int, clock: Callable[[], float]) -> None:
        self._interval_s, self._size, self._clock = interval_s, size, clock
        self._seen: OrderedDict[object, tuple[float, int]] = OrderedDict()
        """thing -> (when it was let through last, kept back since)"""

    def admit(self, thing: object) -> int | None:
        """None: not now. Else how often it was kept back since the last time."""
        now = self._clock()
        passed_at, kept_back = self._seen.pop(thing, (None, 0))
        if passed_at is not None and now - passed_at < self._interval_s:
            self._seen[thing] = passed_at, kept_back + 1
            return None
        self._seen[thing] = now, 0
        if len(self._seen) > self._size:
            self._seen.popitem(last=False)
        return kept_back


class _Repeats(logging.Filter):
    """Keeps back warnings and errors that say the same: same logger, level, text, fields and error."""

    def __init__(self, limit: RepeatLimit) -> None:
        super().__init__()
        self._limit = limit
        self._lock = threading.Lock()
        """A handler asks its filters before it takes its own lock"""

    def filter(self, record: logging.LogRecord) -> bool:
        """See ``logging.Filter``. Leaves in the record how often the same was kept back."""
        if not logging.WARNING <= record.levelno < logging.CRITICAL:
            return True
        with self._lock:
            kept_back = self._limit.admit(_identity(record))
        record.kept_back = kept_back
        return kept_back is not None


def _identity(record: logging.LogRecord) -> bytes:
    """Of what a record says. Where an error was raised does not count; what it says does."""
    if isinstance(record.msg, dict):  # structlog's
        said: object = record.msg
        error = sys.exception() if record.msg.get("exc_info") is True else None
    else:
        said = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
    return hashlib.blake2b(repr((record.name, record.levelno, said, error)).encode(), digest_size=16).digest()


def configure_logs(
    stream: TextIO,
    secrets: Secrets,
    *,
    worker: str | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Sends all logs of this process to ``stream``: text where it is a terminal, else one JSON object a line.

    ``worker`` is a field of every line. Replaces the handlers there were; calling it again does so too.
    """
    handler = logging.StreamHandler(stream)
    handler.addFilter(_Repeats(RepeatLimit(REPEAT_S, REPEAT_KEYS, clock)))
    handler.setFormatter(_formatter(secrets, worker, terminal=stream.isatty()))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.contextvars.merge_contextvars,
            structlog.stdlib.PositionalArgumentsFormatter(),
            ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.stdlib.BoundLogger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _formatter(secrets: Secrets, worker: str | None, *, terminal: bool) -> logging.Formatter:
    """``secrets`` comes after tracebacks have become text, and before anything is escaped."""
    text = structlog.dev.ConsoleRenderer(colors=True, exception_formatter=structlog.dev.plain_traceback)
    return ProcessorFormatter(
        processors=[
            _fields_of_record(worker),
            ProcessorFormatter.remove_processors_meta,
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            secrets.processor,
            text if terminal else structlog.processors.JSONRenderer(),
        ]
    )


def _fields_of_record(worker: str | None) -> Processor:
    """Adds time (UTC), level, logger, worker, and how often the same was kept back."""

    def processor(logger: object, name: str, event: EventDict) -> EventDict:
        record: logging.LogRecord = event["_record"]
        told = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        event.update(timestamp=f"{told}.{int(record.msecs):03d}Z", level=record.levelname.lower(), logger=record.name)
        if worker is not None:
            event["worker"] = worker
        if kept_back := getattr(record, "kept_back", 0):
            event["kept_back"] = kept_back
        return event

    return processor
