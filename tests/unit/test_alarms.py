"""An alarm is logged, brought to the webhook in moderation, counted where it is lost, and never in anybody's way."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import numpy as np
import pytest
import structlog
from structlog.testing import capture_logs

from streams.alarms import BODY_BYTES, DEPTH, ITEMS, QUEUE, Alarms, Kind, Tally

DEADLINE_S = 10.0


class Post(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes
    at_s: float

    @property
    def told(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        return json.loads(self.body, parse_constant=refuse)


class Webhook(ThreadingHTTPServer):
    """Answers with ``answers`` in turn, then 200; None: bytes that are no HTTP. While not ``free``, not at all."""

    daemon_threads = True

    def __init__(self, *answers: int | None) -> None:
        self.answers = list(answers)
        self.posts: list[Post] = []
        self.free = threading.Event()
        self.free.set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def url(self, path: str = "/hook", userinfo: str = "") -> str:
        return f"http://{userinfo}127.0.0.1:{self.server_port}{path}"

    def told(self) -> list[dict[str, Any]]:
        return [post.told for post in self.posts]


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer = self.server.answers.pop(0) if self.server.answers else 200
        self.server.posts.append(Post(self.path, dict(self.headers), body, time.monotonic()))
        self.server.free.wait()
        if answer is None:
            self.wfile.write(b"nonsense " + self.path.encode() + b"\r\n\r\n")
            return
        try:
            self.send_response(answer)
            if answer == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
        except OSError:  # it was not waited for
            self.close_connection = True

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


class Clock:
    now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    monkeypatch.setenv("no_proxy", "127.0.0.1,[::1]")
    structlog.reset_defaults()
    with capture_logs() as captured:
        yield captured


@pytest.fixture
def serve() -> Iterator[Callable[..., Webhook]]:
    """Starts a webhook with these answers."""
    servers: list[tuple[Webhook, threading.Thread]] = []

    def start(*answers: int | None) -> Webhook:
        server = Webhook(*answers)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.free.set()
        server.shutdown()
        thread.join()
        server.server_close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it does not come to be"
        time.sleep(0.005)


def unlimited(webhook: str, **options: Any) -> Alarms:
    """Of one kind as many as there are."""
    return Alarms(webhook, 0.0, **options)


def drift(alarms: Alarms, number: int = 0) -> None:
    alarms.raise_alarm(Kind.DRIFT, "the stream has changed", {"number": number})


# --- what is told


def test_the_log_and_the_webhook_are_told_the_same(serve, logs) -> None:
    server = serve()
    before_ms = time.time_ns() // 1_000_000
    with Alarms(server.url(), 60.0) as alarms:
        alarms.raise_alarm(
            Kind.FORGETTING, "old users are predicted worse", {"cohort": "slice 0 / heavy", "rise": 0.02}
        )
    (post,) = server.posts
    told = post.told
    assert before_ms <= told.pop("raised_at_ms") <= time.time_ns() // 1_000_000
    assert told == {
        "format": 1,
        "kind": "forgetting",
        "severity": "warning",
        "message": "old users are predicted worse",
        "evidence": {"cohort": "slice 0 / heavy", "rise": 0.02},
        "held_back": 0,
        "lost": 0,
    }
    assert (post.path, post.headers["Content-Type"]) == ("/hook", "application/json")
    assert "Authorization" not in post.headers
    assert logs == [
        {
            "event": "alarm: old users are predicted worse",
            "log_level": "warning",
            "kind": "forgetting",
            "evidence": {"cohort": "slice 0 / heavy", "rise": 0.02},
            "held_back": 0,
        }
    ]
    assert alarms.tally == Tally(raised=1, held_back=0, delivered=1, lost=0)


def test_without_a_webhook_there_is_the_log(logs) -> None:
    with Alarms(None, 60.0) as alarms:
        for kind in Kind:
            alarms.raise_alarm(kind, "m", {})
    assert {one["kind"]: one["log_level"] for one in logs} == {
        "drift": "warning",
        "forgetting": "warning",
        "rejected": "warning",
        "frozen": "error",
        "refused gradient": "warning",
        "not finite": "error",
    }
    assert alarms.tally == Tally(raised=6, held_back=0, delivered=0, lost=0)


def test_evidence_that_json_cannot_say_is_told_as_text_or_in_part(serve) -> None:
    endless: dict[str, object] = {}
    endless["inner"] = endless
    evidence = {
        "loss": math.nan,
        "bound": np.float32(np.inf),
        "users": np.int64(3),
        "worse": np.bool_(True),
        "losses": np.array([[0.5, np.nan]]),
        "embedding": np.zeros((3, ITEMS)),
        "many": list(range(ITEMS + 2)),
        "cohorts": dict.fromkeys(range(ITEMS + 1), 0),
        "error": ValueError("no"),
        7: ("a", None),
        "endless": endless,
    }
    server = serve()
    with Alarms(server.url(), 60.0) as alarms:
        alarms.raise_alarm(Kind.NOT_FINITE, "a gradient is refused", evidence)
    told = server.told()[0]["evidence"]
    many, cohorts, inner = told.pop("many"), told.pop("cohorts"), told.pop("endless")
    assert told == {
        "loss": "nan",
        "bound": "inf",
        "users": 3,
        "worse": True,
        "losses": [[0.5, "nan"]],
        "embedding": f"array of (3, {ITEMS})",
        "error": "ValueError('no')",
        "7": ["a", None],
    }
    assert many == [*range(ITEMS), "… 2 more"]
    assert (len(cohorts), cohorts["…"]) == (ITEMS + 1, "1 more")
    for _ in range(DEPTH - 1):
        inner = inner["inner"]
    assert inner == "<dict>"


def test_evidence_that_is_too_large_stays_in_the_log(serve, logs) -> None:
    server = serve()
    with Alarms(server.url(), 60.0) as alarms:
        alarms.raise_alarm(Kind.REJECTED, "version 7 is refused", {"text": "x" * BODY_BYTES})
    (told,) = server.told()
    assert len(server.posts[0].body) < 1_000
    assert told["message"] == "version 7 is refused"
    assert list(told["evidence"]) == ["left out"]
    assert logs[0]["evidence"] == {"text": "x" * BODY_BYTES}


def test_evidence_is_read_when_the_alarm_is_raised(serve) -> None:
    server = serve()
    server.free.clear()
    evidence = {"rise": 0.1}
    with Alarms(server.url(), 60.0) as alarms:
        drift(alarms)
        alarms.raise_alarm(Kind.FORGETTING, "m", evidence)
        evidence["rise"] = 0.9
        server.free.set()
    assert [told["evidence"] for told in server.told()] == [{"number": 0}, {"rise": 0.1}]


# --- how often


def test_one_of_a_kind_is_told_in_an_interval_and_the_next_counts_the_others(serve, logs) -> None:
    server, clock = serve(), Clock()
    with Alarms(server.url(), 60.0, clock) as alarms:
        for seconds in (0.0, 1.0, 58.9, 0.1, 0.0):  # the fourth is 60 s after the first
            clock.now += seconds
            drift(alarms)
        alarms.raise_alarm(Kind.FROZEN, "m", {})  # another kind has its own interval
        clock.now += 60.0
        drift(alarms)
    assert [(told["kind"], told["held_back"]) for told in server.told()] == [
        ("drift", 0),
        ("drift", 2),
        ("frozen", 0),
        ("drift", 1),
    ]
    assert [(one["kind"], one["held_back"]) for one in logs] == [
        ("drift", 0),
        ("drift", 2),
        ("frozen", 0),
        ("drift", 1),
    ]
    assert alarms.tally == Tally(raised=7, held_back=3, delivered=4, lost=0)


def test_of_several_threads_at_once_one_is_told(serve, logs) -> None:
    server = serve()
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(50):
            drift(alarms)

    with Alarms(server.url(), 60.0, Clock()) as alarms:
        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert alarms.tally == Tally(raised=400, held_back=399, delivered=1, lost=0)
    assert len(logs) == 1


# --- a webhook that does not take it


@pytest.mark.parametrize("answer", [500, 503, 429, 408, None])
def test_what_may_pass_is_tried_again(serve, answer, logs) -> None:
    server = serve(answer, 200)
    with Alarms(server.url(), 60.0, backoff_s=(0.0, 0.0)) as alarms:
        drift(alarms)
    assert alarms.tally == Tally(raised=1, held_back=0, delivered=1, lost=0)
    assert len(server.posts) == 2
    assert server.posts[0].body == server.posts[1].body
    assert len(logs) == 1  # nothing was lost, nothing is said


@pytest.mark.parametrize(("answers", "error"), [((500, 502, 503), "it answered 503"), ((None,) * 3, "BadStatusLine")])
def test_the_third_try_is_the_last(serve, answers, error, logs) -> None:
    server = serve(*answers)
    with Alarms(server.url(), 60.0, backoff_s=(0.0, 0.0)) as alarms:
        drift(alarms)
        alarms.raise_alarm(Kind.FROZEN, "m", {})  # the next one is brought all the same
    assert alarms.tally == Tally(raised=2, held_back=0, delivered=1, lost=1)
    assert [told["kind"] for told in server.told()] == ["drift"] * 3 + ["frozen"]
    failed = next(one for one in logs if one["event"] == "the webhook did not take an alarm")
    assert (failed["log_level"], failed["kind"], failed["error"]) == ("warning", "drift", error)


@pytest.mark.parametrize("answer", [400, 401, 404, 413])
def test_a_refusal_for_good_is_not_tried_again(serve, answer, logs) -> None:
    server = serve(answer)
    with Alarms(server.url(), 60.0, backoff_s=(0.0, 0.0)) as alarms:
        drift(alarms)
    assert alarms.tally == Tally(raised=1, held_back=0, delivered=0, lost=1)
    assert len(server.posts) == 1
    assert logs[-1]["error"] == f"it answered {answer}"


def test_a_redirect_is_not_followed_for_the_alarm_would_be_lost_on_the_way(serve, logs) -> None:
    server = serve(302)
    with Alarms(server.url(), 60.0) as alarms:
        drift(alarms)
    assert [post.path for post in server.posts] == ["/hook"]
    assert alarms.tally.lost == 1
    assert logs[-1]["error"] == "it answered 302: name the address it redirects to"


def test_tries_are_apart(serve) -> None:
    server = serve(500)
    with Alarms(server.url(), 60.0, backoff_s=(0.2, 60.0)) as alarms:
        drift(alarms)
        until(lambda: alarms.tally.delivered)
    first, second = server.posts
    assert second.at_s - first.at_s >= 0.2


def test_at_the_end_tries_follow_each_other_at_once(serve) -> None:
    server = serve(500, 500)
    alarms = Alarms(server.url(), 60.0, backoff_s=(600.0, 600.0))
    drift(alarms)
    until(lambda: server.posts)
    alarms.close(DEADLINE_S)
    assert alarms.tally == Tally(raised=1, held_back=0, delivered=1, lost=0)


def test_nobody_waits_for_a_webhook_that_does_not_answer(serve, logs) -> None:
    server = serve()
    server.free.clear()
    alarms = unlimited(server.url(), timeout_s=60.0)
    for number in range(10):
        drift(alarms, number)
    assert alarms.tally == Tally(raised=10, held_back=0, delivered=0, lost=0)
    assert len(logs) == 10
    server.free.set()
    alarms.close(DEADLINE_S)
    assert [told["evidence"]["number"] for told in server.told()] == [*range(10)]


def test_an_answer_that_does_not_come_in_time_is_a_failed_try(serve, logs) -> None:
    server = serve()
    server.free.clear()
    with Alarms(server.url(), 60.0, timeout_s=0.1, backoff_s=(0.0, 0.0)) as alarms:
        drift(alarms)
    assert len(server.posts) == 3
    assert alarms.tally.lost == 1
    assert logs[-1]["error"] == "TimeoutError"


def test_the_end_does_not_wait_longer_than_it_may_and_counts_what_is_left(serve, logs) -> None:
    server = serve(500)
    server.free.clear()
    alarms = unlimited(server.url(), timeout_s=60.0)
    for number in range(3):
        drift(alarms, number)
    until(lambda: server.posts)
    (courier,) = (thread for thread in threading.enumerate() if thread.name == "alarms")
    alarms.close(0.05)
    left = Tally(raised=3, held_back=0, delivered=0, lost=3)
    assert alarms.tally == left
    assert logs[-1] == {
        "event": "alarms are left that the webhook did not take",
        "log_level": "warning",
        "alarms": 3,
        "webhook": server.url(""),
    }
    alarms.close(0.05)  # may be called again
    server.free.set()
    courier.join(DEADLINE_S)
    assert not courier.is_alive()
    assert alarms.tally == left  # what was under way then is not counted twice
    assert len(server.posts) == 1  # and not tried again


def test_what_finds_the_queue_full_is_lost_and_the_next_one_says_so(serve, logs) -> None:
    server = serve()
    server.free.clear()
    alarms = unlimited(server.url(), timeout_s=60.0)
    drift(alarms)
    until(lambda: server.posts)  # it has left the queue
    for number in range(1, QUEUE + 4):
        drift(alarms, number)
    assert alarms.tally == Tally(raised=QUEUE + 4, held_back=0, delivered=0, lost=3)
    assert logs[-1] == {
        "event": "an alarm is not sent to the webhook",
        "log_level": "warning",
        "kind": "drift",
        "webhook": server.url(""),
        "error": f"{QUEUE} alarms wait for it already",
    }
    server.free.set()
    until(lambda: alarms.tally.delivered == QUEUE + 1)
    drift(alarms, -1)
    alarms.close(DEADLINE_S)
    assert [told["evidence"]["number"] for told in server.told()] == [*range(QUEUE + 1), -1]
    assert server.told()[-1]["lost"] == 3
    assert alarms.tally == Tally(raised=QUEUE + 5, held_back=0, delivered=QUEUE + 2, lost=3)


def test_an_alarm_after_the_end_is_logged_and_counted(serve, logs) -> None:
    server = serve()
    alarms = Alarms(server.url(), 60.0)
    alarms.close(DEADLINE_S)
    drift(alarms)
    assert [one["event"] for one in logs] == ["alarm: the stream has changed", "an alarm is not sent to the webhook"]
    assert alarms.tally == Tally(raised=1, held_back=0, delivered=0, lost=1)
    assert server.posts == []


# --- addresses


def test_a_user_and_password_are_sent_as_such(serve) -> None:
    server = serve()
    with Alarms(server.url("/a/b?c=d", "me:p%40ss%2Fw:1@"), 60.0) as alarms:
        drift(alarms)
    (post,) = server.posts
    assert post.headers["Authorization"] == f"Basic {b64encode(b'me:p@ss/w:1').decode()}"
    assert post.headers["Host"] == f"127.0.0.1:{server.server_port}"
    assert post.path == "/a/b?c=d"


def free_port() -> int:
    """Nobody listens there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.parametrize("answer", [401, 302, 500, None, "nobody listens"])
def test_no_log_shows_more_of_an_address_than_its_host(serve, answer, logs, capfd) -> None:
    server = serve(*([answer] * 3 if answer != "nobody listens" else []))
    port = server.server_port if answer != "nobody listens" else free_port()
    with Alarms(
        f"http://hunter1:hunter2@127.0.0.1:{port}/hunter3?key=hunter4", 60.0, backoff_s=(0.0, 0.0)
    ) as alarms:  # fmt: skip
        drift(alarms)
    assert alarms.tally.lost == 1
    assert logs[-1]["webhook"] == f"http://127.0.0.1:{port}"
    said = repr((logs, alarms, capfd.readouterr()))
    assert "hunter" not in said
    assert b64encode(b"hunter1:hunter2").decode() not in said


def test_an_address_of_ipv6_is_kept_whole(logs) -> None:
    with Alarms("http://me:hunter2@[::1]:1/", 60.0, backoff_s=()) as alarms:
        drift(alarms)
    assert logs[-1]["webhook"] == "http://[::1]:1"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hunter2",
        "//host/hunter2",
        "ftp://me:hunter2@host/",
        "file:///hunter2",
        "https://",
        "https://me:hunter2@",
        "http://me:hunter2/x@host",  # the port would be hunter2
        "http://me:hunter2@[::1",
        "http://me:hunter2@host:0/",
        "http://me:hunter2@host:99999/",
        "http://me:hunter2@host/a b",
        "http://me:hunter2@host/\n",
        "http://me:hünter2hunter2@host/",
    ],
)
def test_an_address_that_is_none_is_refused_and_not_shown(url) -> None:
    with pytest.raises(ValueError, match="no http or https address such as https://host:8080/path") as raised:
        Alarms(url, 60.0)
    assert "hunter2" not in str(raised.value)
    assert raised.value.__suppress_context__  # a traceback would show what urllib said
