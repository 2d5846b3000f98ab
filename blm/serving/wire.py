"""The OpenPI wire format: msgpack with NumPy arrays, and the observation keys that we accept.

The codec is byte-for-byte that of `openpi_client.msgpack_numpy` (openpi-client 0.1.2): an array is a map with
the bytes keys `__ndarray__`, `data`, `dtype` and `shape`. Text keys, which some clients send, are read too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from blm.types import BlmError, ContractError, Observation, PolicyContract

STATE, PROMPT, ROBOT, SEED = "observation/state", "prompt", "robot", "seed"
CHUNK, FROZEN = "chunk", "frozen"
"""Real-time chunking: what is left of the chunk in progress, and how much of it is carried out meanwhile."""
DEADLINE = "deadline_ms"
"""After this time from the arrival of a request a chunk is of no use; the reply then says LATE."""
LATE = "late"
REQUEST_ID, OBSERVED = "request_id", "observed_s"
"""A client's own number of its request, and when its observation was made on its own clock [s]. Whoever
answers returns both unchanged, so that the client can tell whose reply it holds and how old it is."""
IMAGES = "observation/images/"
OPENPI_IMAGES = {"base": "observation/image", "wrist": "observation/wrist_image"}
"""Camera -> the name that OpenPI's own examples give it."""
_DTYPE = re.compile(r"[<>|=][a-zA-Z]\d*(\[\w+\])?")


def pack(message: Any) -> bytes:
    """Encode to msgpack. Raises BlmError for arrays of structures, objects or complex numbers."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Decode msgpack; arrays come out read-only. Raises BlmError for anything malformed."""
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except BlmError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        raise BlmError(f"the frame is not a valid msgpack message with NumPy arrays: {error!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        dtype = _plain(value.dtype).str
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": dtype, b"shape": value.shape}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": _plain(value.dtype).str}
    return value


def _decode(value: dict[Any, Any]) -> Any:
    for key in (str, str.encode):
        if key("__ndarray__") in value:
            dtype = _read_dtype(value[key("dtype")])
            return np.ndarray(buffer=value[key("data")], dtype=dtype, shape=tuple(value[key("shape")]))
        if key("__npgeneric__") in value:
            return _read_dtype(value[key("dtype")]).type(value[key("data")])
    return value


def _read_dtype(text: str) -> np.dtype[Any]:
    if not _DTYPE.fullmatch(text):  # NumPy would evaluate parts of a longer string
        raise ValueError(f"dtype {text!r}")
    return _plain(np.dtype(text))


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind in "VOc":
        raise BlmError(f"arrays of dtype {dtype} cannot be sent; send numbers, booleans or text")
    return dtype


def to_request(observation: Observation, plain: bool = False) -> dict[str, Any]:
    """The flat map that a client sends for one observation; `plain` prefers OpenPI's own picture names."""
    names = OPENPI_IMAGES if plain else {}
    images = {names.get(camera, IMAGES + camera): image for camera, image in observation.images.items()}
    words = {PROMPT: observation.instruction, ROBOT: observation.robot, SEED: observation.seed}
    going_on = {} if observation.chunk is None else {CHUNK: observation.chunk, FROZEN: observation.frozen}
    return {STATE: observation.state, **images, **words, **going_on}


def echo(request: Any) -> dict[str, Any]:
    """What a reply returns of its request unchanged. Raises ContractError for a number that is none."""
    if not isinstance(request, Mapping):
        return {}
    kinds: dict[str, Any] = {REQUEST_ID: int, OBSERVED: int | float}
    fields = {key: request[key] for key in kinds if request.get(key) is not None}
    for key, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, kinds[key]) or not math.isfinite(value):
            kind = "whole" if key == REQUEST_ID else "finite"
            raise ContractError(f"'{key}' must be a {kind} number, got {str(value)[:40]!r}")
    return fields


def deadline_s(request: Mapping[str, Any]) -> float:
    """How long a client waits for its chunk [s]; for ever if it does not say. Raises ContractError."""
    value = request.get(DEADLINE, math.inf)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ContractError(f"'{DEADLINE}' must be a positive number of milliseconds, got {value!r}")
    return value / 1000


def to_observation(request: Any, contract: PolicyContract) -> Observation:
    """Read a client's map and check it. Raises ContractError with the key at fault and what is accepted."""
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite: the contract refuses it
            observation = _read(request, contract)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else f"is wrong: {error}"
        raise ContractError(f"the observation {reason}; {_accepted(contract)}") from error
    return contract.check(observation)


def _read(request: Mapping[str, Any], contract: PolicyContract) -> Observation:
    if not isinstance(request, Mapping):
        raise TypeError(f"it must be a map, got {type(request).__name__}")
    only = next(iter(contract.action_spaces)) if len(contract.action_spaces) == 1 else None
    robot = request.get(ROBOT, only) or request[ROBOT]
    seed, frozen = request.get(SEED, 0), request.get(FROZEN, 0)
    words = ((ROBOT, robot, str), (PROMPT, request[PROMPT], str), (SEED, seed, int), (FROZEN, frozen, int))
    for key, value, kind in words:
        if not isinstance(value, kind):
            raise TypeError(f"'{key}' must be {kind.__name__}, got {value!r}")
    for key, number in ((SEED, seed), (FROZEN, frozen)):
        if number < 0:
            raise ValueError(f"'{key}' must be >= 0, got {number}")
    images = {}
    for camera in contract.cameras:
        plain = OPENPI_IMAGES.get(camera, "")
        images[camera] = request[plain if plain in request else IMAGES + camera]
    state = np.asarray(request[STATE], dtype=np.float32)
    chunk = request.get(CHUNK)
    return Observation(
        images=images,
        state=state,
        instruction=request[PROMPT],
        robot=robot,
        seed=seed,
        chunk=None if chunk is None else np.asarray(chunk, dtype=np.float32),
        frozen=frozen,
    )


def _accepted(contract: PolicyContract) -> str:
    names = [f"'{IMAGES}{camera}' (or '{OPENPI_IMAGES.get(camera)}')" for camera in contract.cameras]
    side = f"uint8 {contract.image_size}x{contract.image_size}x3"
    images = ", ".join(names).replace(" (or 'None')", "")
    robots = ", ".join(contract.action_spaces)
    return (
        f"accepted: '{STATE}' (numbers), '{PROMPT}' (text), {images} ({side}), "
        f"'{ROBOT}' (one of {robots}); optional: '{SEED}' (whole number), '{CHUNK}' (actions) with "
        f"'{FROZEN}' (whole number), '{DEADLINE}' (number), '{REQUEST_ID}' (whole number), "
        f"'{OBSERVED}' (number)"
    )
