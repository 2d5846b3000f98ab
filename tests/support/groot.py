"""A GR00T client and a server for it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import zmq

from blm.serving.app import create_app
from blm.serving.protocols.groot.server import add_groot
from blm.types import Observation
from tests.support.serving import EchoPolicy, free_port, running_app


def theirs(value: Any) -> Any:
    """How Isaac-GR00T's client writes an array."""
    out = io.BytesIO()
    np.save(out, value, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": out.getvalue()}


def read_theirs(value: dict[str, Any]) -> Any:
    if "__ndarray_class__" in value:
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    return value


class Client:
    """A REQ socket, as Isaac-GR00T's PolicyClient has."""

    def __init__(self, port: int, token: str | None = None) -> None:
        self.context, self.token = zmq.Context(), token
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def call(self, endpoint: str, data: Any = None) -> Any:
        request = {"endpoint": endpoint, **({} if data is None else {"data": data})}
        request |= {} if self.token is None else {"api_token": self.token}
        return self.send(msgpack.packb(request, default=theirs))

    def send(self, message: bytes) -> Any:
        self.socket.send(message)
        return msgpack.unpackb(self.socket.recv(), object_hook=read_theirs)

    def close(self) -> None:
        self.socket.close()
        self.context.term()


@contextmanager
def running(policy: EchoPolicy, api_key: str | None = None, **options: Any) -> Iterator[int]:
    port = free_port()
    app = create_app(policy, api_key=api_key, **options)
    add_groot(app, policy, port=port)
    with running_app(app):
        yield port


def batch(*seen: Observation, times: int = 2) -> dict[str, Any]:
    """What a GR00T client sends for these moments, with older frames before them."""

    def film(values: list[np.ndarray]) -> np.ndarray:
        now = np.stack(values)[:, None]
        return np.concatenate([np.zeros_like(now)] * (times - 1) + [now], axis=1)

    state = film([one.state for one in seen])
    return {
        "observation": {
            "video": {camera: film([one.images[camera] for one in seen]) for camera in ("base", "wrist")},
            "state": {"arm": state[..., :-1], "gripper": state[..., -1:]},
            "language": {"annotation.human.task_description": [[one.instruction] for one in seen]},
        },
        "options": {"robot": seen[0].robot, "seed": seen[0].seed},
    }
