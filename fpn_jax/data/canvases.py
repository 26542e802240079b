"""Memory for the images of batches, used again."""

import ctypes
import math
import weakref

import numpy as np


class Canvases:
    """Arrays of one size in bytes or less, whose memory is used again once they and all views of them have been let go.

    Batches are large and come by the thousand. Memory fresh from the system would be cleared by it, page by page, just
    to be written over: that takes as long as resizing does. Whoever holds an array, or looks at its memory as jax does
    on a CPU, holds a reference to what is lent here, so that nothing is written over that is still looked at. Any
    thread may take arrays; a pickled pool starts empty.
    """

    def __init__(self, num_bytes: int):
        self._num_bytes = num_bytes
        self._free: list[np.ndarray] = []  # append and pop are atomic

    def take(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """An array that holds anything. Raises ValueError if it is larger than the pool's size."""
        count = math.prod(shape)
        if count * np.dtype(dtype).itemsize > self._num_bytes:
            raise ValueError(f"{shape} of {np.dtype(dtype)} are more than {self._num_bytes} bytes")
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._num_bytes, np.uint8)
        # Views of a NumPy array refer to whoever owns its memory. That must be this loan, not `memory` itself.
        loan = (ctypes.c_ubyte * self._num_bytes).from_buffer(memory)
        weakref.finalize(loan, self._free.append, memory).atexit = False
        return np.frombuffer(loan, dtype, count).reshape(shape)

    def __reduce__(self):
        return Canvases, (self._num_bytes,)
