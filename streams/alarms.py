"""Alarms of the online stage: who is told, how often, and that telling never holds up the work.

``Alarms`` logs, and hands the same as JSON to a thread of its own that POSTs it to the webhook:

    {"format": 1, "kind": "forgetting", "severity": "warning", "message": ..., "evidence": {...},
     "held_back": 2, "lost": 0, "raised_at_ms": 1700000000000}

``held_back``: alarms of this kind since the one before, which nobody was told of; ``lost``: alarms of any kind so far
that the webhook has not taken. A webhook's address is a secret from its path on, and so are its user and password:
logs and errors show its scheme, host and port.
"""

from __future__ import annotations

import json
import math
import threading
import time
from base64 import b64encode
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from http.client import HTTPException, HTTPMessage
from typing import IO, NamedTuple
from urllib.error import HTTPError
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
import structlog

from streams.live.logs import RepeatLimit

FORMAT = 1
"""Of the JSON; a reader refuses others"""
QUEUE = 64
"""Alarms that wait for the webhook: at one of a kind a minute, ten minutes of an outage"""
BODY_BYTES = 64 * 1024
"""Of one alarm; evidence that makes it larger is left out, for receivers refuse what is too large altogether"""
ITEMS = 200
"""Entries of a list or dict of evidence that are told"""
DEPTH = 6
"""Levels of evidence that are told; a structure that holds itself ends there too"""
TIMEOUT_S = 5.0
"""For the webhook to connect, and for each part of its answer"""
BACKOFF_S = (1.0, 4.0)
"""Before the second and the third try, which is the last"""
DRAIN_S = 10.0
"""At the end of a ``with``: two tries at a webhook that does not answer"""
_TRY_AGAIN = frozenset({408, 429})
"""Refusals that may be withdrawn, beside 500 and above"""

log = structlog.get_logger("coldstream")


class Kind(StrEnum):
    """What is wrong. One of a kind is told in an interval."""

    DRIFT = "drift"
    """A detector found that the stream has changed"""
    FORGETTING = "forgetting"
    """A cohort is predicted worse than it was"""
    REJECTED = "rejected"
    """The gate refused a candidate"""
    FROZEN = "frozen"
    """So many were refused that the shared parameters stand still"""
    REFUSED = "refused gradient"
    """A partition's contribution cannot be used"""
    NOT_FINITE = "not finite"
    """A gradient, version or loss holds NaN or infinity"""

    @property
    def severity(self) -> str:
        """``error`` where somebody has to act, ``warning`` where the ladder does."""
        return "error" if self in (Kind.FROZEN, Kind.NOT_FINITE) else "warning"


class Tally(NamedTuple):
    """Alarms so far. With a webhook, after ``close``: ``raised`` = ``held_back`` + ``delivered`` + ``lost``."""

    raised: int
    held_back: int
    """Within the interval after another of their kind"""
    delivered: int
    """Taken by the webhook"""
    lost: int
    """Logged, but not taken by the webhook: the queue was full, it refused, or time ran out"""


class Alarms:
    """Tells the log and, if there is one, a webhook. Every method may be called from any thread.

    At most one alarm of a kind in ``min_interval_s``, by ``clock`` (seconds, never falling). ValueError for an
    address that is not http or https. Use as a context, or call ``close``.
    """

    def __init__(
        self,
        webhook: str | None,
        min_interval_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        timeout_s: float = TIMEOUT_S,
        backoff_s: Sequence[float] = BACKOFF_S,
    ) -> None:
        self._limit = RepeatLimit(min_interval_s, len(Kind), clock)
        self._lock = threading.Lock()
        self._raised = self._held_back = 0
        self._courier = None if webhook is None else _Courier(_Webhook(webhook, timeout_s), backoff_s)

    def __enter__(self) -> Alarms:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(DRAIN_S)

    def raise_alarm(self, kind: Kind, message: str, evidence: Mapping[str, object]) -> None:
        """Logs at once; the webhook hears of it soon. Neither waits for the webhook nor fails because of it.

        ``evidence``: of JSON's types and numpy's, read before this returns. NaN, infinity and other types are told as
        text, what is longer than ``ITEMS`` or deeper than ``DEPTH`` in part.
        """
        with self._lock:
            self._raised += 1
            held_back = self._limit.admit(kind)
            if held_back is None:
                self._held_back += 1
                return
        told = _plain(evidence, DEPTH)
        tell = log.error if kind.severity == "error" else log.warning
        tell(f"alarm: {message}", kind=str(kind), evidence=told, held_back=held_back)
        if self._courier is not None:
            self._courier.take(kind, _body(kind, message, told, held_back, self._courier.lost))

    @property
    def tally(self) -> Tally:
        """What became of all alarms. Without a webhook, none is delivered or lost."""
        delivered, lost = (0, 0) if self._courier is None else (self._courier.delivered, self._courier.lost)
        with self._lock:
            return Tally(self._raised, self._held_back, delivered, lost)

    def close(self, timeout_s: float) -> None:
        """Waits so long for the webhook to take what is left; the rest is lost, and counted. May be called again.

        It blocks: on an event loop, call it in a thread. Alarms raised afterwards are logged, and lost to the webhook.
        """
        if self._courier is not None:
            self._courier.close(timeout_s)


class _Letter(NamedTuple):
    """An alarm on its way to the webhook."""

    kind: Kind
    body: bytes


class _Courier:
    """A thread that brings letters to the webhook, in their order, and never waits for anybody but the webhook."""

    def __init__(self, webhook: _Webhook, backoff_s: Sequence[float]) -> None:
        self._webhook, self._backoff_s = webhook, tuple(backoff_s)
        self._waiting: deque[_Letter] = deque()
        self._changed = threading.Condition()
        self._under_way = 0
        """1 while the thread has a letter"""
        self._closing = self._given_up = False
        self.delivered = self.lost = 0
        self._hurry = threading.Event()
        """Set by ``close``: tries follow each other at once"""
        self._thread = threading.Thread(target=self._run, name="alarms", daemon=True)
        self._thread.start()

    def take(self, kind: Kind, body: bytes) -> None:
        """One more to bring, or, where it may not wait here, one more that is lost."""
        with self._changed:
            if taken := not self._closing and len(self._waiting) < QUEUE:
                self._waiting.append(_Letter(kind, body))
                self._changed.notify()
            else:
                self.lost += 1
                why = "alarms were closed" if self._closing else f"{QUEUE} alarms wait for it already"
        if not taken:
            log.warning("an alarm is not sent to the webhook", kind=str(kind), webhook=self._webhook.shown, error=why)

    def close(self, timeout_s: float) -> None:
        """Brings what waits, for at most so long; what is left then is lost."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._hurry.set()
        self._thread.join(timeout_s)
        with self._changed:
            left = 0 if self._given_up else len(self._waiting) + self._under_way
            self._given_up = True
            self.lost += left
            self._waiting.clear()
        if left:
            log.warning("alarms are left that the webhook did not take", alarms=left, webhook=self._webhook.shown)

    def _run(self) -> None:
        while (letter := self._next()) is not None:
            error = self._bring(letter)
            with self._changed:
                self._under_way = 0
                if self._given_up:
                    return
                self.delivered += error is None
                self.lost += error is not None
            if error is not None:
                log.warning(
                    "the webhook did not take an alarm", kind=str(letter.kind), webhook=self._webhook.shown, error=error
                )

    def _next(self) -> _Letter | None:
        """Waits for one; None: there will be no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if not self._waiting:
                return None
            self._under_way = 1
            return self._waiting.popleft()

    def _bring(self, letter: _Letter) -> str | None:
        """None: it was taken. Else why not, after the last try."""
        for pause_s in (*self._backoff_s, None):
            refused = self._webhook.post(letter.body)
            if refused is None or not refused.may_pass or pause_s is None or self._given_up:
                break
            self._hurry.wait(pause_s)
        return None if refused is None else refused.why


class _Refused(NamedTuple):
    """Why a webhook did not take an alarm."""

    why: str
    may_pass: bool
    """Another try may succeed"""


class _Webhook:
    """An address that takes JSON by POST. Shows nothing of itself but ``shown``. ValueError: see ``Alarms``."""

    def __init__(self, url: str, timeout_s: float) -> None:
        parts = _parts(url)
        host, port = parts.hostname or "", f":{parts.port}" if parts.port is not None else ""
        netloc = (f"[{host}]" if ":" in host else host) + port
        self.shown = f"{parts.scheme}://{netloc}"
        self._url = urlunsplit((parts.scheme, netloc, parts.path or "/", parts.query, ""))
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "User-Agent": "coldstream"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(pair.encode()).decode()}"
        self._opener = build_opener(_NoRedirects)

    def post(self, body: bytes) -> _Refused | None:
        """One try; None: it was taken, with an answer of 200 to 299. What is returned names no more than ``shown``."""
        request = Request(self._url, body, self._headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s):
                return None
        except HTTPError as answer:
            answer.close()
            if 300 <= answer.code < 400:
                return _Refused(f"it answered {answer.code}: name the address it redirects to", False)
            return _Refused(f"it answered {answer.code}", answer.code >= 500 or answer.code in _TRY_AGAIN)
        except (OSError, HTTPException, ValueError) as error:  # ValueError: a host's name that cannot be encoded
            cause = getattr(error, "reason", error)  # URLError wraps what happened
            name = type(cause).__name__  # never its text, which may quote the address
            why = cause.strerror if isinstance(cause, OSError) else None
            return _Refused(f"{name}: {why}" if why else name, True)


def _parts(url: str) -> SplitResult:
    """The address in parts that can be used. ValueError says what is wrong and shows nothing of it."""
    try:
        if not url.isascii() or any(not "!" <= character <= "~" for character in url):
            raise ValueError
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # its text may quote a password
        usable = False
    if not usable:
        raise ValueError(
            "the webhook of alarms is no http or https address such as https://host:8080/path"
            " (a special character in a user, password or path is written with its %XX)"
        ) from None
    return parts


class _NoRedirects(HTTPRedirectHandler):
    """urllib would follow one with a GET that carries the password but no alarm, and take its answer for a success."""

    def redirect_request(
        self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        """None: the redirect itself is the answer."""


def _body(kind: Kind, message: str, evidence: object, held_back: int, lost: int) -> bytes:
    told = {
        "format": FORMAT,
        "kind": kind,
        "severity": kind.severity,
        "message": message,
        "evidence": evidence,
        "held_back": held_back,
        "lost": lost,
        "raised_at_ms": time.time_ns() // 1_000_000,
    }
    body = json.dumps(told, allow_nan=False).encode()
    if len(body) <= BODY_BYTES:
        return body
    return json.dumps({**told, "evidence": {"left out": f"it is too large ({len(body)} bytes); see the log"}}).encode()


def _plain(value: object, depth: int) -> object:
    """The value in JSON's types: what is not finite, nested deeper or of another type as text, long ones in part."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist() if value.size <= ITEMS else f"array of {value.shape}"
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return str(value)
    if depth and isinstance(value, Mapping):
        pairs = list(value.items())
        kept: dict[str, object] = {str(key): _plain(inner, depth - 1) for key, inner in pairs[:ITEMS]}
        return {**kept, "…": f"{len(pairs) - ITEMS} more"} if len(pairs) > ITEMS else kept
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        items = list(value)
        told = [_plain(inner, depth - 1) for inner in items[:ITEMS]]
        return [*told, f"… {len(items) - ITEMS} more"] if len(items) > ITEMS else told
    return f"<{type(value).__name__}>" if isinstance(value, (Mapping, list, tuple, set, frozenset)) else repr(value)
