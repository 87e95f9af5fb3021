"""What tests of decoding share: chunks of made-up records, a decoded chunk as plain values, and a schema registry."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import numpy as np

from streams.decoding.decoded import Decoded
from streams.kafka.chunk import Chunk


def chunk_of(values: Sequence[bytes | None]) -> Chunk:
    """Records at the offsets 5, 8, 11 …"""
    records = [
        SimpleNamespace(key=b"k", value=value, offset=3 * k + 5, timestamp=0, headers=())
        for k, value in enumerate(values)
    ]
    return Chunk.of_records("events", 3, records, 3 * len(values) + 5)


def shown(decoded: Decoded) -> list[object]:
    """All of it, comparable, every bit of a float."""
    e = decoded.events
    columns = [e.user, e.item, e.label, e.value, e.event_time_ms, e.offset]
    bits = [(str(column.dtype), column.tobytes()) for column in columns]
    ids = None if decoded.event_id is None else (str(decoded.event_id.dtype), decoded.event_id.tolist())
    return [e.user_ids, e.item_ids, bits, e.user_features, e.item_features, ids, decoded.poison]


def events_of(decoded: Decoded) -> list[tuple[object, ...]]:
    """(offset, user, item, label, value, time) of each event."""
    e = decoded.events
    return [
        (int(e.offset[k]), e.user_ids[e.user[k]], e.item_ids[e.item[k]], int(e.label[k]),
         None if np.isnan(e.value[k]) else float(e.value[k]), int(e.event_time_ms[k]))
        for k in range(len(e))
    ]  # fmt: skip


class Registry:
    """A schema registry's answers by path, and what it was asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""

    def add(self, path: str, answer: dict[str, Any], status: int = 200) -> None:
        """What it answers there; anywhere else it knows no schema."""
        self.answers[path] = status, json.dumps(answer).encode()


@contextmanager
def registry_on_loopback() -> Iterator[Registry]:
    """A registry on a free port; it ends with the block."""
    registry = Registry()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry.asked.append(self.path)
            registry.headers.append(dict(self.headers))
            unknown = 404, b'{"error_code": 40403, "message": "Schema not found"}'
            status, body = registry.answers.get(self.path, unknown)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        registry.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield registry
        finally:
            server.shutdown()
            thread.join()
