"""The registry's client: what it asks, what it keeps, and which answers are whose fault."""

from __future__ import annotations

import base64
import socket
import threading
from collections.abc import Iterator

import pytest

from configs.settings import SchemaRegistrySettings
from streams.decoding.exceptions import DecodingError, RegistryUnavailable
from streams.decoding.registry import FORGET_UNKNOWN_S, LARGEST_ANSWER_BYTES, RegisteredSchema, SchemaRegistry
from tests.decoding import Registry, registry_on_loopback


@pytest.fixture
def server() -> Iterator[Registry]:
    with registry_on_loopback() as registry:
        yield registry


def client(url: str, **settings: object) -> SchemaRegistry:
    return SchemaRegistry(SchemaRegistrySettings.model_validate({"url": url, **settings}))


def test_a_schema_is_asked_for_once(server):
    server.add("/schemas/ids/7", {"schema": '"string"'})
    registry = client(server.url)
    assert registry.schema(7) == registry.schema(7) == RegisteredSchema("AVRO", '"string"', ())
    assert server.asked == ["/schemas/ids/7"]


def test_references_come_with_it(server):
    to_b = {"name": "b", "subject": "b/value", "version": 2}
    to_c = {"name": "c", "subject": "c", "version": 1}
    server.add("/schemas/ids/1", {"schema": "A", "references": [to_b]})
    server.add("/subjects/b%2Fvalue/versions/2", {"schema": "B", "references": [to_c]})
    server.add("/subjects/c/versions/1", {"schema": "C"})
    inner = RegisteredSchema("AVRO", "B", (("c", RegisteredSchema("AVRO", "C", ())),))
    assert client(server.url).schema(1) == RegisteredSchema("AVRO", "A", (("b", inner),))


def test_protobuf_comes_as_descriptors(server):
    server.add("/schemas/ids/1", {"schema": "syntax…", "schemaType": "PROTOBUF"})
    server.add("/schemas/ids/1?format=serialized", {"schema": "CgE=", "schemaType": "PROTOBUF"})
    assert client(server.url).schema(1) == RegisteredSchema("PROTOBUF", "CgE=", ())


def test_an_unknown_id_is_asked_for_again_after_a_while(server):
    now = [100.0]
    registry = SchemaRegistry(SchemaRegistrySettings(url=server.url), clock=lambda: now[0])
    assert (registry.schema(9), registry.schema(9)) == (None, None)
    assert len(server.asked) == 1
    server.add("/schemas/ids/9", {"schema": "A"})
    now[0] += FORGET_UNKNOWN_S - 1
    assert registry.schema(9) is None
    now[0] += 1
    assert registry.schema(9) == RegisteredSchema("AVRO", "A", ())


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (b'{"error_code":50001,"message":"store down"}', 500, r"answers 500 \(store down\); check stream.registry.url"),
        (b'{"message":"no"}', 401, r"answers 401 \(no\); check stream.registry.username and password"),
        (b"<html>not here</html>", 404, "answers 404; check stream.registry.url"),
        (b'{"error_code":404,"message":"HTTP 404"}', 404, r"answers 404 \(HTTP 404\)"),
        (b"{}", 200, "gives no schema: is it a Confluent-compatible registry"),
        (b"moved", 302, "answers 302"),
        (b" " * (LARGEST_ANSWER_BYTES + 1), 200, "an answer of more than 16,777,216 bytes"),
    ],
    ids=str,
)  # fmt: skip
def test_any_other_answer_says_nothing_about_a_schema(server, answer, status, message):
    server.answers["/schemas/ids/1"] = status, answer
    with pytest.raises(RegistryUnavailable, match=message):
        client(server.url).schema(1)
    server.add("/schemas/ids/1", {"schema": "A"})
    assert client(server.url).schema(1) is not None


def test_a_reference_that_is_gone_is_no_fault_of_the_records(server):
    server.add("/schemas/ids/1", {"schema": "A", "references": [{"name": "b", "subject": "b", "version": 1}]})
    with pytest.raises(RegistryUnavailable, match=r"/subjects/b/versions/1, which a schema refers to, is not there"):
        client(server.url).schema(1)


def test_references_in_a_circle_end(server):
    server.add("/schemas/ids/1", {"schema": "A", "references": [{"name": "b", "subject": "b", "version": 1}]})
    server.add("/subjects/b/versions/1", {"schema": "B", "references": [{"name": "b", "subject": "b", "version": 1}]})
    with pytest.raises(RegistryUnavailable, match="more than 32 references deep"):
        client(server.url).schema(1)


def test_nobody_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(RegistryUnavailable, match=r"Connection refused; is the schema registry up"):
            client(url).schema(1)


def test_a_silent_registry_times_out():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(RegistryUnavailable, match="timed out"):
            client(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout_ms=50).schema(1)


def test_a_registry_that_speaks_no_http():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"\x15\x03\x03\x00\x02\x02\x50")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(RegistryUnavailable, match="is the schema registry up"):
            client(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_ms=2_000).schema(1)
        thread.join()


def test_the_login_is_sent_and_not_shown(server, monkeypatch):
    monkeypatch.setenv("REGISTRY_PASSWORD", "hush-hush")
    server.answers["/schemas/ids/1"] = 403, b'{"message":"no"}'
    registry = client(server.url + "/", username="anna", password={"env": "REGISTRY_PASSWORD"})
    with pytest.raises(RegistryUnavailable) as raised:
        registry.schema(1)
    assert server.headers[0]["Authorization"] == f"Basic {base64.b64encode(b'anna:hush-hush').decode()}"
    assert server.asked == ["/schemas/ids/1"]
    assert "hush-hush" not in str(raised.value) + repr(registry.__dict__)


@pytest.mark.parametrize("url", [None, "", "localhost:8081", "ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_an_address_that_is_none(url):
    with pytest.raises(DecodingError, match=r"give one such as http://127.0.0.1:8081"):
        SchemaRegistry(SchemaRegistrySettings(url=url))


def test_a_login_in_the_address_is_refused_unshown():
    with pytest.raises(DecodingError, match="holds a login") as raised:
        client("http://anna:hush-hush@127.0.0.1:8081")
    assert "hush-hush" not in str(raised.value)


def test_authorities_that_are_none(tmp_path):
    with pytest.raises(DecodingError, match=r"stream.registry.ca: .*; give a PEM file"):
        client("https://127.0.0.1:8081", ca=tmp_path / "missing.pem")
