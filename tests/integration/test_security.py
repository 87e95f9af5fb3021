"""Every way to log in, at a real broker, from settings alone, for both clients; and what a refusal says."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import shutil
import subprocess
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import (
    ACL,
    ACLFilter,
    ACLOperation,
    ACLPermissionType,
    ResourcePattern,
    ResourceType,
    UserScramCredentialUpsertion,
)
from kafka.errors import KafkaError

from configs.settings import KafkaSettings
from deploy.kafka.cluster import Cluster
from streams.kafka import topics
from streams.kafka.connection import Connection
from streams.kafka.exceptions import (
    BrokerUnreachable,
    KafkaProblem,
    LoginRefused,
    TlsRefused,
    TokenUnavailable,
    TopicError,
)
from streams.kafka.reaching import reach
from streams.kafka.topics import TopicSpec, ensure_topics
from tests.kafka_broker import create_topic, free_topic, running_cluster

PASSWORD = "the-pass=word, of ada"
"""With the two characters that SCRAM escapes in names, and a space"""
WRONG = "not-the-password-of-ada"
OPENSSL_S = 60
MODULES = "org.apache.kafka.common.security"
LISTENERS = {
    "LOGIN": "SASL_PLAINTEXT",
    "TOKEN": "SASL_PLAINTEXT",
    "TLS": "SSL",
    "MUTUAL": "SSL",
    "OTHERNAME": "SSL",
    "TLSLOGIN": "SASL_SSL",
}


@dataclass(frozen=True)
class Secured:
    """A broker with a listener for each way, and the files that clients need."""

    cluster: Cluster
    files: Path
    topic: str

    def connection(self, listener: str, **security: Any) -> Connection:
        return Connection.of(
            KafkaSettings.model_validate(
                {
                    "bootstrap": self.cluster.bootstrap_of(listener),
                    "request_timeout_ms": 10_000,
                    "security": {
                        "protocol": "plaintext" if listener == "PLAINTEXT" else LISTENERS[listener].lower(),
                        **security,
                    },
                }
            )
        )


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    directory = tmp_path_factory.mktemp("secured")
    _make_certificates(directory)
    (directory / "password").write_text(PASSWORD + "\n")
    (directory / "wrong").write_text(WRONG)
    (directory / "token").write_text(_token(seconds=3600))
    (directory / "old-token").write_text(_token(seconds=-60))
    with running_cluster(directory, listeners=LISTENERS, properties=_properties(directory)) as cluster:
        topic = create_topic(cluster.bootstrap, free_topic("security"))
        with closing(KafkaAdminClient(bootstrap_servers=cluster.bootstrap)) as admin:
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512"):
                made = admin.alter_user_scram_credentials([UserScramCredentialUpsertion("ada", mechanism, PASSWORD)])
                assert made == {"ada": None}
        yield Secured(cluster, directory, topic)


def _properties(directory: Path) -> dict[str, str]:
    login = "listener.name.login"
    token = "listener.name.token"
    plain = f'{MODULES}.plain.PlainLoginModule required user_ada="{PASSWORD}";'
    properties = {
        f"{login}.sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        f"{login}.plain.sasl.jaas.config": plain,
        f"{login}.scram-sha-256.sasl.jaas.config": f"{MODULES}.scram.ScramLoginModule required;",
        f"{login}.scram-sha-512.sasl.jaas.config": f"{MODULES}.scram.ScramLoginModule required;",
        f"{token}.sasl.enabled.mechanisms": "OAUTHBEARER",
        f"{token}.oauthbearer.sasl.jaas.config": (
            f'{MODULES}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker";'
        ),
        f"{token}.oauthbearer.sasl.server.callback.handler.class": (
            f"{MODULES}.oauthbearer.internals.unsecured.OAuthBearerUnsecuredValidatorCallbackHandler"
        ),
        "listener.name.tlslogin.sasl.enabled.mechanisms": "PLAIN",
        "listener.name.tlslogin.plain.sasl.jaas.config": plain,
        "listener.name.mutual.ssl.client.auth": "required",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",  # brokers, and whoever comes without a login
        "allow.everyone.if.no.acl.found": "true",
    }
    for listener in ("tls", "mutual", "othername", "tlslogin"):
        properties |= {
            f"listener.name.{listener}.ssl.keystore.type": "PEM",
            f"listener.name.{listener}.ssl.keystore.location": str(
                directory / ("other.both" if listener == "othername" else "broker.both")
            ),
            f"listener.name.{listener}.ssl.truststore.type": "PEM",
            f"listener.name.{listener}.ssl.truststore.location": str(directory / "ca.pem"),
        }
    return properties


def _make_certificates(directory: Path) -> None:
    """An authority; certificates of a broker for 127.0.0.1 and for another name; a client's, and its key locked."""
    if shutil.which("openssl") is None:
        message = "no openssl on PATH, which makes the certificates; Debian: apt-get install -y openssl"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=OPENSSL_S)

    for name, subject in (("ca", "test authority"), ("stranger", "nobody's authority")):
        openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={subject}",
                "-keyout", f"{name}.key", "-out", f"{name}.pem")  # fmt: skip
    for name, alternative in (("broker", "IP:127.0.0.1"), ("other", "DNS:broker.invalid"), ("client", "DNS:client")):
        (directory / f"{name}.ext").write_text(f"subjectAltName={alternative}\n")
        openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")  # fmt: skip
        openssl("x509", "-req", "-days", "2", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key",
                "-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.pem")  # fmt: skip
        both = (directory / f"{name}.key").read_text() + (directory / f"{name}.pem").read_text()
        (directory / f"{name}.both").write_text(both)
    openssl("pkcs8", "-topk8", "-in", "client.key", "-out", "client.locked.key",
            "-passout", f"pass:{PASSWORD}", "-v2", "aes256")  # fmt: skip


def _token(*, seconds: float) -> str:
    """An unsecured JSON Web Token, which the broker's handler for tests takes."""
    now = time.time()
    parts = ({"alg": "none"}, {"sub": "ada", "iat": now + min(0, seconds) - 60, "exp": now + seconds})
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    return ".".join((*encoded, ""))


WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LOGIN", {"mechanism": "plain", "username": "ada", "password": {"file": "password"}}),
    "scram-sha-256": ("LOGIN", {"mechanism": "scram-sha-256", "username": "ada", "password": {"file": "password"}}),
    "scram-sha-512": ("LOGIN", {"mechanism": "scram-sha-512", "username": "ada", "password": {"file": "password"}}),
    "oauthbearer": ("TOKEN", {"mechanism": "oauthbearer", "token": {"file": "token"}}),
    "tls": ("TLS", {"ca": "ca.pem"}),
    "tls, name not checked": ("OTHERNAME", {"ca": "ca.pem", "check_hostname": False}),
    "mutual tls": ("MUTUAL", {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key"}),
    "mutual tls, locked key": (
        "MUTUAL",
        {"ca": "ca.pem", "certificate": "client.pem", "key": "client.locked.key", "key_password": {"file": "password"}},
    ),
    "plain over tls": (
        "TLSLOGIN",
        {"ca": "ca.pem", "mechanism": "plain", "username": "ada", "password": {"file": "password"}},
    ),
}


def _placed(security: dict[str, Any], files: Path) -> dict[str, Any]:
    """The settings with the paths of this run's files."""
    placed = dict(security)
    for name in ("ca", "certificate", "key"):
        if name in placed:
            placed[name] = files / placed[name]
    for name in ("password", "token", "key_password"):
        if name in placed:
            placed[name] = {"file": files / placed[name]["file"]}
    return placed


@pytest.mark.parametrize("way", WAYS)
def test_aiokafka_produces_and_consumes(secured: Secured, way: str) -> None:
    listener, security = WAYS[way]
    connection = secured.connection(listener, **_placed(security, secured.files))
    sent = uuid.uuid4().bytes

    async def there_and_back() -> list[bytes]:
        assert await reach(connection) == {1: secured.cluster.bootstrap_of(listener)}
        async with AIOKafkaProducer(**connection.aiokafka()) as producer:
            at = await producer.send_and_wait(secured.topic, sent)
        async with AIOKafkaConsumer(secured.topic, **connection.aiokafka(), auto_offset_reset="earliest") as consumer:
            (tp,) = consumer.assignment()
            consumer.seek(tp, at.offset)
            return [(await consumer.getone()).value]

    assert asyncio.run(asyncio.wait_for(there_and_back(), 60)) == [sent]


@pytest.mark.parametrize("way", WAYS)
def test_kafka_python_produces_and_consumes(secured: Secured, way: str) -> None:
    listener, security = WAYS[way]
    options = secured.connection(listener, **_placed(security, secured.files)).kafka_python()
    sent = uuid.uuid4().bytes
    with closing(KafkaProducer(**options)) as producer:
        at = producer.send(secured.topic, sent).get(timeout=30)
    with closing(KafkaConsumer(**options, consumer_timeout_ms=30_000)) as consumer:
        consumer.assign([TopicPartition(secured.topic, 0)])
        consumer.seek(TopicPartition(secured.topic, 0), at.offset)
        assert next(consumer).value == sent


def refusal(connection: Connection) -> KafkaProblem:
    with pytest.raises(KafkaProblem) as caught:
        asyncio.run(asyncio.wait_for(reach(connection), 60))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("mechanism", ["plain", "scram-sha-256", "scram-sha-512"])
def test_a_wrong_password_says_whose_and_where_it_is(
    secured: Secured, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rule = {"file": secured.files / "wrong"}
    connection = secured.connection("LOGIN", mechanism=mechanism, username="ada", password=rule)
    problem = refusal(connection)
    assert isinstance(problem, LoginRefused)
    assert str(problem) == (
        f"{connection.bootstrap[0]} does not accept user 'ada'; check kafka.security.username, and that a user of "
        f"{mechanism.upper()} has this password (the secret is in the file {secured.files}/wrong)"
    )
    assert "SaslAuthenticateRequest" in caplog.text  # the login was logged, but
    _assert_hidden(WRONG, caplog, connection, problem)


@pytest.mark.parametrize("way", ["plain", "scram-sha-256", "oauthbearer"])
def test_no_log_has_the_secret_of_a_login_that_succeeds(
    secured: Secured, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    listener, security = WAYS[way]
    connection = secured.connection(listener, **_placed(security, secured.files))
    secret = (secured.files / ("token" if way == "oauthbearer" else "password")).read_text().strip()
    asyncio.run(asyncio.wait_for(reach(connection), 60))
    with closing(KafkaAdminClient(**connection.kafka_python())) as admin:
        assert admin.describe_cluster()["brokers"]
    assert caplog.text.count("SaslAuthenticateRequest") >= 2
    _assert_hidden(secret, caplog, connection)


def test_an_old_token_is_refused_in_words(secured: Secured, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    connection = secured.connection("TOKEN", mechanism="oauthbearer", token={"file": secured.files / "old-token"})
    problem = refusal(connection)
    assert isinstance(problem, LoginRefused)
    assert "does not accept the token; check its issuer, audience and scope, and whether it is over" in str(problem)
    _assert_hidden((secured.files / "old-token").read_text(), caplog, connection, problem)


@pytest.mark.parametrize("mechanism", ["plain", "scram-sha-256"])
def test_kafka_python_hides_a_wrong_password_too(
    secured: Secured, mechanism: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    rule = {"file": secured.files / "wrong"}
    connection = secured.connection("LOGIN", mechanism=mechanism, username="ada", password=rule)
    with pytest.raises(KafkaError) as caught:
        KafkaAdminClient(**connection.kafka_python(), bootstrap_timeout_ms=1000)
    assert "Starting KafkaAdminClient with configuration" in caplog.text
    _assert_hidden(WRONG, caplog, connection.kafka_python(), caught.value)


def _assert_hidden(secret: str, caplog: pytest.LogCaptureFixture, *things: object) -> None:
    texts = [caplog.text, *(f"{thing} {thing!r}" for thing in things)]
    texts += ["".join(traceback.format_exception(thing)) for thing in things if isinstance(thing, BaseException)]
    for text in texts:
        assert secret not in text
        assert base64.b64encode(secret.encode()).decode() not in text


def test_a_token_is_read_again_for_each_login(secured: Secured, tmp_path: Path) -> None:
    place = tmp_path / "token"
    place.write_text(_token(seconds=-60))
    connection = secured.connection("TOKEN", mechanism="oauthbearer", token={"file": place})
    assert isinstance(refusal(connection), LoginRefused)
    place.write_text(_token(seconds=3600))
    assert asyncio.run(reach(connection))


class _Endpoint(BaseHTTPRequestHandler):
    """A token endpoint that counts and gives unsecured tokens."""

    def do_POST(self) -> None:
        form = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.asked.append((self.headers["Authorization"], form))  # type: ignore[attr-defined]
        body = json.dumps({"access_token": _token(seconds=3600), "token_type": "bearer", "expires_in": 3600}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a test's output is its own."""


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endpoint)
    server.asked = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_tokens_are_fetched_once_for_all_clients(secured: Secured, endpoint: Any) -> None:
    connection = secured.connection(
        "TOKEN", mechanism="oauthbearer", username="ada", password={"file": secured.files / "password"},
        token_url=f"http://127.0.0.1:{endpoint.server_port}/token", token_scope="kafka read",
    )  # fmt: skip
    asyncio.run(reach(connection))
    with closing(KafkaAdminClient(**connection.kafka_python())) as admin:
        assert admin.describe_cluster()["brokers"]
    pair = base64.b64encode(b"ada:the-pass%3Dword%2C+of+ada").decode()
    assert endpoint.asked == [(f"Basic {pair}", "grant_type=client_credentials&scope=kafka+read")]


def test_an_endpoint_that_is_down_is_named(secured: Secured, endpoint: Any) -> None:
    endpoint.server_close()
    connection = secured.connection(
        "TOKEN", mechanism="oauthbearer", username="ada", password={"file": secured.files / "password"},
        token_url=f"http://127.0.0.1:{endpoint.server_port}/token",
    )  # fmt: skip
    problem = refusal(connection)
    assert isinstance(problem, TokenUnavailable)
    assert f"http://127.0.0.1:{endpoint.server_port}/token cannot be reached" in str(problem)


def test_a_certificate_for_another_name_is_refused(secured: Secured) -> None:
    problem = refusal(secured.connection("OTHERNAME", ca=secured.files / "ca.pem"))
    assert isinstance(problem, TlsRefused)
    assert "the broker's certificate is for another name; use a name of the certificate in kafka.bootstrap" in str(
        problem
    )


def test_an_unknown_authority_is_refused(secured: Secured) -> None:
    problem = refusal(secured.connection("TLS", ca=secured.files / "stranger.pem"))
    assert isinstance(problem, TlsRefused)
    assert "the broker's certificate is not trusted" in str(problem)
    assert "set kafka.security.ca" in str(problem)


def test_a_missing_client_certificate_is_named(secured: Secured) -> None:
    problem = refusal(secured.connection("MUTUAL", ca=secured.files / "ca.pem"))
    assert isinstance(problem, TlsRefused)
    assert "set kafka.security.certificate and key to a pair that the brokers trust" in str(problem)


@pytest.mark.parametrize(("protocol", "listener"), [("ssl", "PLAINTEXT"), ("plaintext", "TLS"), ("plaintext", "LOGIN")])
def test_the_wrong_protocol_is_named(secured: Secured, protocol: str, listener: str) -> None:
    settings = {"bootstrap": secured.cluster.bootstrap_of(listener), "security": {"protocol": protocol}}
    problem = refusal(Connection.of(KafkaSettings.model_validate(settings)))
    assert isinstance(problem, BrokerUnreachable)
    assert f"the listener may want another kafka.security.protocol than {protocol}" in str(problem)


def test_a_mechanism_that_is_not_offered_is_named(secured: Secured) -> None:
    rule = {"file": secured.files / "password"}
    problem = refusal(secured.connection("TOKEN", mechanism="plain", username="ada", password=rule))
    assert isinstance(problem, LoginRefused)
    assert "does not offer PLAIN; set kafka.security.mechanism" in str(problem)


def test_a_login_where_none_is_taken_is_named(secured: Secured) -> None:
    settings = {
        "bootstrap": secured.cluster.bootstrap,
        "security": {
            "protocol": "sasl_plaintext", "mechanism": "plain", "username": "ada",
            "password": {"file": secured.files / "password"},
        },
    }  # fmt: skip
    problem = refusal(Connection.of(KafkaSettings.model_validate(settings)))
    assert isinstance(problem, LoginRefused)
    assert "takes no login; set kafka.security.protocol to plaintext or ssl" in str(problem)


@pytest.mark.parametrize(
    ("allowed", "create", "words"),
    [
        ([], False, "does not exist, or user ada may not see it; make it with: kafka-topics.sh"),
        (
            [],
            True,
            "exist, but have no leader after 1 s, or may not be seen; see the brokers' logs, and grant Describe",
        ),
        ([ACLOperation.DESCRIBE], True, "no right to DescribeConfigs; grant it with: kafka-acls.sh"),
    ],
)
def test_a_right_that_is_missing_is_named(
    secured: Secured, monkeypatch: pytest.MonkeyPatch, allowed: list[ACLOperation], create: bool, words: str
) -> None:
    topic = create_topic(secured.cluster.bootstrap, free_topic("rights"))
    pattern = ResourcePattern(ResourceType.TOPIC, topic)
    rules = [ACL("User:ada", "*", operation, ACLPermissionType.ALLOW, pattern) for operation in allowed]
    rules.append(ACL("User:other", "*", ACLOperation.ALL, ACLPermissionType.ALLOW, pattern))
    connection = secured.connection(
        "LOGIN", mechanism="plain", username="ada", password={"file": secured.files / "password"}
    )
    with closing(KafkaAdminClient(bootstrap_servers=secured.cluster.bootstrap)) as admin:
        admin.create_acls(rules)
    monkeypatch.setattr(topics, "READY_S", 1.0)
    with pytest.raises(TopicError) as caught:
        asyncio.run(ensure_topics(connection, [TopicSpec(topic, "stream.topic")], create=create, replication=1))
    assert topic in str(caught.value)
    assert words in str(caught.value)


def test_a_topic_that_may_not_be_made_is_named_with_the_right_to_grant(secured: Secured) -> None:
    cluster = ResourcePattern(ResourceType.CLUSTER, "kafka-cluster")
    rule = ACL("User:ada", "*", ACLOperation.CREATE, ACLPermissionType.DENY, cluster)
    topic = free_topic("rights")
    connection = secured.connection(
        "LOGIN", mechanism="plain", username="ada", password={"file": secured.files / "password"}
    )
    with closing(KafkaAdminClient(bootstrap_servers=secured.cluster.bootstrap)) as admin:
        own = ResourcePattern(ResourceType.TOPIC, topic)
        admin.create_acls([rule, ACL("User:other", "*", ACLOperation.ALL, ACLPermissionType.ALLOW, own)])
        try:
            with pytest.raises(TopicError) as caught:
                asyncio.run(ensure_topics(connection, [TopicSpec(topic, "stream.topic")], create=True, replication=1))
        finally:
            admin.delete_acls([ACLFilter("User:ada", "*", ACLOperation.CREATE, ACLPermissionType.DENY, cluster)])
    assert str(caught.value) == (
        f"topic {topic}: no right to Create; grant it with: kafka-acls.sh --bootstrap-server {connection.bootstrap[0]} "
        f"--command-config client.properties --add --allow-principal User:ada --operation Create --topic {topic}"
    )
