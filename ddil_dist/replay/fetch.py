"""Reading many records at once: each is handed on to be decoded and copied while the rest is still on its way.

Redis answers HMGET with an array of bulk strings. Reading it through a general client makes one bytes object a record
(two copies, in pages that are fresh each time) and leaves the decoding for when all is there. Here the socket writes
into a small buffer that stays in the cache, each record is copied into its row of the sample as soon as it is whole,
and the server goes on sending meanwhile: on two cores a sample costs what the slower side costs, not the sum.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Final

import redis

BUFFER_BYTES: Final = 2**19
LINE_BYTES: Final = 64
MOST_FREE: Final = 8
_ERROR, _INTEGER, _BULK, _ARRAY = b"-:$*"

Take = Callable[[int, "memoryview | None"], None]
"""Told each record's number in the answer and its bytes, valid during the call only; None where there is none."""


class Buffers:
    """Receive buffers that are used again."""

    def __init__(self) -> None:
        self._free: list[bytearray] = []
        self._lock = threading.Lock()

    def take(self) -> bytearray:
        """The largest free buffer, or a new one."""
        with self._lock:
            return self._free.pop() if self._free else bytearray(BUFFER_BYTES)

    def give_back(self, buffer: bytearray) -> None:
        """Free a buffer that no record views any more."""
        with self._lock:
            self._free = sorted([*self._free, buffer], key=len)[-MOST_FREE:]


def receive(connection: Any, buffers: Buffers, take: Take, *, told: bool, fetched: bool) -> int:
    """Read the answer of a script, if one was told of the sample, and then that to an HMGET; returns the script's.

    Without a script that is 1. Raises the client library's ConnectionError where the connection ends, TimeoutError
    where it is silent too long, ResponseError, once both were read, where an answer is an error.
    """
    reader = _Reader(connection._sock, buffers.take(), take)  # no other answer is in flight: nobody has read ahead
    try:
        return reader.read(int(told) + int(fetched))
    except TimeoutError:
        raise redis.exceptions.TimeoutError("the server is silent") from None
    except OSError as error:
        raise redis.exceptions.ConnectionError(str(error)) from None
    finally:
        buffers.give_back(reader.buffer)


class _Reader:
    """Parses answers as bytes arrive. `buffer[place:filled]` is what has arrived and is not parsed."""

    def __init__(self, socket: Any, buffer: bytearray, take: Take) -> None:
        self.buffer = buffer
        self._socket, self._take = socket, take
        self._place = self._filled = 0

    def read(self, left: int) -> int:
        """Read `left` answers, arrays with all their elements; returns the integer among them, 1 without one."""
        number, told = 0, 1
        error: str | None = None
        while left:
            kind, value = self._line()
            left -= 1
            if kind == _BULK:
                size = int(value)
                if size < 0:
                    self._take(number, None)
                else:
                    self._need(size + 2)
                    begin = self._place
                    self._take(number, memoryview(self.buffer)[begin : begin + size])
                    self._place = begin + size + 2
                number += 1
            elif kind == _ARRAY:
                left += int(value)
            elif kind == _INTEGER:
                told = int(value)
            else:
                assert kind == _ERROR, f"byte {kind} where an answer should begin"
                error = error or value.decode(errors="replace")
        assert self._place == self._filled, "the server sent more than was asked for"
        if error is not None:
            raise redis.exceptions.ResponseError(error)
        return told

    def _line(self) -> tuple[int, bytes]:
        """The next line: its kind and the rest of it."""
        while (end := self.buffer.find(b"\r\n", self._place, self._filled)) < 0:
            self._need(self._filled - self._place + 1)
        kind, value = self.buffer[self._place], bytes(self.buffer[self._place + 1 : end])
        self._place = end + 2
        return kind, value

    def _need(self, num: int) -> None:
        """Receive until `num` bytes from `place` on have arrived."""
        while self._filled - self._place < num:
            if self._place == self._filled:
                self._place = self._filled = 0
            room = max(num, LINE_BYTES)
            if self._place + room > len(self.buffer):
                self._make_room(room)
            got = self._socket.recv_into(memoryview(self.buffer)[self._filled :])
            if got == 0:
                raise ConnectionResetError("the server closed the connection")
            self._filled += got

    def _make_room(self, room: int) -> None:
        """Move what is not parsed to the front, of a larger buffer where `room` bytes would not fit."""
        left = self._filled - self._place
        target = self.buffer if room <= len(self.buffer) else bytearray(2 * room)
        memoryview(target)[:left] = memoryview(self.buffer)[self._place : self._filled]
        self.buffer, self._place, self._filled = target, 0, left
