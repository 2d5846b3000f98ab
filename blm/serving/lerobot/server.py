"""The process that serves a LeRobot policy. It runs in LeRobot's environment and needs no torch itself.

A connection is an episode: it gets a session of its own, which keeps what the policy remembers. The
process ends when its standard input is closed, so it does not outlive the program that started it.
"""

from __future__ import annotations

import argparse
import hmac
import http
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection, serve

from blm.io.files import write_text
from blm.pictures import fit_picture
from blm.serving.lerobot.features import FeatureMap
from blm.serving.protocols.openpi import wire
from blm.types import BlmError, FloatArray, ImageArray, Observation, PolicyContract, shorten

KEY_VARIABLE = "BLM_LEROBOT_KEY"
"""Environment variable with the key that clients must send."""
MAX_ERROR = 1000
"""Maximum length of an error message to a client [characters]."""


class Session(Protocol):
    """A policy during one episode."""

    def act(self, inputs: Mapping[str, ImageArray | FloatArray], task: str, seed: int) -> FloatArray:
        """Return actions [H, K] of pictures (uint8 HWC) and vectors by feature, in its own units."""


class Model(Protocol):
    """A loaded policy."""

    @property
    def execute(self) -> int:
        """Actions of a chunk that the policy executes before it sees the next observation."""

    def session(self) -> Session: ...


def act(session: Session, features: FeatureMap, observation: Observation) -> FloatArray:
    """Return the actions [H, D] of a session for an observation."""
    inputs: dict[str, Any] = dict(features.vectors(observation.state))
    for camera, feature in features.cameras.items():
        inputs[feature] = fit_picture(observation.images[camera], "crop", features.sides[camera], camera)
    return features.actions(session.act(inputs, observation.instruction, observation.seed))


def probe(model: Model, features: FeatureMap) -> PolicyContract:
    """Return the contract of a policy, from its actions on a black picture.

    Raises BlmError for actions that do not fit the robots.
    """
    robot, space = next(iter(features.action_spaces.items()))
    black = np.zeros((features.image_size, features.image_size, 3), np.uint8)
    observation = Observation(
        images=dict.fromkeys(features.cameras, black),
        state=space.middle_state(),
        instruction="pick up the cube",
        robot=robot,
    )
    horizon = len(act(model.session(), features, observation))
    return features.contract(horizon, min(model.execute, horizon))


class Handler:
    """Answers one connection after another, each in a thread of its own."""

    def __init__(self, model: Model, features: FeatureMap, contract: PolicyContract) -> None:
        self._model, self._features, self._contract = model, features, contract

    def __call__(self, socket: ServerConnection) -> None:
        """Send the contract, then answer observations until the client disconnects."""
        try:
            session = self._model.session()
            socket.send(wire.pack(self._contract.to_json()))
            for frame in socket:
                socket.send(self._answer(session, frame))
        except ConnectionClosed:
            return
        except BlmError as error:
            _refuse(socket, shorten(error, MAX_ERROR))
        except Exception as error:  # LeRobot's own
            traceback.print_exc()
            _refuse(socket, f"the policy failed: {type(error).__name__}: {shorten(error, MAX_ERROR)}")

    def _answer(self, session: Session, frame: str | bytes) -> bytes:
        if isinstance(frame, str):
            raise BlmError("received a text frame; send an observation as msgpack in a binary frame")
        request = wire.unpack(frame, wire.item_limit(self._contract))
        observation, echo = wire.to_observation(request, self._contract), wire.echo(request)
        return wire.pack({**echo, "actions": act(session, self._features, observation)})


def _refuse(socket: ServerConnection, reason: str) -> None:
    """Report an error as OpenPI does: a text frame, then close code 1011."""
    try:
        socket.send(reason)
        socket.close(1011)
    except ConnectionClosed:
        return


def _check_key(socket: ServerConnection, request: Request) -> Response | None:
    expected = f"Api-Key {os.environ.get(KEY_VARIABLE, '')}".encode()
    if hmac.compare_digest(request.headers.get("Authorization", "").encode(), expected):
        return None
    return socket.respond(http.HTTPStatus.UNAUTHORIZED, "wrong key\n")


def run(load: Callable[[Path, str], Model], arguments: Sequence[str] | None = None) -> None:
    """Serve the policy that `load(folder, device)` returns, until standard input is closed.

    Its address is written to the file that --ready names. Exits with status 2 for a policy that
    does not fit.
    """
    parser = argparse.ArgumentParser(description="Serve a LeRobot policy over OpenPI's protocol.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--features", type=Path, required=True, help="a FeatureMap as JSON")
    parser.add_argument("--ready", type=Path, required=True, help="file to write when the server is ready")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(arguments)
    threading.Thread(target=_end_with_input, daemon=True).start()
    features = FeatureMap.from_json(json.loads(given.features.read_text()))
    try:
        model = load(given.folder, given.device)
        contract = probe(model, features)
    except BlmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    handler, limit = Handler(model, features, contract), wire.frame_limit(contract)
    with serve(
        handler, "127.0.0.1", 0, compression=None, max_size=limit, process_request=_check_key
    ) as server:
        write_text(given.ready, f"ws://127.0.0.1:{server.socket.getsockname()[1]}")
        server.serve_forever()


def _end_with_input() -> None:
    """End this process when the program that started it has ended or closed our input."""
    while os.read(0, 4096):  # not sys.stdin, whose lock would disturb another end of this process
        pass
    os._exit(0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve a policy that LeRobot loads."""
    from blm.serving.lerobot.policy import LeRobotModel

    run(LeRobotModel, arguments)
