"""A TCP proxy in front of a server that refuses, hangs, delays, cuts or answers 503, as it is told to."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

REFUSE, HANG, DELAY, CUT_REQUEST, CUT_ANSWER, BUSY, NONE = (
    "refuse",
    "hang",
    "delay",
    "cut the request",
    "cut the answer",
    "503",
    "none",
)
BUSY_ANSWER = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one connection.

    Attributes:
        kind: One of the words above.
        after: Bytes that pass before it is cut.
        seconds: How long it is held back.
    """

    kind: str = NONE
    after: int = 0
    seconds: float = 0.0


def drawn(draw: random.Random, share: float) -> Fault:
    """A random fault for so large a share of the connections, soon; all others are cut later, as clients reuse them."""
    if draw.random() >= share:
        late = draw.choice([(CUT_REQUEST, 6, 8), (CUT_ANSWER, 4, 6)])
        return Fault(late[0], after=int(10 ** draw.uniform(*late[1:])))
    kind = draw.choice([REFUSE, HANG, DELAY, CUT_REQUEST, CUT_ANSWER, CUT_ANSWER, BUSY])
    return Fault(kind, after=int(10 ** draw.uniform(0, 4.5)), seconds=draw.uniform(0, 0.3))


@dataclass
class Proxy:
    """Listens on a port of its own, and passes on to another, while the block runs.

    Attributes:
        port: Of the server behind it.
        next_fault: Is asked for each connection.
        gone: While it is true, as if there were no server: what is open is cut, and nothing is accepted.
        seen: How often each kind of fault came.
    """

    port: int
    next_fault: Callable[[], Fault] = Fault
    gone: bool = False
    seen: dict[str, int] = field(default_factory=dict)

    def __enter__(self) -> Proxy:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gone = True
        self._listener.close()
        self.cut_all()

    def vanish(self) -> None:
        """The server is away from now on."""
        self.gone = True
        self.cut_all()

    def cut_all(self) -> None:
        """Resets all connections that are open."""
        with self._lock:
            for one in list(self._open):
                _reset(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            fault = Fault(REFUSE) if self.gone else self.next_fault()
            self.seen[fault.kind] = self.seen.get(fault.kind, 0) + 1
            threading.Thread(target=self._serve, args=(client, fault), name="proxy", daemon=True).start()

    def _serve(self, client: socket.socket, fault: Fault) -> None:
        with self._lock:
            self._open.add(client)
        if fault.kind == REFUSE:
            _reset(client)
            return
        if fault.kind == HANG:
            _hang(client)
            return
        if fault.kind == BUSY:
            with contextlib.suppress(OSError):
                client.recv(65536)
                client.sendall(BUSY_ANSWER)
            client.close()
            return
        if fault.kind == DELAY:
            time.sleep(fault.seconds)
        try:
            server = socket.create_connection(("127.0.0.1", self.port))
        except OSError:
            _reset(client)
            return
        with self._lock:
            self._open.add(server)
        limits = {CUT_REQUEST: (fault.after, None), CUT_ANSWER: (None, fault.after)}.get(fault.kind, (None, None))
        back = threading.Thread(target=_pump, args=(server, client, limits[1]), name="proxy", daemon=True)
        back.start()
        _pump(client, server, limits[0])
        back.join()
        with self._lock:
            self._open -= {client, server}
        for one in (client, server):
            one.close()


def _pump(source: socket.socket, sink: socket.socket, limit: int | None) -> None:
    """Passes bytes on until one side closes, or so many have passed; then both are reset."""
    passed = 0
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            if limit is not None and passed + len(data) > limit:
                sink.sendall(data[: limit - passed])
                time.sleep(0.01)  # what was passed on arrives before the reset
                break
            sink.sendall(data)
            passed += len(data)
        else:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
            return
    _reset(source)
    _reset(sink)


def _hang(client: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while client.recv(65536):  # read, and never answered, until the client gives up
            pass
    client.close()


def _reset(one: socket.socket) -> None:
    """Ends a connection at once, without what is still on its way."""
    with contextlib.suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    one.close()
