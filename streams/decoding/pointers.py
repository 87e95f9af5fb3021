"""Arrays by pointer, inside compiled code: numba counts references of every array that it passes, and checks each
index for a negative sign, which takes half the time of a walk over single bytes.
"""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array


def _pointer_to(typing_context: Any, array: Any) -> Any:
    """Pointer to the first element of a C-contiguous array, which must outlive it. Indices are not checked."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return make_array(signature.args[0])(context, builder, arguments[0]).data  # type: ignore[no-untyped-call]

    return types.CPointer(array.dtype)(array), generate  # type: ignore[no-untyped-call]


pointer: Any = intrinsic(_pointer_to)
