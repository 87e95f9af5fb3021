"""What a worker's log looks like, what it never shows, and how it deals with repetition."""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from urllib.parse import quote

import pytest
import structlog

from configs.settings import SecretRule
from streams.kafka.secrets import read_secret
from streams.live.logs import OWN_LOGGERS, RepeatLimit, Secrets, configure_logs


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def secrets() -> Secrets:
    return Secrets()


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in OWN_LOGGERS}
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name, own in levels.items():
        logging.getLogger(name).setLevel(own)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def stream(secrets: Secrets, clock: Clock) -> io.StringIO:
    written = io.StringIO()
    configure_logs(written, secrets, worker="w-1", clock=clock)
    return written


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def events(stream: io.StringIO) -> list[object]:
    return [line["event"] for line in lines(stream)]


own = structlog.get_logger("coldstream")


# --- what a line looks like ---


def test_a_line_is_one_json_object_with_time_level_logger_and_worker(stream):
    before = datetime.now(UTC)
    own.info("partition %s", "open", partition=3, seconds=0.5)
    (line,) = lines(stream)
    told = datetime.fromisoformat(str(line.pop("timestamp")))
    assert abs((told - before).total_seconds()) < 5
    assert line == {
        "event": "partition open",
        "partition": 3,
        "seconds": 0.5,
        "level": "info",
        "logger": "coldstream",
        "worker": "w-1",
    }


def test_libraries_are_heard_from_warnings_on_and_own_loggers_from_info_on(stream):
    for name in ("aiokafka.conn", "faust.app", "kafka", "mode.worker", "somebody.else"):
        logging.getLogger(name).info("chatter")
        logging.getLogger(name).warning("bad %s", name)
    for name in OWN_LOGGERS:
        logging.getLogger(f"{name}.part").debug("detail")
        logging.getLogger(f"{name}.part").info("news")
    own.debug("detail")
    assert [(line["logger"], line["level"]) for line in lines(stream)] == [
        *((name, "warning") for name in ("aiokafka.conn", "faust.app", "kafka", "mode.worker", "somebody.else")),
        *((f"{name}.part", "info") for name in OWN_LOGGERS),
    ]
    assert lines(stream)[0]["event"] == "bad aiokafka.conn"


def test_context_variables_are_fields(stream):
    structlog.contextvars.bind_contextvars(partition=9)
    own.info("x")
    assert lines(stream)[0]["partition"] == 9


@pytest.mark.parametrize("name", ["coldstream", "aiokafka"])
def test_a_traceback_is_one_field_and_shows_no_variables(stream, name):
    def fail(password: str) -> None:
        raise ValueError("broken")

    try:
        fail("local-to-the-frame")
    except ValueError:
        (own if name == "coldstream" else logging.getLogger(name)).exception("it failed")
    (line,) = lines(stream)
    assert line["event"] == "it failed"
    assert str(line["exception"]).startswith("Traceback (most recent call last):\n")
    assert str(line["exception"]).endswith("ValueError: broken")
    assert "local-to-the-frame\n" not in stream.getvalue()
    assert "password = " not in stream.getvalue()


def test_a_terminal_gets_text(secrets):
    terminal = Terminal()
    configure_logs(terminal, secrets)
    own.warning("it is late", longest_ms=250)
    text = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    assert re.fullmatch(r"\S+Z \[warning *\] it is late +\[coldstream\] longest_ms=250\n", text)


def test_configuring_again_replaces_what_there_was(stream, secrets):
    other = io.StringIO()
    configure_logs(other, secrets)
    own.info("x")
    logging.getLogger("aiokafka").warning("y")
    assert stream.getvalue() == ""
    assert events(other) == ["x", "y"]
    assert "worker" not in lines(other)[0]


# --- secrets ---


SECRET = 'h"unt\\er2-ü'


def test_a_secret_is_blotted_out_wherever_it_comes_up(stream, secrets):
    secrets.add(SECRET)
    own.info(f"in the text {SECRET}", field=SECRET, deep={"list": [("x", f"a{SECRET}b")]}, thing=ValueError(SECRET))
    logging.getLogger("aiokafka").warning("as argument %s", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        own.exception("in an error")
    assert "unt" not in stream.getvalue()
    first, argument, error = lines(stream)
    assert first["event"] == "in the text ***"
    assert first["field"] == "***"
    assert first["deep"] == {"list": [["x", "a***b"]]}
    assert first["thing"] in ("ValueError('***')", 'ValueError("***")')
    assert argument["event"] == "as argument ***"
    assert str(error["exception"]).endswith("ValueError: ***")


@pytest.mark.parametrize("written", [str, repr, json.dumps, quote, lambda secret: repr(secret.encode())])
def test_a_secret_is_found_in_whatever_way_it_is_escaped(secrets, written):
    secrets.add(SECRET)
    assert secrets.blot(f"<{written(SECRET)}>").replace("b", "").translate(str.maketrans("", "", "'\"")) == "<***>"


def test_secrets_of_clients_stay_hidden_though_nobody_told_of_them(stream, monkeypatch):
    monkeypatch.setenv("E_PASSWORD", "correct-horse")
    secret = read_secret(SecretRule(env="E_PASSWORD"), "kafka.security.password")
    own.info("x %s", secret, held=secret, several=[secret])
    assert "correct-horse" not in stream.getvalue()


def test_fields_are_blotted_by_name_and_addresses_and_passwords_by_form(stream):
    own.info("x", sasl_plain_password="abc", api={"Authorization": "Bearer abc"}, access_token="abc", partition="abc")
    logging.getLogger("kafka").warning("at https://user:abc@registry:8081/x, username='u' password='a b c' end")
    named, formed = lines(stream)
    assert {key: named[key] for key in ("sasl_plain_password", "api", "access_token", "partition")} == {
        "sasl_plain_password": "***",
        "api": {"Authorization": "***"},
        "access_token": "***",
        "partition": "abc",
    }
    assert formed["event"] == "at https://***@registry:8081/x, username='u' password=*** end"


def test_a_secret_that_is_part_of_another_leaves_nothing_of_it(secrets):
    for secret in ("abcd", "abcdefgh", "abcd", "xyz"):
        secrets.add(secret)
    assert secrets.blot("abcdefgh abcd xyz") == "*** *** xyz"
    assert repr(secrets) == "Secrets(2 forms)"


# --- repetition ---


def test_a_thing_is_let_through_once_in_an_interval_with_how_often_it_was_kept_back(clock):
    limit = RepeatLimit(60.0, 10, clock)
    answers = []
    for now in (0.0, 1.0, 59.9, 60.0, 61.0, 300.0):
        clock.now = now
        answers.append(limit.admit("a"))
    assert answers == [0, None, None, 2, None, 1]


def test_different_things_do_not_wait_for_each_other_and_only_so_many_are_remembered(clock):
    limit = RepeatLimit(60.0, 2, clock)
    assert [limit.admit(thing) for thing in "abab"] == [0, 0, None, None]
    assert limit.admit("c") == 0
    assert [limit.admit(thing) for thing in "bca"] == [None, None, 0]
    assert len(limit._seen) == 2


def test_warnings_that_say_the_same_are_kept_back_and_others_are_not(stream, clock):
    for _ in range(3):
        own.warning("late", partition=1)
        own.warning("late", partition=2)
        own.info("news")
        logging.getLogger("aiokafka").error("no broker %d", 1)
        logging.getLogger("faust").error("no broker %d", 1)
        logging.getLogger("faust").critical("the end")
    assert events(stream).count("late") == 2
    assert events(stream).count("news") == 3
    assert events(stream).count("no broker 1") == 2
    assert events(stream).count("the end") == 3
    clock.now = 60.0
    own.warning("late", partition=1)
    logging.getLogger("aiokafka").error("no broker %d", 1)
    assert [(line["event"], line["kept_back"]) for line in lines(stream)[-2:]] == [("late", 2), ("no broker 1", 2)]
    assert "kept_back" not in lines(stream)[0]


def test_the_same_words_about_another_error_are_told(stream):
    for error in (OSError("disk full"), OSError("disk full"), OSError("no such file")):
        for logger in (own, logging.getLogger("aiokafka")):
            try:
                raise error
            except OSError:
                logger.exception("it failed")
    assert [(line["logger"], str(line["exception"]).splitlines()[-1]) for line in lines(stream)] == [
        ("coldstream", "OSError: disk full"),
        ("aiokafka", "OSError: disk full"),
        ("coldstream", "OSError: no such file"),
        ("aiokafka", "OSError: no such file"),
    ]
