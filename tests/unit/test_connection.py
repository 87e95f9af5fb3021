"""What clients are given, from settings; secrets; tokens. No broker."""

from __future__ import annotations

import asyncio
import copy
import json
import logging
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiokafka.errors import KafkaConnectionError, SaslAuthenticationFailed
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from configs.settings import KafkaSettings, SecretRule
from streams.kafka import reaching
from streams.kafka.connection import Connection
from streams.kafka.exceptions import (
    BrokerUnreachable,
    KafkaProblem,
    LoginRefused,
    SecretMissing,
    TlsRefused,
    TokenUnavailable,
    WrongSecurity,
)
from streams.kafka.reaching import explained, reach
from streams.kafka.secrets import Secret, hide_logins_in_logs, read_secret
from streams.kafka.tokens import FetchedTokens, LoopTokens, PlacedTokens, thread_tokens

PASSWORD = "correct horse battery staple"


def connection(**kafka: Any) -> Connection:
    return Connection.of(KafkaSettings.model_validate(kafka))


@pytest.fixture
def password(tmp_path: Path) -> dict[str, Path]:
    path = tmp_path / "password"
    path.write_text(PASSWORD + "\n")
    return {"file": path}


def test_a_plain_connection() -> None:
    plain = connection(bootstrap="one:9092, two:9093", client_id="me", request_timeout_ms=5000)
    expected = {
        "bootstrap_servers": ["one:9092", "two:9093"],
        "client_id": "me",
        "security_protocol": "PLAINTEXT",
        "request_timeout_ms": 5000,
    }
    assert plain.aiokafka() == plain.kafka_python() == expected
    assert plain.faust_broker_url("batch") == ["batch://one:9092", "batch://two:9093"]
    assert plain.faust_credentials() is None


@pytest.mark.parametrize("mechanism", ["plain", "scram-sha-256", "scram-sha-512"])
def test_a_password(mechanism: str, password: dict[str, Path]) -> None:
    login = connection(
        security={"protocol": "sasl_ssl", "mechanism": mechanism, "username": "ada", "password": password}
    )
    options = login.aiokafka()
    assert options["security_protocol"] == "SASL_SSL"
    assert options["sasl_mechanism"] == mechanism.upper()
    assert options["sasl_plain_username"] == "ada"
    assert options["sasl_plain_password"].encode() == PASSWORD.encode()
    assert options["ssl_context"].check_hostname
    assert options["ssl_context"].verify_mode == ssl.CERT_REQUIRED
    assert options == login.kafka_python()


@pytest.mark.parametrize("protocol", ["plaintext", "ssl", "sasl_plaintext", "sasl_ssl"])
def test_faust_hands_aiokafka_the_same(protocol: str, password: dict[str, Path]) -> None:
    sasl = {"mechanism": "scram-sha-512", "username": "ada", "password": password}
    made = connection(security={"protocol": protocol, **(sasl if protocol.startswith("sasl") else {})})
    given = credentials_to_aiokafka_auth(made.faust_credentials())
    ours = made.aiokafka()
    assert {name: value for name, value in given.items() if value is not None} == {
        name: ours[name] for name in ours if name.startswith(("sasl", "ssl", "security"))
    }


def test_faust_hands_aiokafka_the_tokens(password: dict[str, Path]) -> None:
    made = connection(
        security={"protocol": "sasl_plaintext", "mechanism": "oauthbearer", "token": _token_file(password)}
    )
    given = credentials_to_aiokafka_auth(made.faust_credentials())
    assert given["sasl_mechanism"] == "OAUTHBEARER"
    assert asyncio.run(given["sasl_oauth_token_provider"].token()) == "abc.def."


def _token_file(password: dict[str, Path]) -> dict[str, Path]:
    path = password["file"].with_name("token")
    path.write_text("abc.def.")
    return {"file": path}


def test_the_name_is_not_checked_but_the_authority_is() -> None:
    context = connection(security={"protocol": "ssl", "check_hostname": False}).aiokafka()["ssl_context"]
    assert (context.check_hostname, context.verify_mode) == (False, ssl.CERT_REQUIRED)


@pytest.mark.parametrize(
    "address", ["", "broker", "broker:", ":9092", "broker:0", "broker:99999", "kafka://broker:9092"]
)
def test_an_address_that_is_none_is_named(address: str) -> None:
    with pytest.raises(WrongSecurity, match="is no address; write host:port"):
        connection(bootstrap=[address])


def test_no_address_at_all() -> None:
    with pytest.raises(WrongSecurity, match="name at least one broker"):
        connection(bootstrap=[])


def test_a_secret_comes_from_a_file_without_its_last_line_end(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    for content, secret in {b" a b \n": " a b ", b"a\r\n": "a", "ä".encode(): "ä"}.items():
        path.write_bytes(content)
        assert read_secret(SecretRule(file=path), "x").reveal() == secret


def test_a_secret_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "a")
    assert read_secret(SecretRule(env="SECRET_OF_A_TEST"), "x").reveal() == "a"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty or not set; put the secret there"),
        (b"\n", "is empty or not set; put the secret there"),
        (b"a\nb\n", "holds more than one line, or a control character"),
        (b"\xff", "is not UTF-8 text"),
        (b"a" * 70_000, "is larger than 65,536 bytes: it is no secret"),
        (None, "No such file or directory; check the path and its rights"),
    ],
)
def test_a_file_that_holds_no_secret(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SecretMissing) as caught:
        connection(
            security={"protocol": "sasl_plaintext", "mechanism": "plain", "username": "a", "password": {"file": path}}
        )
    assert str(caught.value).startswith("kafka.security.password: ")
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECRET_OF_A_TEST", raising=False)
    with pytest.raises(SecretMissing, match="the environment variable SECRET_OF_A_TEST is empty or not set"):
        connection(
            security={"protocol": "sasl_plaintext", "mechanism": "oauthbearer", "token": {"env": "SECRET_OF_A_TEST"}}
        )


def test_a_secret_shows_nowhere() -> None:
    secret = Secret(PASSWORD)
    shown = [
        f"{secret}",
        f"{secret!r}",
        f"{secret:>40}",
        str(secret),
        repr({"a": [secret]}),
    ]
    assert not [text for text in shown if PASSWORD in text]
    assert secret.reveal() == copy.deepcopy(secret).reveal() == PASSWORD
    assert type(secret.reveal()) is str


def test_nothing_that_holds_a_secret_shows_it(password: dict[str, Path]) -> None:
    base = {"username": "ada", "password": password}
    login = connection(security={"protocol": "sasl_ssl", "mechanism": "plain", **base})
    bearer = connection(
        security={"protocol": "sasl_ssl", "mechanism": "oauthbearer", "token_url": "https://idp.invalid/t", **base}
    )
    for holder in (login, bearer):
        for thing in (holder, holder.aiokafka(), holder.kafka_python(), holder.faust_credentials(), holder.tokens):
            assert PASSWORD not in f"{thing} {thing!r}"


def test_clients_logs_do_not_show_logins(caplog: pytest.LogCaptureFixture) -> None:
    class SaslAuthenticateRequest:
        def __repr__(self) -> str:
            return PASSWORD

    hide_logins_in_logs()
    caplog.set_level(logging.DEBUG)
    for name in ("aiokafka.conn", "kafka.net.connection", "kafka.protocol.parser"):
        logging.getLogger(name).debug("%d: %s, %s, %s", 1, SaslAuthenticateRequest(), PASSWORD.encode(), "other")
    assert [record.getMessage() for record in caplog.records] == [
        f"1: SaslAuthenticateRequest(hidden), {len(PASSWORD)} bytes, other"
    ] * 3


@pytest.mark.parametrize("setting", ["ca", "certificate", "key"])
def test_a_missing_file_is_named(tmp_path: Path, setting: str) -> None:
    there = tmp_path / "there"
    there.touch()
    files = {"certificate": there, "key": there, setting: tmp_path / "gone"}
    with pytest.raises(WrongSecurity, match="gone: No such file or directory; check the path and its rights"):
        connection(security={"protocol": "ssl", **files})


@pytest.mark.parametrize("setting", ["ca", "certificate"])
def test_a_file_that_is_no_pem_is_named(tmp_path: Path, setting: str) -> None:
    path = tmp_path / "file.der"
    path.write_bytes(b"\x30\x82")
    files = {"ca": path} if setting == "ca" else {"certificate": path, "key": path}
    with pytest.raises(WrongSecurity, match=r"file\.der .*PEM"):
        connection(security={"protocol": "ssl", **files})


def test_a_password_is_not_sent_in_the_clear_to_a_token_endpoint(password: dict[str, Path]) -> None:
    with pytest.raises(WrongSecurity, match=r"http://idp\.invalid/t would send the password in the clear; use https"):
        connection(
            security={
                "protocol": "sasl_ssl", "mechanism": "oauthbearer", "token_url": "http://idp.invalid/t",
                "username": "a", "password": password,
            }
        )  # fmt: skip


# --- tokens


class Endpoint:
    """A token endpoint on loopback that gives what it is told to, and counts."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body: object = {"access_token": "first", "expires_in": 100}
        self.asked = 0
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.asked += 1
                text = endpoint.body if isinstance(endpoint.body, bytes) else json.dumps(endpoint.body).encode()
                self.send_response(endpoint.status)
                for name, value in {"Content-Length": str(len(text)), **endpoint.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing: a test's output is its own."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/token"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    thread = threading.Thread(target=made.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        thread.join()
        made.server.server_close()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_token_is_kept_until_most_of_its_life_is_over(endpoint: Endpoint) -> None:
    clock = Clock()
    tokens = FetchedTokens(endpoint.url, "me", Secret(PASSWORD), clock=clock)
    assert tokens.token().reveal() == "first"
    endpoint.body = {"access_token": "second", "expires_in": 100}
    clock.now = 79.9
    assert tokens.token().reveal() == "first"
    clock.now = 80.0
    assert tokens.token().reveal() == "second"
    assert endpoint.asked == 2


def test_an_old_token_serves_while_the_endpoint_is_down_and_until_it_is_over(endpoint: Endpoint) -> None:
    clock = Clock()
    tokens = FetchedTokens(endpoint.url, "me", Secret(PASSWORD), clock=clock)
    tokens.token()
    endpoint.status = 503
    clock.now = 99.9
    assert tokens.token().reveal() == "first"
    clock.now = 100.0
    with pytest.raises(TokenUnavailable, match="answered 503; try again later"):
        tokens.token()


def test_many_threads_fetch_one_token(endpoint: Endpoint) -> None:
    tokens = FetchedTokens(endpoint.url, "me", Secret(PASSWORD))
    threads = [threading.Thread(target=tokens.token) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert endpoint.asked == 1


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (401, {}, "answered 401: it does not accept the client 'me'; check username, password and token_scope"),
        (307, {}, "answered 307: a redirection, which would give the password to somebody else"),
        (200, b"<html>", "the answer is no JSON"),
        (200, [], "the answer is no JSON object"),
        (200, {"expires_in": 5}, "has no access_token that could be used"),
        (200, {"access_token": "a", "expires_in": "soon"}, "has no access_token that could be used"),
        (200, {"access_token": "a\x01b"}, "the token is no token"),
        (200, {"access_token": ""}, "the token is no token"),
    ],
)
def test_an_answer_without_a_token(endpoint: Endpoint, status: int, body: object, message: str) -> None:
    endpoint.status, endpoint.body = status, body
    endpoint.headers = {"Location": f"{endpoint.url}/elsewhere"} if status == 307 else {}
    with pytest.raises(TokenUnavailable) as caught:
        FetchedTokens(endpoint.url, "me", Secret(PASSWORD)).token()
    assert message in str(caught.value)
    assert PASSWORD not in str(caught.value)
    assert endpoint.asked == 1


def test_a_missing_token_is_an_error_that_clients_try_again_after(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="check the path and its rights") as caught:
        PlacedTokens(SecretRule(file=tmp_path / "gone")).token()
    assert isinstance(caught.value, TokenUnavailable)


def test_both_clients_get_plain_text(password: dict[str, Path]) -> None:
    tokens = PlacedTokens(SecretRule(file=_token_file(password)["file"]))
    given = [asyncio.run(LoopTokens(tokens).token()), thread_tokens(tokens).token()]
    assert given == ["abc.def."] * 2
    assert {type(token) for token in given} == {str}


# --- what errors mean


def _certificate_error(code: int) -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_code, error.verify_message = code, "certificate has expired"
    return error


def _caused(cause: Exception) -> Exception:
    error = KafkaConnectionError("Connection at x closed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (lambda: _certificate_error(62), TlsRefused, "the broker's certificate is for another name"),
        (lambda: _certificate_error(10), TlsRefused, "is not trusted: certificate has expired; set kafka.security.ca"),
        (lambda: _caused(SaslAuthenticationFailed("no")), LoginRefused, "does not accept user None"),
        (lambda: socket.gaierror(-2, "Name or service not known"), BrokerUnreachable, "no machine has this name"),
        (lambda: ConnectionRefusedError(111, "refused"), BrokerUnreachable, "nothing listens there; start the broker"),
        (lambda: OSError(113, "No route to host"), BrokerUnreachable, "No route to host; check kafka.bootstrap"),
        (TimeoutError, BrokerUnreachable, "no answer in time"),
        (lambda: _caused(EOFError()), BrokerUnreachable, "the connection was closed"),
        (lambda: _caused(TokenUnavailable("no token")), TokenUnavailable, "no token"),
    ],
)
def test_an_exception_is_explained(error: Callable[[], Exception], kind: type[KafkaProblem], words: str) -> None:
    problem = explained(error(), "broker:9092", connection())
    assert type(problem) is kind
    assert words in str(problem)


def test_all_addresses_are_tried_and_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: refuses connections, and nobody else gets it
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BrokerUnreachable) as caught:
            asyncio.run(reach(connection(bootstrap=[address, address])))
    assert str(caught.value).count(f"{address}: nothing listens there") == 2


@pytest.mark.parametrize("reachable", [True, False])
def test_brokers_that_say_they_are_elsewhere(monkeypatch: pytest.MonkeyPatch, reachable: bool) -> None:
    """A broker behind a container's network answers, and then sends its clients to a name that only it knows."""

    async def ask(connection: Connection, host: str, port: int, timeout_s: float) -> dict[int, str]:
        if host == "outside" or (reachable and host == "inside-2"):
            return {1: "inside-1:9092", 2: "inside-2:9092"}
        raise BrokerUnreachable(f"{host}:{port}: no machine has this name; check kafka.bootstrap")

    monkeypatch.setattr(reaching, "_ask", ask)
    outside = connection(bootstrap="outside:9092")
    if reachable:
        assert asyncio.run(reach(outside)) == {1: "inside-1:9092", 2: "inside-2:9092"}
        return
    with pytest.raises(BrokerUnreachable) as caught:
        asyncio.run(reach(outside))
    assert str(caught.value) == (
        "outside:9092 answers, but says that the brokers are at inside-1:9092, inside-2:9092, where none can be used "
        "from here (inside-1:9092: no machine has this name; check kafka.bootstrap); check advertised.listeners of the "
        "brokers, or this machine's name service"
    )


def test_a_silent_address_ends_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(BrokerUnreachable, match="no answer in time; check the address"):
            asyncio.run(reach(connection(bootstrap=[address]), timeout_s=0.2))
