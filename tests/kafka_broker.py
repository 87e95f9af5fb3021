"""One real broker for all tests of a session, and topics of their own for each.

Tests ask for the fixture ``kafka_bootstrap``. Where KAFKA_BOOTSTRAP is set, that cluster is used. A test that kills
brokers, or needs further listeners, makes a cluster of its own with ``running_cluster``.
"""

from __future__ import annotations

import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

from deploy.kafka.broker import external
from deploy.kafka.cluster import Cluster
from deploy.kafka.launchers import BrokerError, Docker, Jars, available_launcher

with warnings.catch_warnings():
    # kafka-python 3.0 reads its schemas with importlib.resources.read_text, which Python 3.11 and 3.12 call deprecated.
    # It reads them once, when it is imported: here, before any test does.
    warnings.filterwarnings("ignore", "(read|open)_text is deprecated", DeprecationWarning)
    from kafka.admin import KafkaAdminClient
    from kafka.errors import UnknownTopicOrPartitionError

HEAP_MB = 384
"""Enough for tests; with what a JVM needs beside its heap some 600 MB"""
TIMEOUT_MS = 30_000


@pytest.fixture(scope="session")
def kafka_bootstrap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """``host:port,…`` of a broker that lives as long as the session. Without Java a test is skipped; in CI it fails."""
    try:
        there = external()
    except BrokerError as error:
        no_broker(error)
    if there is not None:
        yield there
        return
    with running_cluster(tmp_path_factory.mktemp("kafka")) as cluster:
        yield cluster.bootstrap


@contextmanager
def running_cluster(directory: Path, **options: Any) -> Iterator[Cluster]:
    """A cluster of a test's own; ``options`` are those of ``Cluster``. It ends with the block, and with the process.

    Without Java the test is skipped; in CI it fails.
    """
    try:
        launcher: Docker | Jars = available_launcher()
    except BrokerError as error:
        no_broker(error)
    if isinstance(launcher, Jars):
        launcher = Jars(end_with_me=True)
    with Cluster(directory, **{"launcher": launcher, "heap_mb": HEAP_MB, **options}) as cluster:
        yield cluster


def free_topic(prefix: str) -> str:
    """A name that no other test, and no earlier run on the same cluster, has used."""
    return f"{prefix}-{uuid.uuid4().hex[:12]}"


def create_topic(bootstrap: str, name: str, partitions: int = 1, **config: object) -> str:
    """Makes a topic and waits until it has leaders; ``cleanup_policy="compact"`` sets ``cleanup.policy``."""
    configs = {key.replace("_", "."): str(value) for key, value in config.items()}
    with _admin(bootstrap) as admin:
        admin.create_topics({name: {"num_partitions": partitions, "configs": configs}}, wait_for_metadata=True)
    return name


def delete_topics(bootstrap: str, *names: str) -> None:
    """Removes topics; one that is not there is fine."""
    with _admin(bootstrap) as admin:
        for name in names:
            try:
                admin.delete_topics([name])
            except UnknownTopicOrPartitionError:
                continue


def no_broker(error: BrokerError) -> NoReturn:
    """Ends a test that cannot have a broker; the error says what to install."""
    if os.environ.get("CI"):
        pytest.fail(str(error))
    pytest.skip(str(error))


def _admin(bootstrap: str) -> closing[Any]:
    return closing(KafkaAdminClient(bootstrap_servers=bootstrap.split(","), request_timeout_ms=TIMEOUT_MS))
