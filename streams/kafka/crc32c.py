"""CRC-32C (Castagnoli), the checksum of a record batch: by the processor's instruction, or by tables.

The instruction is x86's (SSE 4.2), eight bytes at a time; other processors take the tables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import config, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from streams.kafka.memory import word_at

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed"""
_TARGET, _FEATURES = "CPU_NAME", "CPU_FEATURES"
"""numba's settings of what to compile for (environment: NUMBA_CPU_NAME, NUMBA_CPU_FEATURES)"""
_compiled: Any = njit(cache=True, nogil=True)
_inlined: Any = njit(cache=True, nogil=True, forceinline=True)


def _tables() -> NDArray[np.uint32]:
    """(8, 256) entry [k, b]: the checksum of byte b that k zero bytes follow."""
    table = np.zeros((8, 256), dtype=np.uint32)
    first = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        first = np.where(first & 1, first >> 1 ^ np.uint32(_POLYNOMIAL), first >> 1)
    table[0] = first
    for k in range(1, 8):
        table[k] = table[k - 1] >> 8 ^ first[table[k - 1] & 0xFF]
    return table


_TABLE = _tables()


def _by_instruction(typing_context: Any, crc: Any, word: Any) -> Any:
    """The checksum, in the low half, after eight bytes more."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word_type = ir.IntType(64)
        kind = ir.FunctionType(word_type, [word_type, word_type])
        return builder.call(builder.module.declare_intrinsic("llvm.x86.sse42.crc32.64.64", (), kind), arguments)

    return types.uint64(types.uint64, types.uint64), generate


def has_instruction() -> bool:
    """Whether this processor has the instruction, and numba compiles for it as it is."""
    as_it_is = getattr(config, _TARGET) is None and getattr(config, _FEATURES) is None
    return as_it_is and bool(binding.get_host_cpu_features().get("sse4.2", False))


@_inlined
def add_word_by_table(crc, word):  # type: ignore[no-untyped-def]
    """What the instruction does."""
    mixed = word ^ crc
    total = np.uint32(0)
    for k in range(8):
        total ^= _TABLE[7 - k, np.intp(mixed >> np.uint64(8 * k) & np.uint64(0xFF))]
    return np.uint64(total)


add_word: Any = intrinsic(_by_instruction) if has_instruction() else add_word_by_table


@_compiled
def crc32c(data, start, stop):  # type: ignore[no-untyped-def]
    """Checksum of ``data[start:stop]``, a uint8 array; the caller answers for the bounds."""
    crc, at = np.uint64(0xFFFFFFFF), start
    while at + 8 <= stop:
        crc = add_word(crc, word_at(data, at))
        at += 8
    rest = np.uint32(crc)
    while at < stop:
        rest = _TABLE[0, np.intp((rest ^ np.uint32(data[at])) & np.uint32(0xFF))] ^ (rest >> np.uint32(8))
        at += 1
    return np.uint32(rest ^ np.uint32(0xFFFFFFFF))
