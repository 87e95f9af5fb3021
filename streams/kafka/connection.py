"""How to reach the brokers: the same address, trust and login for every client, made once from settings."""

from __future__ import annotations

import ssl
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from configs.settings import KafkaSettings, SecretRule, SecuritySettings
from streams.kafka.exceptions import WrongSecurity
from streams.kafka.secrets import Secret, hide_logins_in_logs, place_of, read_secret
from streams.kafka.tokens import FetchedTokens, LoopTokens, PlacedTokens, Tokens, thread_tokens

if TYPE_CHECKING:
    from faust.types.auth import CredentialsT

LOOPBACK = ("127.0.0.1", "::1", "localhost")
SETTING = "kafka.security"


@dataclass(frozen=True, slots=True)
class Connection:
    """What each client is given. Its repr, and that of what it gives, show no secret."""

    bootstrap: tuple[str, ...]
    """``host:port`` each"""
    client_id: str
    request_timeout_ms: int
    protocol: str = "PLAINTEXT"
    """As Kafka writes it: PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL"""
    tls: ssl.SSLContext | None = field(default=None, repr=False)
    mechanism: str | None = None
    """As Kafka writes it: PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"""
    username: str | None = None
    password: Secret | None = None
    tokens: Tokens | None = None
    secret_place: str | None = None
    """Where the password or the token came from, for messages"""

    @staticmethod
    def of(settings: KafkaSettings) -> Connection:
        """Reads the certificates and the password; a token is read or fetched for each login.

        Raises:
            SecretMissing: a secret is not where the settings say.
            WrongSecurity: a certificate, a key or an address that cannot be used.
        """
        hide_logins_in_logs()
        security = settings.security
        tls = _tls(security) if security.protocol.endswith("ssl") else None
        bearer = security.mechanism == "oauthbearer"
        return Connection(
            bootstrap=_addresses(settings.bootstrap),
            client_id=settings.client_id,
            request_timeout_ms=settings.request_timeout_ms,
            protocol=security.protocol.upper(),
            tls=tls,
            mechanism=None if security.mechanism is None else security.mechanism.upper(),
            username=security.username,
            password=_password(security) if security.mechanism is not None and not bearer else None,
            tokens=_tokens(security) if bearer else None,
            secret_place=_secret_place(security),
        )

    def aiokafka(self) -> dict[str, Any]:
        """Arguments that aiokafka's producer, consumer, admin client and client all take."""
        return {
            **self._common(),
            "bootstrap_servers": list(self.bootstrap),
            "request_timeout_ms": self.request_timeout_ms,
            **({} if self.tokens is None else {"sasl_oauth_token_provider": LoopTokens(self.tokens)}),
        }

    def aiokafka_connection(self) -> dict[str, Any]:
        """Arguments of ``aiokafka.conn.create_conn`` beside host, port and timeout."""
        return {name: value for name, value in self.aiokafka().items() if name not in _OF_CLIENTS}

    def kafka_python(self) -> dict[str, Any]:
        """Arguments that kafka-python's producer, consumer and admin client all take."""
        return {
            **self._common(),
            "bootstrap_servers": list(self.bootstrap),
            "request_timeout_ms": self.request_timeout_ms,
            **({} if self.tokens is None else {"sasl_oauth_token_provider": thread_tokens(self.tokens)}),
        }

    def faust_broker_url(self, scheme: str = "kafka") -> list[str]:
        """Faust's setting ``broker``. The scheme names the transport."""
        return [f"{scheme}://{address}" for address in self.bootstrap]

    def faust_credentials(self) -> CredentialsT | None:
        """Faust's setting ``broker_credentials``."""
        from faust import auth  # not above: it loads all of Faust

        if self.tokens is not None:
            return auth.OAuthCredentials(oauth_cb=LoopTokens(self.tokens), ssl_context=self.tls)
        if self.mechanism is not None:
            return auth.SASLCredentials(
                username=self.username, password=self.password, mechanism=self.mechanism, ssl_context=self.tls
            )
        return None if self.tls is None else auth.SSLCredentials(self.tls)

    def _common(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {"client_id": self.client_id, "security_protocol": self.protocol}
        if self.tls is not None:
            arguments["ssl_context"] = self.tls
        if self.mechanism is not None:
            arguments["sasl_mechanism"] = self.mechanism
        if self.password is not None:
            arguments["sasl_plain_username"] = self.username
            arguments["sasl_plain_password"] = self.password
        return arguments


_OF_CLIENTS = frozenset({"bootstrap_servers", "request_timeout_ms"})


def _addresses(bootstrap: Sequence[str]) -> tuple[str, ...]:
    for address in bootstrap:
        host, colon, port = address.rpartition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536) or "://" in address:
            raise WrongSecurity(f"kafka.bootstrap: {address!r} is no address; write host:port, for example broker:9092")
    if not bootstrap:
        raise WrongSecurity("kafka.bootstrap is empty; name at least one broker as host:port")
    return tuple(bootstrap)


def _tls(security: SecuritySettings) -> ssl.SSLContext:
    context = _trusting(security)
    context.check_hostname = security.check_hostname
    if security.certificate is None or security.key is None:
        return context

    def key_password() -> str:
        if not security.key_password.given:
            raise WrongSecurity(
                f"{SETTING}.key: {security.key} is encrypted; set key_password.file or key_password.env"
            )
        return read_secret(security.key_password, f"{SETTING}.key_password").reveal()

    for path in (security.certificate, security.key):
        _require_readable(path)
    try:
        context.load_cert_chain(security.certificate, security.key, key_password)
    except ssl.SSLError as error:
        raise WrongSecurity(_about_key(security, error)) from None
    return context


def _trusting(security: SecuritySettings) -> ssl.SSLContext:
    """Trusts the authorities of ``ca``, or the system's."""
    if security.ca is None:
        return ssl.create_default_context()
    _require_readable(security.ca)
    try:
        return ssl.create_default_context(cafile=str(security.ca))
    except ssl.SSLError:
        raise WrongSecurity(
            f"{SETTING}.ca: {security.ca} holds no certificate in PEM; convert it with openssl"
        ) from None


def _require_readable(path: object) -> None:
    try:
        with open(str(path), "rb"):
            pass
    except OSError as error:
        raise WrongSecurity(f"{SETTING}: {path}: {error.strerror}; check the path and its rights") from None


def _about_key(security: SecuritySettings, error: ssl.SSLError) -> str:
    files = f"{SETTING}: certificate {security.certificate} and key {security.key}"
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{files} do not belong together"
    if security.key_password.given:
        return f"{files} cannot be loaded: the key's password may be wrong (see {place_of(security.key_password)})"
    return f"{files} cannot be loaded; both must be PEM"


def _password(security: SecuritySettings) -> Secret:
    return read_secret(security.password, f"{SETTING}.password")


def _tokens(security: SecuritySettings) -> Tokens:
    if security.token_url is None:
        read_secret(security.token, f"{SETTING}.token")  # says now, not at the first login, that it is missing
        return PlacedTokens(security.token)
    url = urllib.parse.urlsplit(security.token_url)
    if url.scheme != "https" and not (url.scheme == "http" and url.hostname in LOOPBACK):
        raise WrongSecurity(
            f"{SETTING}.token_url: {security.token_url} would send the password in the clear; use https"
        )
    context = _trusting(security)
    context.load_default_certs()  # the endpoint's authority need not be the brokers' own
    return FetchedTokens(
        security.token_url, str(security.username), _password(security), security.token_scope, context
    )  # fmt: skip


def _secret_place(security: SecuritySettings) -> str | None:
    rule: SecretRule = security.token if security.token.given else security.password
    return place_of(rule) if security.mechanism is not None else None
