"""Whether a broker answers, asked in Kafka's own protocol over a plain socket: no client library is needed.

Requests and responses: https://kafka.apache.org/protocol. A message is its size (int32) and its bytes; a request begins
with API key and version (int16 each), correlation id (int32) and client id (int16 length, bytes).
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct

API_VERSIONS, METADATA = 18, 3
CLIENT = b"coldstream-broker"
CORRELATION = 1
TIMEOUT_S = 2.0
LARGEST_RESPONSE = 1 << 20
"""Bytes; what claims to be larger is no broker."""


def answers(address: str) -> bool:
    """Whether something at ``host:port`` speaks Kafka's protocol, or lets TLS begin (no certificate is looked at)."""
    try:
        response = _asked(address, API_VERSIONS, version=0)
    except OSError:
        return _begins_tls(address)
    return len(response) >= 2 and struct.unpack(">h", response[:2]) == (0,)


def brokers_known(address: str) -> frozenset[int]:
    """The node ids that a broker without encryption tells its clients; empty where it does not answer, or not yet."""
    try:
        response = _asked(address, METADATA, version=1, body=struct.pack(">i", 0))  # no topics
        return _node_ids(response)
    except (OSError, struct.error):
        return frozenset()


def _node_ids(response: bytes) -> frozenset[int]:
    """Metadata response v1: an array of (node id, host, port, rack or null)."""
    (count,) = struct.unpack_from(">i", response)
    at, nodes = 4, []
    for _ in range(count):
        node, host = struct.unpack_from(">ih", response, at)
        at += 6 + host + 4
        (rack,) = struct.unpack_from(">h", response, at)
        at += 2 + max(rack, 0)
        nodes.append(node)
    return frozenset(nodes)


def _asked(address: str, key: int, version: int, body: bytes = b"") -> bytes:
    """The response's body. Raises OSError where there is none."""
    request = struct.pack(f">hhih{len(CLIENT)}s", key, version, CORRELATION, len(CLIENT), CLIENT) + body
    with socket.create_connection(_host_and_port(address), timeout=TIMEOUT_S) as connection:
        connection.sendall(struct.pack(">i", len(request)) + request)
        size, correlation = struct.unpack(">ii", _read(connection, 8))
        if correlation != CORRELATION or not 4 <= size <= LARGEST_RESPONSE:
            raise OSError(f"{address}: this is no Kafka broker")
        return _read(connection, size - 4)


def _read(connection: socket.socket, size: int) -> bytes:
    read = b""
    while len(read) < size:
        more = connection.recv(size - len(read))
        if not more:
            raise OSError("the connection was closed in the middle of a response")
        read += more
    return read


def _begins_tls(address: str) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.suppress(OSError):
        connection = socket.create_connection(_host_and_port(address), timeout=TIMEOUT_S)
        with connection, context.wrap_socket(connection):
            return True
    return False


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.strip().rpartition(":")
    if not host or not port.isdigit():
        raise OSError(f"{address!r} is no address: write HOST:PORT")
    return host.strip("[]"), int(port)
