"""Reading many records at once: one answer into one reused buffer, where they are decoded in place.

Redis answers HMGET with an array of bulk strings. Reading it through a general client makes one bytes object a record
(two copies and an allocation of fresh pages each); here the socket writes into a buffer that is used again and
again, and a record is a view of it. 224 records of 32 KB cost 7 ms one way and 4 ms the other, both of them mostly
the server's and the kernel's.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Final

import redis

SLACK_BYTES: Final = 65_536
MOST_FREE: Final = 8
LINE_BYTES: Final = 64
_ERROR, _INTEGER, _BULK, _ARRAY = b"-:$*"


class Buffers:
    """Receive buffers that are used again. One belongs to a sample for as long as its records are views of it."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self) -> bytearray:
        """The largest free buffer, or a new one."""
        with self._lock:
            return self._free.pop() if self._free else bytearray(SLACK_BYTES)

    def give_back(self, buffers: list[bytearray]) -> None:
        """Free buffers that no record views any more."""
        with self._lock:
            self._free = sorted([*self._free, *buffers], key=len)[-MOST_FREE:]


@dataclass(slots=True)
class Fetched:
    """The answers to a charge and an HMGET.

    charged    what the charge script answered; 1 where there was none.
    records    views of `buffer`, None for a field that is not there.
    buffer     the buffer that was lent, or a larger one where the answer did not fit.
    """

    charged: int
    records: list[memoryview | None]
    buffer: bytearray


def receive(connection: Any, buffer: bytearray, *, charged: bool, fetched: bool) -> Fetched:
    """Read the answer to a charge, if there was one, and then that to an HMGET, if there was one.

    Raises the client library's ConnectionError where the connection ends, TimeoutError where it is silent too long,
    ResponseError, once both were read, where an answer is an error.
    """
    socket = connection._sock  # nothing else is in flight, so the connection's own reader has not read ahead
    try:
        return _receive(socket, buffer, charged=charged, fetched=fetched)
    except TimeoutError:
        raise redis.exceptions.TimeoutError("the server is silent") from None
    except OSError as error:
        raise redis.exceptions.ConnectionError(str(error)) from None


def _receive(socket: Any, buffer: bytearray, *, charged: bool, fetched: bool) -> Fetched:
    """Parse as bytes arrive. `place` is where the next line begins, `left` how many answers and records are due."""
    filled = place = 0
    charge = 1
    error: str | None = None
    left = int(charged) + int(fetched)
    spans: list[tuple[int, int] | None] = []
    while left:
        end = buffer.find(b"\r\n", place, filled)
        need = place + LINE_BYTES
        if end >= 0:
            kind, value, begin = buffer[place], bytes(buffer[place + 1 : end]), end + 2
            if kind == _BULK and int(value) >= 0:
                need = begin + int(value) + 2
                if need <= filled:
                    spans.append((begin, need - 2))
                    place, left = need, left - 1
                    continue
            else:
                place, left = begin, left - 1
                if kind == _BULK:
                    spans.append(None)
                elif kind == _ARRAY:
                    left += int(value)
                elif kind == _INTEGER:
                    charge = int(value)
                else:
                    assert kind == _ERROR, f"byte {kind} where an answer should begin"
                    error = error or value.decode(errors="replace")
                continue
        if need > len(buffer):
            buffer = _larger(buffer, filled, need, left)
        with memoryview(buffer) as view:
            got = socket.recv_into(view[filled:])
        if got == 0:
            raise ConnectionResetError("the server closed the connection")
        filled += got
    assert place == filled, "the server sent more than was asked for"
    if error is not None:
        raise redis.exceptions.ResponseError(error)
    view = memoryview(buffer)
    return Fetched(charge, [None if span is None else view[span[0] : span[1]] for span in spans], buffer)


def _larger(buffer: bytearray, filled: int, need: int, left: int) -> bytearray:
    """A buffer with room for `left` more records as large as the one that did not fit."""
    largest = need - filled if filled < need else 0
    larger = bytearray(max(need, filled + largest * left, 2 * len(buffer)) + SLACK_BYTES)
    larger[:filled] = buffer[:filled]
    return larger
