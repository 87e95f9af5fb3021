"""Batches that could not be opened are no events, whatever their bytes may look like to a decoder."""

from __future__ import annotations

import numpy as np

from streams.decoding.decoded import DECODE, Decoded, Decoder, Poison, Refusal
from streams.kafka.chunk import Chunk
from streams.rejects import Problem, Reason


class UnreadableApart:
    """A decoder that refuses the records which stand for unreadable batches, and leaves all others to another one."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def decode(self, chunk: Chunk) -> Decoded:
        """See ``Decoder``."""
        decoded = self._decoder.decode(chunk)
        if not chunk.unreadable:
            return decoded
        refused = {
            one.index: Poison.of(one.index, Refusal.at(DECODE, Problem(Reason.UNREADABLE_BATCH, one.reason)))
            for one in chunk.unreadable
        }
        others = (poison for poison in decoded.poison if poison.index not in refused)
        kept = np.flatnonzero(~np.isin(decoded.events.offset, chunk.offset[list(refused)]))
        return Decoded(
            decoded.events.take(kept).pruned(),
            tuple(sorted((*refused.values(), *others), key=lambda poison: poison.index)),
            None if decoded.event_id is None else decoded.event_id[kept],
        )
