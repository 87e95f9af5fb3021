"""A client of a Confluent-compatible schema registry: schemas by id, kept for good: an id never changes.

It asks with http.client, which follows no redirect: credentials go to the configured address and nowhere else. A call
that is not in memory yet blocks for up to ``stream.registry.timeout_ms``.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

from configs.settings import SchemaRegistrySettings
from streams.decoding.exceptions import DecodingError, RegistryUnavailable
from streams.kafka.secrets import read_secret

SCHEMA_NOT_FOUND = 40403
"""The registry's own code; a bare 404 comes from a wrong path or a proxy, and says nothing about a schema."""
NOT_FOUND = (40401, 40402, SCHEMA_NOT_FOUND)
"""Of a reference: its subject, its version or its schema"""
LARGEST_ANSWER_BYTES = 16 << 20
FORGET_UNKNOWN_S = 30.0
"""How long an id counts as unknown before the registry is asked again: it may be a copy that lags behind. Without this
every poison record of an id would wait for an answer."""
MOST_UNKNOWN = 10_000
"""Unknown ids kept in mind, so that random ids cannot fill the memory."""
DEEPEST_REFERENCES = 32
"""Levels of references; the registry accepts no circle, and this is not its own loop's length to find out."""


@dataclass(frozen=True, slots=True)
class RegisteredSchema:
    """A schema as its writer registered it."""

    kind: str
    """AVRO, PROTOBUF or JSON"""
    text: str
    """Avro: JSON. Protobuf: a FileDescriptorProto in base64."""
    references: tuple[tuple[str, RegisteredSchema], ...]
    """The schemas it builds on, under the names by which it does"""


class SchemaRegistry:
    """Schemas by id."""

    def __init__(self, settings: SchemaRegistrySettings, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises DecodingError: the settings name no registry that can be asked."""
        self._settings = settings
        self._clock = clock
        self._url = _parsed(settings.url)
        self._tls = _tls(settings) if self._url.scheme == "https" else None
        self._known: dict[int, RegisteredSchema] = {}
        self._unknown: dict[int, float] = {}

    def schema(self, schema_id: int) -> RegisteredSchema | None:
        """The schema of this id; None if the registry says that there is none.

        Raises:
            RegistryUnavailable: it gives no answer, or one that does not say.
        """
        known = self._known.get(schema_id)
        if known is not None:
            return known
        if self._clock() < self._unknown.get(schema_id, -1.0):
            return None
        answer = self._ask(f"/schemas/ids/{schema_id}", (SCHEMA_NOT_FOUND,))
        if answer is None:
            if len(self._unknown) >= MOST_UNKNOWN:
                self._unknown.clear()
            self._unknown[schema_id] = self._clock() + FORGET_UNKNOWN_S
            return None
        schema = self._resolved(f"/schemas/ids/{schema_id}", answer, DEEPEST_REFERENCES)
        self._known[schema_id] = schema
        return schema

    def _resolved(self, path: str, answer: dict[str, Any], levels: int) -> RegisteredSchema:
        """The schema of an answer, with all that it refers to; a Protobuf one is fetched once more, as descriptors."""
        kind = answer.get("schemaType") or "AVRO"
        references = [(str(r["name"]), self._referenced(r, levels)) for r in answer.get("references") or ()]
        text = answer.get("schema")
        if kind == "PROTOBUF":
            serialized = self._ask(f"{path}?format=serialized", ())
            text = serialized.get("schema") if serialized else None
        if not isinstance(text, str):
            raise RegistryUnavailable(f"{self._shown(path)} gives no schema: is it a Confluent-compatible registry?")
        return RegisteredSchema(str(kind), text, tuple(references))

    def _referenced(self, reference: dict[str, Any], levels: int) -> RegisteredSchema:
        path = f"/subjects/{quote(str(reference['subject']), safe='')}/versions/{int(reference['version'])}"
        answer = self._ask(path, NOT_FOUND) if levels else None
        if answer is None:
            why = "is not there" if levels else f"is more than {DEEPEST_REFERENCES} references deep"
            raise RegistryUnavailable(f"{self._shown(path)}, which a schema refers to, {why}: register it again")
        return self._resolved(path, answer, levels - 1)

    def _ask(self, path: str, not_found: tuple[int, ...]) -> dict[str, Any] | None:
        """The answer to GET; None if it is one of these error codes."""
        try:
            status, body = self._get(path)
        except (OSError, http.client.HTTPException) as error:
            cause = str(error) or type(error).__name__
            raise RegistryUnavailable(
                f"{self._shown(path)}: {cause}; is the schema registry up, and stream.registry.url right?"
            ) from error
        try:
            answer = json.loads(body)
        except (ValueError, RecursionError):
            answer = None
        if isinstance(answer, dict):
            if status == 200:
                return answer
            if status == 404 and answer.get("error_code") in not_found:
                return None
        hint = "check stream.registry.username and password" if status in (401, 403) else "check stream.registry.url"
        said = f" ({str(answer['message'])[:200]})" if isinstance(answer, dict) and "message" in answer else ""
        raise RegistryUnavailable(f"{self._shown(path)} answers {status}{said}; {hint}")

    def _get(self, path: str) -> tuple[int, bytes]:
        timeout_s = self._settings.timeout_ms / 1000
        host, port = self._url.hostname or "", self._url.port
        connection = (
            http.client.HTTPConnection(host, port, timeout=timeout_s)
            if self._tls is None
            else http.client.HTTPSConnection(host, port, timeout=timeout_s, context=self._tls)
        )
        try:
            connection.request("GET", self._url.path.rstrip("/") + path, headers=self._headers())
            with connection.getresponse() as response:
                body = response.read(LARGEST_ANSWER_BYTES + 1)
                if len(body) > LARGEST_ANSWER_BYTES:
                    raise http.client.HTTPException(f"an answer of more than {LARGEST_ANSWER_BYTES:,} bytes")
                return response.status, body
        finally:
            connection.close()

    def _headers(self) -> dict[str, str]:
        headers = {"Accept": "application/vnd.schemaregistry.v1+json, application/json"}
        if self._settings.username is not None:
            password = ""
            if self._settings.password.given:
                password = read_secret(self._settings.password, "stream.registry.password").reveal()
            login = f"{self._settings.username}:{password}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        return headers

    def _shown(self, path: str) -> str:
        url = self._url
        return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}{path}"


def _parsed(url: str | None) -> SplitResult:
    parts = urlsplit(url or "")
    try:
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # the port is no number
        usable = False
    if not usable:
        raise DecodingError(f"stream.registry.url is {url!r}; give one such as http://127.0.0.1:8081")
    if "@" in parts.netloc:
        raise DecodingError("stream.registry.url holds a login; put it in stream.registry.username and password")
    return parts


def _tls(settings: SchemaRegistrySettings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if settings.ca is None else str(settings.ca))
    except (OSError, ssl.SSLError) as error:
        raise DecodingError(f"stream.registry.ca: {settings.ca}: {error}; give a PEM file of authorities") from None
