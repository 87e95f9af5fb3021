"""Which decoder a stream needs."""

from __future__ import annotations

from configs.settings import EventSchema, StreamSettings
from streams.decoding.decoded import Decoder
from streams.decoding.json_decoder import JsonDecoder
from streams.decoding.record_reader import RecordDecoder
from streams.decoding.unreadable import UnreadableApart


def decoder_of(events: EventSchema, stream: StreamSettings) -> Decoder:
    """The decoder for a stream's format, ready: nothing is compiled or opened at the first event.

    Raises:
        MissingExtra: the format's library is not installed.
        DecodingError: the settings lack what the format needs, or name descriptors that cannot be used.
    """
    return UnreadableApart(_decoder_of(events, stream))


def _decoder_of(events: EventSchema, stream: StreamSettings) -> Decoder:
    if stream.format == "avro":
        from streams.decoding.avro import avro_reader
        from streams.decoding.registry import SchemaRegistry

        return RecordDecoder(avro_reader(events, SchemaRegistry(stream.registry)))
    if stream.format == "protobuf":
        from streams.decoding.protobuf import protobuf_reader

        return RecordDecoder(protobuf_reader(events, stream))
    return JsonDecoder(events)
