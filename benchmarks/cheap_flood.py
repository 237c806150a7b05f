"""Requests in an open loop that cost their client little: HTTP/2 frames made beforehand, and of answers only what tells how each call ended.

grpc's own client takes as much processor time for a call as the server does to refuse it, so that on a machine with few processors it measures itself. This one
takes a tenth of that. It keeps to the protocol: windows, acknowledgements, and the server's limit of streams of a connection, behind which requests wait here.
"""

from __future__ import annotations

import random
import re
import selectors
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS = 1, 3
_STATUS = re.compile(rb"grpc-status.(\d+)", re.DOTALL)  # written out, for this client keeps no table of headers
OK, RESOURCE_EXHAUSTED = 0, 8
REFUSED_BY_CORE = 1
"""CANCELLED, which gRPC's core says of calls that it does not even show to the server's event loop, so many are waiting for that."""


@dataclass
class Answers:
    """How calls ended: when each was due and when it was answered, by its status (negative: of a reset stream, its HTTP/2 code and 1 taken from 0). `kept` are
    those that the server's limits had not let go when time was up."""

    begun: float = 0.0
    ended: float = 0.0
    calls: int = 0
    kept: int = 0
    unanswered: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    times: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def seconds(self, status: int) -> list[float]:
        """From when each call was due to its answer."""
        return [answered - due for due, answered in self.times.get(status, ())]

    def rate(self, status: int) -> float:
        """Answers a second, of the second half, so that queues have filled."""
        middle = (self.begun + self.ended) / 2
        return sum(middle <= answered < self.ended for _, answered in self.times.get(status, ())) / (self.ended - middle)


class Connection:
    """One connection; `send` and `receive` never wait."""

    def __init__(self, address: str, method: str, key: str, answers: Answers) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = answers
        self._headers = _header_block(address, method, key)
        self._due: dict[int, float] = {}  # of each open stream
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._stream, self._streams, self._window = 1, 2**31, 65_535
        self._received = b""
        settings = struct.pack(">HIHI", _HEADER_TABLE_SIZE, 0, 4, 2**31 - 1)
        wide = _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 65_536))  # never to be told again
        self._sending = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", _frame(_SETTINGS, 0, 0, settings), wide]
        self._flush()
        while self._streams == 2**31:  # the server's settings come first
            self.receive()
        self.socket.setblocking(False)

    @property
    def open(self) -> int:
        """Calls that were sent and have not been answered."""
        return len(self._due)

    def forget(self) -> int:
        """Calls that wait are not sent any more; how many."""
        count = len(self._waiting)
        self._waiting.clear()
        return count

    def send(self, due: float, message: bytes) -> None:
        """A call that was due then; `flush` sends it."""
        self._waiting.append((due, message))

    def flush(self) -> None:
        """Send as many calls as the server allows."""
        while self._waiting and len(self._due) < self._streams and len(self._waiting[0][1]) + 5 <= self._window:
            due, message = self._waiting.popleft()
            number, self._stream = self._stream, self._stream + 2
            self._due[number] = due
            self._window -= len(message) + 5
            body = b"\0" + struct.pack(">I", len(message)) + message
            self._sending += _frame(_HEADERS, _END_HEADERS, number, self._headers), _frame(_DATA, _END_STREAM, number, body)
        self._flush()

    def _flush(self) -> None:
        if self._sending:
            data = b"".join(self._sending)
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            self._sending = [data[sent:]] if sent < len(data) else []

    def receive(self) -> None:
        """Read what has come."""
        try:
            more = self.socket.recv(1 << 18)
        except BlockingIOError:
            return
        if not more:
            raise ConnectionError("the server has closed the connection")
        data, place = self._received + more, 0
        while place + 9 <= len(data):
            size = data[place] << 16 | data[place + 1] << 8 | data[place + 2]
            if place + 9 + size > len(data):
                break
            number = int.from_bytes(data[place + 5 : place + 9], "big")
            self._read(data[place + 3], data[place + 4], number, data[place + 9 : place + 9 + size])
            place += 9 + size
        self._received = data[place:]

    def _read(self, kind: int, flags: int, number: int, body: bytes) -> None:
        if kind == _HEADERS and flags & _END_STREAM:
            found = _STATUS.search(body)
            self._ended(number, int(found[1]) if found else 2)
        elif kind == _RST_STREAM:
            self._ended(number, -1 - int.from_bytes(body, "big"))
        elif kind == _SETTINGS and not flags & _ACK:
            self._streams = dict(struct.iter_unpack(">HI", body)).get(_MAX_CONCURRENT_STREAMS, 2**31 - 1)
            self._sending.append(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._sending.append(_frame(_PING, _ACK, 0, body))
        elif kind == _WINDOW_UPDATE and number == 0:
            self._window += int.from_bytes(body, "big")
        elif kind == _GOAWAY:
            raise ConnectionError(f"the server says goodbye: {body[8:]!r}")

    def _ended(self, number: int, status: int) -> None:
        if (due := self._due.pop(number, None)) is not None:
            self._answers.statuses[status] += 1
            self._answers.times.setdefault(status, []).append((due, time.monotonic()))


def flood(
    address: str,
    method: str,
    requests: Sequence[bytes],
    rate: float,
    seconds: float,
    generator: random.Random,
    key: str = "",
    connections: int = 16,
    wait: float = 5.0,
) -> Answers:
    """Calls of a method as a Poisson process, so many a second, each with one of the messages; then what is open has `wait` seconds to be answered."""
    answers = Answers()
    with selectors.DefaultSelector() as selector:
        those = [Connection(address, method, key, answers) for _ in range(connections)]
        for one in those:
            selector.register(one.socket, selectors.EVENT_READ, one)
        answers.begun = due = time.monotonic()
        ends = answers.begun + seconds
        while (now := time.monotonic()) < ends:
            while due <= now:
                those[answers.calls % connections].send(due, generator.choice(requests))
                answers.calls += 1
                due += generator.expovariate(rate)
            for one in those:
                one.flush()
            for found, _ in selector.select(max(0.0005, due - time.monotonic())):
                found.data.receive()
        answers.ended = time.monotonic()
        answers.kept = sum(one.forget() for one in those)
        while any(one.open for one in those) and time.monotonic() < ends + wait:
            for found, _ in selector.select(0.1):
                found.data.receive()
                found.data.flush()
        answers.unanswered = sum(one.open for one in those)
        for one in those:
            one.socket.close()
    return answers


def _frame(kind: int, flags: int, number: int, body: bytes) -> bytes:
    return struct.pack(">IBI", len(body) << 8 | kind, flags, number) + body


def _header_block(address: str, method: str, key: str) -> bytes:
    """HPACK: POST and http by their numbers, the others as literals that go into no table."""
    headers = [(b":path", method), (b":authority", address), (b"content-type", "application/grpc"), (b"te", "trailers")]
    headers += [(b"authorization", f"Bearer {key}")] if key else []
    return b"\x83\x86" + b"".join(b"\0" + _text(name) + _text(value.encode()) for name, value in headers)


def _text(data: bytes) -> bytes:
    assert len(data) < 127, "a longer one needs more than a byte for its length"
    return bytes((len(data),)) + data
