"""The OpenPI wire format: msgpack with NumPy arrays, and the keys of requests and replies.

The codec equals `openpi_client.msgpack_numpy` (openpi-client 0.1.2) byte for byte: an array is a
map with the bytes keys `__ndarray__`, `data`, `dtype` and `shape`. Text keys, which some clients
send, are read too. The size of a message is checked (`blm.serving.protocols.msgpack_limits`) before
any object is built, and no number in it decides how much memory is allocated: an array is exactly
as large as its data.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from blm.serving.protocols.msgpack_limits import MAX_TEXT, check_limits
from blm.types import BlmError, ContractError, Observation, PolicyContract, shorten

STATE, PROMPT, ROBOT, SEED = "observation/state", "prompt", "robot", "seed"
CHUNK, FROZEN = "chunk", "frozen"
"""Real-time chunking: the rest of the current chunk, and the inference delay.

The delay is the number of these actions that are executed during inference.
"""
DEADLINE = "deadline_ms"
"""Deadline of a request, from its arrival [ms].

When it is missed, the reply has LATE and no actions.
"""
LATE = "late"
REQUEST_ID, OBSERVED = "request_id", "observed_s"
"""The client's number of the request, and the time of the observation on its clock [s].

The server echoes both, so that the client can match the reply with its request and knows its age.
"""
IMAGES = "observation/images/"
"""Prefix of the camera's name in a key."""
OPENPI_IMAGES = {"base": "observation/image", "wrist": "observation/wrist_image"}
"""Camera -> its key in OpenPI's own examples."""
MAX_ITEMS = 16_384
"""Maximum number of msgpack items of a server's message; a contract has 60 per robot."""
MAX_SEED = 2**63 - 1
"""Largest seed that the generators of both torch and NumPy accept."""
SMALLEST_LIMIT = 2 * 2**20
"""Minimum frame limit [bytes].

A frame with two 640x480 images, the most common wrong size, must be received so that the error can
name the right size.
"""
MARGIN = 4
"""Ratio of the frame limit to an observation, so that images sent as float32 get an error."""
_DTYPE = re.compile(r"[<>|=][a-zA-Z]\d{0,9}(\[\w{1,9}\])?")
_SCALARS: dict[str, type | tuple[type, ...]] = {
    "b": bool, "i": int, "u": int, "f": (int, float), "U": str, "S": bytes,
}  # fmt: skip
"""Python type of a NumPy scalar of each kind.

NumPy's constructors accept more: `bytes_(n)` creates n bytes.
"""
_MAX_EMPTY = 2**16
"""Maximum side of an empty array, whose shape its data do not limit."""


def pack(message: Any) -> bytes:
    """Encode as msgpack. Raises BlmError for arrays of structures, objects or complex numbers."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes, max_items: int = MAX_ITEMS) -> Any:
    """Decode msgpack; arrays are read-only.

    Raises BlmError for malformed data and too many items.
    """
    check_limits(data, max_items)
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except BlmError:
        raise
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise BlmError(f"the frame is not a valid msgpack message with NumPy arrays: {reason}") from error


def frame_limit(contract: PolicyContract) -> int:
    """Return the maximum size of a client's frame [bytes]: MARGIN times a complete observation."""
    dim = max(max(space.dim, space.state_dim) for space in contract.action_spaces.values())
    return max(
        SMALLEST_LIMIT, MARGIN * (contract.picture_bytes + 8 * dim * (contract.horizon + 1) + 2 * MAX_TEXT)
    )


def item_limit(contract: PolicyContract) -> int:
    """Return the maximum number of msgpack items of a request.

    It allows for a chunk as lists of numbers, and 1024 items for other keys.
    """
    dim = max(max(space.dim, space.state_dim) for space in contract.action_spaces.values())
    return 1024 + (contract.horizon + 1) * (dim + 1)


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
            return _read_array(value[key("data")], value[key("dtype")], value[key("shape")])
        if key("__npgeneric__") in value:
            dtype, data = _read_dtype(value[key("dtype")]), value[key("data")]
            if not isinstance(data, _SCALARS.get(dtype.kind, ())) or (
                isinstance(data, bool) != (dtype.kind == "b")
            ):
                raise ValueError(f"a scalar of {dtype} cannot be {shorten(data)}")
            with np.errstate(over="ignore"):
                return dtype.type(data)
    return value


def _read_array(data: Any, dtype: Any, shape: Any) -> np.ndarray[Any, Any]:
    kind = _read_dtype(dtype)
    if not isinstance(data, bytes):
        raise ValueError(f"the data of an array must be bytes, got {shorten(data)}")
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"the shape of an array must be a list of whole numbers >= 0, got {shorten(shape)}")
    if not kind.itemsize or kind.itemsize * math.prod(shape) != len(data):
        raise ValueError(f"an array of {kind.str} {shorten(shape)} does not have {len(data)} bytes")
    if max(shape, default=0) > max(len(data), _MAX_EMPTY):
        raise ValueError(f"an array without elements has at most {_MAX_EMPTY} rows, got {shorten(shape)}")
    return np.ndarray(buffer=data, dtype=kind, shape=tuple(shape))


def _read_dtype(text: Any) -> np.dtype[Any]:
    # only simple dtypes: NumPy would evaluate parts of a longer string
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        raise ValueError(f"dtype {shorten(text)}")
    return _plain(np.dtype(text))


def _plain(dtype: np.dtype[Any]) -> np.dtype[Any]:
    if dtype.kind in "VOc":
        raise BlmError(f"arrays of dtype {dtype} cannot be sent; send numbers, booleans or text")
    return dtype


def to_request(observation: Observation, plain: bool = False) -> dict[str, Any]:
    """Return the flat map of a request. With `plain`, images have the keys of OpenPI's examples."""
    names = OPENPI_IMAGES if plain else {}
    request: dict[str, Any] = {STATE: observation.state}
    for camera, image in observation.images.items():
        request[names.get(camera, IMAGES + camera)] = image
    request |= {PROMPT: observation.instruction, ROBOT: observation.robot, SEED: observation.seed}
    if observation.chunk is not None:
        request |= {CHUNK: observation.chunk, FROZEN: observation.inference_delay}
    return request


def echo(request: Any) -> dict[str, Any]:
    """Return the fields of a request that the reply echoes.

    Raises ContractError if they are not numbers.
    """
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
    """Return the deadline of a request [s]; infinite without one.

    Raises ContractError if it is invalid.
    """
    value = request.get(DEADLINE, math.inf)
    if not _is_number(value) or not value > 0:
        raise ContractError(f"'{DEADLINE}' must be a positive number of milliseconds, got {shorten(value)}")
    return float(value) / 1000


def to_observation(request: Any, contract: PolicyContract) -> Observation:
    """Decode and check a request.

    Raises ContractError that names the wrong key and the accepted keys.
    """
    try:
        observation = _read(request, contract)
    except (KeyError, TypeError, ValueError) as error:
        reason = "lacks" if isinstance(error, KeyError) else "is wrong:"
        raise ContractError(f"the observation {reason} {shorten(error)}; {_accepted(contract)}") from error
    return contract.check(observation)


def _read(request: Mapping[str, Any], contract: PolicyContract) -> Observation:
    if not isinstance(request, Mapping):
        raise TypeError(f"it must be a map, got {type(request).__name__}")
    only = next(iter(contract.action_spaces)) if len(contract.action_spaces) == 1 else None
    robot = only if request.get(ROBOT) is None else request[ROBOT]
    if robot is None:
        raise KeyError(ROBOT)
    for key, value in ((ROBOT, robot), (PROMPT, request[PROMPT])):
        if not isinstance(value, str):
            raise TypeError(f"'{key}' must be str, got {shorten(value)}")
    images = {}
    for camera in contract.cameras:
        plain = OPENPI_IMAGES.get(camera, "")
        key = plain if plain in request else IMAGES + camera
        images[camera] = request[key]
        if not isinstance(images[camera], np.ndarray):
            raise TypeError(f"'{key}' must be an array of uint8, got {shorten(images[camera])}")
    chunk = request.get(CHUNK)
    return Observation(
        images=images,
        state=_numbers(STATE, request[STATE], levels=1),
        instruction=request[PROMPT],
        robot=robot,
        seed=_whole(SEED, request),
        chunk=None if chunk is None else _numbers(CHUNK, chunk, levels=2),
        inference_delay=_whole(FROZEN, request),
    )


def _whole(key: str, request: Mapping[str, Any]) -> int:
    value = request.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"'{key}' must be int, got {shorten(value)}")
    if not 0 <= value <= MAX_SEED:
        raise ValueError(f"'{key}' must be >= 0 and < 2**63, got {value}")
    return int(value)


def _numbers(key: str, value: Any, levels: int) -> np.ndarray[Any, Any]:
    """Return an array, or lists of numbers as an array; the contract checks shape and dtype."""
    if isinstance(value, np.ndarray):
        return value
    if not _is_nested(value, levels):
        raise TypeError(f"'{key}' must be numbers, got {shorten(value)}")
    return np.asarray(value, np.float64)


def _is_nested(value: Any, levels: int) -> bool:
    """Return whether the value is a list of numbers, nested `levels` deep.

    `np.asarray` alone would also accept text, and pad it to the longest.
    """
    if not levels:
        return _is_number(value)
    if isinstance(value, np.ndarray):
        return value.ndim == levels and value.dtype.kind in "iuf"
    return isinstance(value, list) and all(_is_nested(inner, levels - 1) for inner in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _accepted(contract: PolicyContract) -> str:
    names = [f"'{IMAGES}{camera}' (or '{OPENPI_IMAGES.get(camera)}')" for camera in contract.cameras]
    exact = contract.picture_fit == "exact"
    side = f"uint8 {contract.image_size}x{contract.image_size}x3" if exact else "uint8 height x width x 3"
    images = ", ".join(names).replace(" (or 'None')", "")
    robots = ", ".join(contract.action_spaces)
    return (
        f"accepted: '{STATE}' (numbers), '{PROMPT}' (text), {images} ({side}), "
        f"'{ROBOT}' (one of {robots}); optional: '{SEED}' (whole number), '{CHUNK}' (actions) with "
        f"'{FROZEN}' (whole number), '{DEADLINE}' (number), '{REQUEST_ID}' (whole number), "
        f"'{OBSERVED}' (number)"
    )
