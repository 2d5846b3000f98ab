"""GR00T's protocol beside ours: requests over ZeroMQ, for clients of Isaac-GR00T's PolicyServer.

A request is msgpack {"endpoint", "data", "api_token"}; the reply to "get_action" is [actions, info], to a
fault {"error": why}. An array is {"__ndarray_class__": True, "as_npy": the bytes of a .npy file}. What is
observed are batches with time: "video" camera -> uint8 [B, T, H, W, 3], "state" -> arm [B, T, D - 1] and
gripper [B, T, 1], "language" one key -> [[text]]; the last frame counts. Source: gr00t/policy/
server_client.py of NVIDIA/Isaac-GR00T, commit 38624df. "kill", with which any client ends theirs, is refused.
"""

from __future__ import annotations

import asyncio
import hmac
import io
import logging
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import numpy as np
import zmq
import zmq.asyncio
from fastapi import FastAPI

from blm.serving import wire
from blm.serving.client import MAX_FRAME
from blm.serving.engine import Engine
from blm.types import BlmError, Observation, Policy, PolicyContract

log = logging.getLogger(__name__)
PARTS = ("arm", "gripper")
"""State and action in GR00T's terms, as `meta/modality.json` of our datasets has them."""
ENDPOINTS = ("get_action", "get_modality_config", "ping", "reset")
AT_ONCE = 64
"""Requests in work; the next ones wait in the socket."""


def add_groot(
    app: FastAPI, policy: Policy, *, host: str = "127.0.0.1", port: int = 5555, api_key: str | None = None
) -> None:
    """Let `app` also listen for GR00T clients, from its start to its end; they share its engine.

    Raises BlmError at the start if the address is taken.
    """
    rest = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with rest(app) as state:
            with zmq.asyncio.Context() as context, context.socket(zmq.ROUTER) as socket:
                socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
                socket.setsockopt(zmq.LINGER, 0)
                try:
                    socket.bind(f"tcp://{host}:{port}")
                except zmq.ZMQError as error:
                    raise BlmError(f"cannot listen for GR00T clients on {host}:{port}: {error}") from error
                listening = asyncio.create_task(_listen(socket, app.state.engine, policy, api_key))
                yield state
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)

    app.router.lifespan_context = lifespan


async def _listen(socket: zmq.asyncio.Socket, engine: Engine, policy: Policy, api_key: str | None) -> None:
    room, working = asyncio.Semaphore(AT_ONCE), set[asyncio.Task[None]]()

    async def answer(client: bytes, message: bytes) -> None:
        try:
            reply = pack(await _reply(message, engine, policy.contract, api_key))
        except BlmError as error:
            reply = pack({"error": str(error)})
        except Exception as error:
            log.error("a GR00T request failed: %r", error)
            reply = pack({"error": f"the policy failed: {error!r}"})
        finally:
            room.release()
        await socket.send_multipart([client, b"", reply])

    while True:
        await room.acquire()
        client, *rest = await socket.recv_multipart()
        if len(rest) != 2 or rest[0]:  # not what a REQ socket sends: there is nobody to answer
            room.release()
            continue
        task = asyncio.create_task(answer(client, rest[1]))
        working.add(task)
        task.add_done_callback(working.discard)


async def _reply(message: bytes, engine: Engine, contract: PolicyContract, api_key: str | None) -> Any:
    request = unpack(message)
    if not isinstance(request, Mapping):
        raise BlmError(f"a request must be a map, got {type(request).__name__}")
    token = str(request.get("api_token", ""))
    if api_key is not None and not hmac.compare_digest(token.encode(), api_key.encode()):
        raise BlmError("wrong or missing api_token")
    endpoint = request.get("endpoint", "get_action")
    if endpoint == "ping":
        return {"status": "ok", "message": "Server is running"}
    if endpoint == "reset":
        return {}  # the policy keeps nothing between requests
    if endpoint == "get_modality_config":
        return _modalities(contract)
    if endpoint != "get_action":
        raise BlmError(f"unknown endpoint {endpoint!r}; choose from {', '.join(ENDPOINTS)}")
    data = request.get("data")
    observations = to_observations(data, contract)
    within = wire.deadline_s(_options(data))
    acted = await asyncio.gather(*(engine.act(observation, within) for observation in observations))
    actions = np.stack([one.chunk.actions for one in acted]).astype(np.float32)
    info = {"infer_ms": max(one.infer_ms for one in acted), "revision": contract.revision}
    return [{"arm": actions[..., :-1], "gripper": actions[..., -1:]}, info]


def to_observations(data: Any, contract: PolicyContract) -> list[Observation]:
    """Read the observations of "get_action", one of each row of the batch.

    "options" may name the "robot", needed unless the policy has one only, and a "seed". Raises ContractError
    or BlmError that names what is wrong.
    """
    try:
        seen, options = data["observation"], _options(data)
        (texts,) = seen["language"].values()
        instructions = [text if isinstance(text, str) else text[-1] for text in texts]
        frames = {camera: np.asarray(seen["video"][camera])[:, -1] for camera in contract.cameras}
        state = np.concatenate([np.asarray(seen["state"][part])[:, -1] for part in PARTS], axis=-1)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is wrong: {error}"
        raise BlmError(
            f"the observation {reason}; needed: 'video' with {', '.join(contract.cameras)} [B, T, H, W, 3], "
            "'state' with arm [B, T, joints] and gripper [B, T, 1], 'language' with one list of texts"
        ) from error
    if {len(instructions)} != {len(state), *map(len, frames.values())}:
        raise BlmError("video, state and language have batches of different sizes")
    own = {name: options[name] for name in (wire.ROBOT, wire.SEED) if name in options}
    return [
        wire.to_observation(
            {
                wire.PROMPT: instruction,
                wire.STATE: state[row],
                **{wire.IMAGES + camera: pictures[row] for camera, pictures in frames.items()},
                **own,
            },
            contract,
        )
        for row, instruction in enumerate(instructions)
    ]


def _options(data: Any) -> Mapping[str, Any]:
    options = data.get("options") or {}
    if not isinstance(options, Mapping):
        raise BlmError(f"'options' must be a map, got {type(options).__name__}")
    return options


def _modalities(contract: PolicyContract) -> dict[str, Any]:
    def config(keys: Sequence[str], steps: int = 1) -> dict[str, Any]:
        said = {"delta_indices": list(range(steps)), "modality_keys": list(keys)}
        return {"__ModalityConfig_class__": True, "as_json": said}

    return {
        "video": config(contract.cameras),
        "state": config(PARTS),
        "action": config(PARTS, contract.horizon),
        "language": config(["annotation.human.task_description"]),
    }


def pack(message: Any) -> bytes:
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Decode a message. Raises BlmError for anything malformed; arrays of objects are not opened."""
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (ValueError, TypeError, KeyError, OverflowError, EOFError, msgpack.UnpackException) as error:
        raise BlmError(f"the message is not valid msgpack with NumPy arrays: {error!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        out = io.BytesIO()
        np.save(out, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": out.getvalue()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _decode(value: dict[Any, Any]) -> Any:
    if "__ndarray_class__" not in value:
        return value
    file = io.BytesIO(value["as_npy"])
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(value["as_npy"]) - file.tell():
        raise ValueError(f"an array of {dtype} {shape} whose bytes do not fit")  # before anything is reserved
    return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
