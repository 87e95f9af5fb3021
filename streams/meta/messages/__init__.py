"""What goes over the wire between partitions and the aggregator, as bytes. Pure: records in, records out.

bytes           ``packing`` (JSON and arrays in one checksummed block), ``chunks`` (blocks cut into records, and back)
what they say   ``contribution`` (what one partition has to say of one span, topic ``meta-gradients``),
                ``merging`` (what those of a round say together)
"""

from streams.meta.messages.chunks import MAX_BYTES, Assembler, cut
from streams.meta.messages.contribution import Contribution, decode, key_of, records
from streams.meta.messages.packing import MessageRefused

__all__ = ["MAX_BYTES", "Assembler", "Contribution", "MessageRefused", "cut", "decode", "key_of", "records"]
