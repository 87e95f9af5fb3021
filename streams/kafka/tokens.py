"""Tokens for OAUTHBEARER: read from a place that somebody keeps fresh, or fetched, and kept until they are old."""

from __future__ import annotations

import asyncio
import base64
import json
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import IO, Any, Protocol

from aiokafka.abc import AbstractTokenProvider

from configs.settings import SecretRule
from streams.kafka.exceptions import SecretMissing, TokenUnavailable
from streams.kafka.secrets import Secret, read_secret

SHARE_OF_LIFE = 0.8
"""A token is fetched anew when so much of its life is over: the rest is for slow clocks and slow logins."""
LIFE_UNKNOWN_S = 60.0
"""How long a token is kept whose answer does not say how long it lives"""
MOST_BYTES = 1 << 20
"""Of a token endpoint's answer"""
TIMEOUT_S = 10.0


class Tokens(Protocol):
    """Where tokens come from."""

    def token(self) -> Secret:
        """A token for a login that begins now. May block; called from several threads. Raises TokenUnavailable."""


@dataclass(frozen=True, slots=True)
class PlacedTokens:
    """The token in a file or variable, read anew each time: somebody else keeps it fresh."""

    rule: SecretRule

    def token(self) -> Secret:
        """What is there now."""
        try:
            return _usable(read_secret(self.rule, "kafka.security.token"))
        except SecretMissing as error:
            raise TokenUnavailable(str(error)) from None


@dataclass(slots=True)
class FetchedTokens:
    """Tokens by client credentials (RFC 6749 §4.4). One is shared by all logins until it is old."""

    url: str
    client: str
    password: Secret
    scope: str | None = None
    context: ssl.SSLContext | None = field(default=None, repr=False)
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _held: Secret | None = field(default=None, init=False, repr=False)
    _fresh_until: float = field(default=0.0, init=False, repr=False)
    _lives_until: float = field(default=0.0, init=False, repr=False)

    def token(self) -> Secret:
        """The one at hand, or a new one. While the endpoint does not answer, one that is old but alive does."""
        with self._lock:
            now = self.clock()
            if self._held is None or now >= self._fresh_until:
                try:
                    self._fetch(now)
                except TokenUnavailable:
                    if self._held is None or now >= self._lives_until:
                        raise
            assert self._held is not None
            return self._held

    def _fetch(self, now: float) -> None:
        answer = self._answer()
        token, life = answer.get("access_token"), answer.get("expires_in", LIFE_UNKNOWN_S)
        if not isinstance(token, str) or isinstance(life, bool) or not isinstance(life, (int, float)):
            raise TokenUnavailable(f"{self.url}: the answer has no access_token that could be used; check token_url")
        self._held = _usable(Secret(token))
        self._fresh_until, self._lives_until = now + SHARE_OF_LIFE * life, now + life

    def _answer(self) -> dict[str, object]:
        fields = {"grant_type": "client_credentials", **({} if self.scope is None else {"scope": self.scope})}
        headers = {"Authorization": self._basic(), "Accept": "application/json"}
        request = urllib.request.Request(self.url, urllib.parse.urlencode(fields).encode(), headers)
        opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=self.context))
        try:
            with opener.open(request, timeout=TIMEOUT_S) as response:
                answer = json.loads(response.read(MOST_BYTES))
        except urllib.error.HTTPError as error:
            with error:
                raise TokenUnavailable(f"{self.url} answered {error.code}{self._advice(error.code)}") from None
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            raise TokenUnavailable(f"{self.url} cannot be reached: {reason}; check kafka.security.token_url") from None
        except ValueError:
            raise TokenUnavailable(f"{self.url}: the answer is no JSON; check kafka.security.token_url") from None
        if not isinstance(answer, dict):
            raise TokenUnavailable(f"{self.url}: the answer is no JSON object; check kafka.security.token_url")
        return answer

    def _basic(self) -> str:
        """Both parts are form-encoded first (RFC 6749 §2.3.1)."""
        pair = ":".join(urllib.parse.quote_plus(part) for part in (self.client, self.password.reveal()))
        return "Basic " + base64.b64encode(pair.encode()).decode()

    def _advice(self, code: int) -> str:
        if code in (400, 401, 403):
            return f": it does not accept the client {self.client!r}; check username, password and token_scope"
        if 300 <= code < 400:
            return ": a redirection, which would give the password to somebody else; name the final token_url"
        return "; try again later, or check kafka.security.token_url"


def _usable(token: Secret) -> Secret:
    """The token itself, which must be visible ASCII: anything else would end it early on the wire."""
    if not token.isascii() or not token.isprintable() or " " in token or not token:
        raise TokenUnavailable("the token is no token: it holds spaces, or more than visible ASCII")
    return token


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirection is an error: following it would send the password along."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> urllib.request.Request | None:
        return None


class LoopTokens(AbstractTokenProvider):  # type: ignore[misc]  # aiokafka ships no types
    """As aiokafka asks for them. A file or an endpoint that is slow does not hold up the event loop."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def token(self) -> str:
        """Plain text: aiokafka formats it into its request."""
        return (await asyncio.to_thread(self._tokens.token)).reveal()


def thread_tokens(tokens: Tokens) -> Any:
    """As kafka-python asks for them: its ``AbstractTokenProvider``."""
    from kafka.net.sasl.oauth import AbstractTokenProvider as BlockingTokenProvider  # not above: few need it

    class ThreadTokens(BlockingTokenProvider):  # type: ignore[misc]  # kafka-python ships no types
        def token(self) -> str:
            return tokens.token().reveal()

    return ThreadTokens()
