"""The port that probes and Prometheus ask: ``/livez``, ``/readyz`` and ``/metrics``, answered by threads of its own.

An event loop that is blocked, or a restore that takes long, does not keep it from answering. It only reads.
"""

from __future__ import annotations

import json
import socket
import socketserver
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self

import structlog
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from configs.exceptions import ColdstreamError
from streams.live.health import Health

PATHS = ("/livez", "/readyz", "/metrics")
REQUEST_S = 10.0
"""A client that says nothing for so long is cut off, so that it keeps no thread"""
STOP_POLL_S = 0.1
"""How often the listening thread looks whether it is to end"""
_JSON = "application/json; charset=utf-8"

log = structlog.get_logger(__name__)


class HealthServerError(ColdstreamError):
    """The address cannot be listened on."""


class HealthServer:
    """Answers from the moment it is made; ``close`` ends it. ``port`` is the one taken, also where 0 was asked for.

    Raises HealthServerError.
    """

    def __init__(self, health: Health, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server = _listen(health, registry, host, port)
        self.host = host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="health server", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends listening and the listening thread. Closing twice does nothing more."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _listen(health: Health, registry: CollectorRegistry, host: str, port: int) -> _Server:
    try:
        return _Server(health, registry, host, port)
    except OSError as error:
        raise HealthServerError(
            f"worker.metrics_host {host}, worker.metrics_port {port}: cannot listen there: {error.strerror or error}; "
            "set another worker.metrics_port (0 takes a free one), or end what listens there"
        ) from error


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, health: Health, registry: CollectorRegistry, host: str, port: int) -> None:
        self.health, self.registry = health, registry
        (self.address_family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        super().__init__((str(address[0]), port), _Handler)

    def server_bind(self) -> None:
        """As of any TCP server: HTTP's asks the name service for this machine's name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news; anything else is."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a request to the health server failed")


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = REQUEST_S

    def do_GET(self) -> None:
        status, kind, body = self._answer(self.path.partition("?")[0])
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def _answer(self, path: str) -> tuple[HTTPStatus, str, bytes]:
        if path == "/metrics":
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            return HTTPStatus.OK, kind, encode(self.server.registry)
        if path == "/livez":
            return self._judged("live", self.server.health.live())
        if path == "/readyz":
            return self._judged("ready", self.server.health.ready())
        problem = f"no such path; there are {', '.join(PATHS)}"
        return HTTPStatus.NOT_FOUND, _JSON, _body({"status": "not found", "problems": [problem]})

    def _judged(self, good: str, problems: tuple[str, ...]) -> tuple[HTTPStatus, str, bytes]:
        status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
        said = f"not {good}" if problems else good
        partitions = self.server.health.partitions()
        return status, _JSON, _body({"status": said, "problems": list(problems), "partitions": partitions})

    def version_string(self) -> str:
        return "coldstream"

    def log_message(self, format: str, *args: object) -> None:
        """Probes ask every few seconds."""


def _body(content: dict[str, object]) -> bytes:
    return json.dumps(content).encode() + b"\n"
