"""One connection to a broker, tried before anything else is: what the clients then say becomes one line of advice."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

from aiokafka import errors
from aiokafka.conn import AIOKafkaConnection, collect_hosts, create_conn
from aiokafka.protocol.metadata import MetadataRequest

from streams.kafka.connection import Connection
from streams.kafka.exceptions import BrokerUnreachable, KafkaProblem, LoginRefused, TlsRefused

TIMEOUT_S = 10.0
"""For one address. A broker that answers does so in milliseconds."""
ANOTHER_NAME = (62, 64)
"""OpenSSL's codes for a certificate that is for another host or address"""


async def reach(connection: Connection, *, timeout_s: float = TIMEOUT_S) -> dict[int, str]:
    """Logs in at the first bootstrap address that answers, and at a broker of those that the answer names.

    Returns:
        Each broker's id -> ``host:port`` as it wants to be reached.

    Raises:
        BrokerUnreachable, TlsRefused, LoginRefused, TokenUnavailable: with what to check.
    """
    problems: list[KafkaProblem] = []
    for host, port, _ in collect_hosts(list(connection.bootstrap), randomize=False):
        try:
            brokers = await _ask(connection, host, port, timeout_s)
        except KafkaProblem as problem:
            problems.append(problem)
            continue
        await _require_advertised(connection, brokers, f"{host}:{port}", timeout_s)
        return brokers
    telling = [problem for problem in problems if not isinstance(problem, BrokerUnreachable)]
    if telling:
        raise telling[0]
    raise BrokerUnreachable("no broker answers: " + "; ".join(map(str, problems)))


async def _ask(connection: Connection, host: str, port: int, timeout_s: float) -> dict[int, str]:
    """The brokers that this one knows."""
    where = f"{host}:{port}"
    link: AIOKafkaConnection | None = None
    try:
        link = await create_conn(
            host, port, request_timeout_ms=round(timeout_s * 1000), **connection.aiokafka_connection()
        )
        answer = await link.send(MetadataRequest([]))
        if not answer.brokers and connection.tokens is not None:
            # A broker names at least itself to who is logged in. To a refused token it answers without an error, which
            # aiokafka takes for a login (RFC 7628 §3.2.3 has the client ask for the error).
            raise LoginRefused(_about_login(where, connection))
        return {node: f"{name}:{at}" for node, name, at, *_ in answer.brokers}
    except KafkaProblem:
        raise
    except (OSError, EOFError, TimeoutError, errors.KafkaError, ValueError) as error:
        raise explained(error, where, connection) from None
    finally:
        if link is not None:
            await link.close()


async def _require_advertised(connection: Connection, brokers: dict[int, str], asked: str, timeout_s: float) -> None:
    """At least one broker can be reached where it says it is; clients go there, and never to a bootstrap address."""
    if not brokers or asked in brokers.values():
        return
    problems: list[KafkaProblem] = []
    for address in brokers.values():
        host, _, port = address.rpartition(":")
        try:
            await _ask(connection, host, int(port), timeout_s)
            return
        except KafkaProblem as problem:
            problems.append(problem)
    raise BrokerUnreachable(
        f"{asked} answers, but says that the brokers are at {', '.join(brokers.values())}, where none can be used from "
        f"here ({problems[0]}); check advertised.listeners of the brokers, or this machine's name service"
    )


def explained(error: BaseException, where: str, connection: Connection) -> KafkaProblem:
    """What a client's exception means, and what to do. Never has a secret."""
    for cause in _causes(error):
        match cause:
            case KafkaProblem():
                return cause
            case ssl.SSLCertVerificationError():
                return TlsRefused(_about_certificate(cause, where))
            case ssl.SSLError():
                return TlsRefused(_about_tls(cause, where))
            case (
                errors.SaslAuthenticationFailed()
                | errors.UnsupportedSaslMechanismError()
                | errors.IllegalSaslStateError()
            ):
                return LoginRefused(_about_sasl(cause, where, connection))
            case _:
                pass
    return BrokerUnreachable(f"{where}: {_about_network(error, connection)}")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, and what it came from; the deepest first, since clients wrap what they do not know."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return reversed(chain)


def _about_certificate(error: ssl.SSLCertVerificationError, where: str) -> str:
    if error.verify_code in ANOTHER_NAME:
        return (
            f"{where}: the broker's certificate is for another name; use a name of the certificate in kafka.bootstrap "
            "and in the brokers' advertised.listeners, or set kafka.security.check_hostname to false"
        )
    return (
        f"{where}: the broker's certificate is not trusted: {error.verify_message}; set kafka.security.ca to a PEM "
        "file of the authority that signed it"
    )


def _about_tls(error: ssl.SSLError, where: str) -> str:
    reason = error.reason or ""
    if "WRONG_VERSION" in reason or "RECORD_LAYER" in reason or "UNEXPECTED_EOF" in reason:
        return f"{where} does not speak TLS; check the port, and kafka.security.protocol"
    if "ALERT" in reason:
        return (
            f"{where}: the broker refuses our certificate, or that there is none ({reason.lower().replace('_', ' ')}); "
            "set kafka.security.certificate and key to a pair that the brokers trust"
        )
    return f"{where}: TLS failed ({reason.lower().replace('_', ' ') or type(error).__name__}); check kafka.security"


def _about_sasl(error: errors.KafkaError, where: str, connection: Connection) -> str:
    if isinstance(error, errors.UnsupportedSaslMechanismError):
        return (
            f"{where} does not offer {connection.mechanism}; set kafka.security.mechanism to one that this listener has"
        )
    if isinstance(error, errors.IllegalSaslStateError):
        return f"{where} takes no login; set kafka.security.protocol to plaintext or ssl, or use the port that does"
    return _about_login(where, connection)


def _about_login(where: str, connection: Connection) -> str:
    if connection.tokens is not None:
        who, advice = "the token", "its issuer, audience and scope, and whether it is over"
    else:
        who = f"user {connection.username!r}"
        advice = f"kafka.security.username, and that a user of {connection.mechanism} has this password"
    return f"{where} does not accept {who}; check {advice} (the secret is in {connection.secret_place})"


def _about_network(error: BaseException, connection: Connection) -> str:
    match error:
        case socket.gaierror():
            return "no machine has this name; check kafka.bootstrap"
        case ConnectionRefusedError():
            return "nothing listens there; start the broker, or check kafka.bootstrap"
        case TimeoutError():
            return "no answer in time; check the address, a firewall, and kafka.security.protocol"
        case OSError() if error.strerror:
            return f"{error.strerror}; check kafka.bootstrap"
        case _:
            return (
                "the connection was closed; the listener may want another kafka.security.protocol than "
                f"{connection.protocol.lower()}, or it is no broker"
            )
