"""The private parts of Faust and aiokafka that the batch transport leans on. When one of these fails after an upgrade,
read streams/transport.py before the requirement in setup.cfg is changed."""

from __future__ import annotations

import inspect
from importlib import metadata

import aiokafka
import faust
import pytest
from faust.app.base import App
from faust.tables.recovery import Recovery
from faust.transport import consumer as base
from faust.transport import drivers
from faust.transport.drivers import aiokafka as driver
from faust.types.tuples import ConsumerMessage

from streams import transport


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_faust_is_the_version_that_was_read() -> None:
    assert metadata.version("faust-streaming") == "0.15.3"


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (driver.AIOKafkaConsumerThread._create_worker_consumer, ["self", "transport"]),
        (
            driver.AIOKafkaConsumerThread._fetch_records,
            ["self", "consumer", "active_partitions", "timeout", "max_records"],
        ),
        (driver.AIOKafkaConsumerThread.__post_init__, ["self"]),
        (driver.AIOKafkaConsumerThread._ensure_consumer, ["self"]),
        (driver.Consumer._new_consumer_thread, ["self"]),
        (driver.Consumer._to_message, ["self", "tp", "record"]),
        (base.Consumer.getmany, ["self", "timeout"]),
        (base.Consumer._wait_next_records, ["self", "timeout"]),
        (base.Consumer._get_active_partitions, ["self"]),
        (base.Consumer._new_offset, ["self", "tp"]),
        (base.Consumer._should_commit, ["self", "tp", "offset"]),
        (base.ThreadDelegateConsumer._commit, ["self", "offsets"]),
        (driver.Consumer.verify_event_path, ["self", "now", "tp"]),
        (driver.AIOKafkaConsumerThread.call_thread, ["self", "fun", "args", "kwargs"]),
        (driver.ensure_aiokafka_TP, ["tp"]),
        (base.ThreadDelegateConsumer.seek_to_committed, ["self"]),
        (aiokafka.AIOKafkaConsumer.seek, ["self", "partition", "offset"]),
        (aiokafka.AIOKafkaConsumer.committed, ["self", "partition"]),
    ],
)
def test_what_is_overridden_or_called_has_the_arguments_that_were_read(function, expected) -> None:
    assert parameters(function) == expected


def test_what_is_overridden_is_still_called_by_the_loop_that_fetches() -> None:
    drain = inspect.getsource(base.Consumer._drain_messages)
    for name in ("getmany", "_read_offset", "if gap > 1 and r_offset", "suspend_flow"):
        assert name in drain
    committable = inspect.getsource(base.Consumer._filter_committable_offsets)
    assert committable.index("_new_offset") < committable.index("_should_commit")
    assert "verify_event_path" in inspect.getsource(base.Consumer.verify_all_partitions_active)
    assert "seek_to_committed" in inspect.getsource(base.Consumer.perform_seek)
    assert "_fetch_records" in inspect.getsource(driver.AIOKafkaConsumerThread.getmany)
    assert "_create_worker_consumer" in inspect.getsource(driver.AIOKafkaConsumerThread._create_consumer)


def test_an_assignment_ends_with_a_seek_and_the_flow_goes_on_after_it() -> None:
    resumed = inspect.getsource(Recovery._resume_streams)
    assert resumed.index("resume_partitions") < resumed.index("perform_seek") < resumed.index("resume_flow")


def test_a_revocation_stops_the_flow_before_it_is_told() -> None:
    revoked = inspect.getsource(App._on_partitions_revoked)
    assert (
        revoked.index("stop_flow") < revoked.index("flow_control.clear") < revoked.index("on_partitions_revoked.send")
    )


def test_a_message_carries_whatever_value_it_is_given() -> None:
    delivery = transport.Delivery((), 1, 0)
    tp = faust.types.TP("topic", 0)
    message = ConsumerMessage("topic", 0, 5, 0.0, 0, [], None, delivery, None, 0, 0, tp, generation_id=1)  # type: ignore[arg-type]
    assert message.value is delivery
    assert transport.RawBatch().loads_value(None, message) is delivery


def test_faust_finds_the_transport_by_its_scheme() -> None:
    transport.register()
    assert drivers.by_url(f"{transport.SCHEME}://127.0.0.1:9092") is transport.Transport
