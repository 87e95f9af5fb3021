"""A read and a copy of raw bytes that numba has no words for: an eight-byte word at any place, and memcpy.

Neither checks where it reads or writes: the caller has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    data = make_array(array_type)(context, builder, array).data  # type: ignore[no-untyped-call]
    return builder.gep(data, [at])


def _word(typing_context: Any, array: Any, at: Any) -> Any:
    """The 8 bytes of a uint8 array from ``at`` on, the first one lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _pointer(context, builder, signature.args[0], *arguments)
        return builder.load(builder.bitcast(place, ir.IntType(64).as_pointer()), align=1)

    return types.uint64(array, types.intp), generate


def _copy(typing_context: Any, target: Any, target_at: Any, source: Any, source_at: Any, count: Any) -> Any:
    """Copies ``count`` bytes between two uint8 arrays that do not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        into = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        out_of = _pointer(context, builder, signature.args[2], arguments[2], arguments[3])
        bytes_pointer = ir.IntType(8).as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [bytes_pointer, bytes_pointer, ir.IntType(64)])
        builder.call(memcpy, [into, out_of, arguments[4], ir.Constant(ir.IntType(1), 0)])
        return context.get_dummy_value()

    return types.void(target, types.intp, source, types.intp, types.intp), generate


word_at: Any = intrinsic(_word)
copy_bytes: Any = intrinsic(_copy)
