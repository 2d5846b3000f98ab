"""An OpenPI server that answers whatever a test tells it to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from blm.serving.protocols.openpi import wire
from tests.support.serving import CONTRACT

GOOD = np.zeros((4, 8), np.float32)

Answer = Callable[[ServerConnection, dict[str, Any], int], None]


@contextmanager
def fake_server(answer: Answer, *, metadata: Any = None) -> Iterator[str]:
    """A server that sends our contract (or `metadata`), and leaves each reply to `answer`."""

    def handle(socket: ServerConnection) -> None:
        socket.send(wire.pack(CONTRACT.to_json() if metadata is None else metadata))
        try:
            for number in range(100):
                answer(socket, wire.unpack(socket.recv()), number)
        except ConnectionClosed:
            return

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join(5)


def reply(socket: ServerConnection, request: dict[str, Any], **changes: Any) -> None:
    echo = {key: request[key] for key in (wire.REQUEST_ID, wire.OBSERVED)}
    socket.send(wire.pack({**echo, "actions": GOOD, **changes}))
