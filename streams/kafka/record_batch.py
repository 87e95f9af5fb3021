"""Record batches, format v2: what a broker stores and sends, read and written without an object for each record.

``batch_header`` has the layout, ``batch_reading`` takes batches apart, ``batch_writing`` makes them.
"""

from streams.kafka.batch_reading import CorruptBatch, oldest_magic, read_chunks
from streams.kafka.batch_writing import EncodedBatch, Spans, encode_batches, encode_spans, warm_up

__all__ = [
    "CorruptBatch",
    "EncodedBatch",
    "Spans",
    "encode_batches",
    "encode_spans",
    "oldest_magic",
    "read_chunks",
    "warm_up",
]
