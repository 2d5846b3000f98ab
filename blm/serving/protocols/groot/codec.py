"""GR00T's wire format: msgpack with arrays as .npy files, and batches of observations.

An array is {"__ndarray_class__": True, "as_npy": the bytes of a .npy file}. An observation is a
batch B with a time axis T: "video" camera -> uint8 [B, T, H, W, 3], "state" -> arm [B, T, joints]
and gripper [B, T, grippers], "language" one key -> [[text]]; only the last frame is used. Source:
gr00t/policy/server_client.py of NVIDIA/Isaac-GR00T, commit 38624df. S are the dimensions of a state.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from blm.serving.protocols.msgpack_limits import MAX_TEXT, check_limits
from blm.serving.protocols.openpi import wire
from blm.types import ActionKind, BlmError, Observation, PolicyContract, shorten

PARTS = ("arm", "gripper")
"""The modality keys of state and action, as in `meta/modality.json` of our datasets."""
MAX_ROWS = 32
"""Maximum number of observations per request: the scheduler's batch size on a GPU."""
MARGIN = 2
"""Ratio of the message limit to a full batch; it allows for one older frame per observation."""
_TOKEN, _MAX_TOKEN = "api_token", 1024
_MAGIC = b"\x93NUMPY"
_HEADER_LENGTH = {1: 2, 2: 4, 3: 4}
"""Size of the header-length field, by major version of the format [bytes]."""
_HEADER = re.compile(
    rb"\{'descr': '([<>|=][biuf]\d{1,2})', 'fortran_order': (False|True), "
    rb"'shape': \(([\d, ]{0,200})\), \} *\n"
)
"""The header that np.save writes for numbers.

NumPy's own reader would pass the header to Python's parser.
"""


def parts_of(kinds: Sequence[ActionKind]) -> dict[str, list[int]]:
    """Return modality key -> its dimensions: grippers, wherever they are, and everything else. A key
    without dimensions is left out."""
    grippers = [place for place, kind in enumerate(kinds) if kind == "gripper"]
    others = [place for place in range(len(kinds)) if place not in grippers]
    return {part: places for part, places in zip(PARTS, (others, grippers), strict=True) if places}


def message_limit(contract: PolicyContract) -> int:
    """Return the maximum size of a client's message [bytes]: MARGIN times MAX_ROWS observations."""
    dim = max(space.state_dim for space in contract.action_spaces.values())
    row = contract.picture_bytes + 8 * dim + MAX_TEXT
    return max(wire.SMALLEST_LIMIT, MARGIN * MAX_ROWS * row)


def item_limit() -> int:
    """Return the maximum number of msgpack items of a request.

    It allows for nested texts per row, and 1024 items for other keys.
    """
    return 1024 + 8 * MAX_ROWS


def pack(message: Any) -> bytes:
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Decode a message.

    Raises BlmError for malformed data, too many items, and arrays without numbers.
    """
    check_limits(data, item_limit())
    return _unpack_counted(data)


def read_request(message: bytes, accepts: Callable[[str], bool] | None) -> Mapping[str, Any]:
    """Decode a request after `accepts` has accepted its API key; None needs no key.

    Raises BlmError.
    """
    items = check_limits(message, item_limit())
    if accepts is not None and not _has_valid_key(message, items, accepts):
        raise BlmError(f"wrong or missing {_TOKEN}")
    request = _unpack_counted(message)
    if not isinstance(request, Mapping):
        raise BlmError(f"a request must be a map, got {type(request).__name__}")
    return request


def _has_valid_key(message: bytes, items: list[slice], accepts: Callable[[str], bool]) -> bool:
    """Check the API key in the outermost map, without decoding the other items."""
    given: Any = None
    try:
        for key, value in zip(items[::2], items[1::2], strict=True):
            if key.stop - key.start < 16 and msgpack.unpackb(message[key]) == _TOKEN:
                given = msgpack.unpackb(message[value]) if value.stop - value.start <= _MAX_TOKEN else None
    except (ValueError, TypeError, msgpack.UnpackException):
        return False
    return isinstance(given, str) and accepts(given)


def _unpack_counted(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (ValueError, TypeError, KeyError, OverflowError, msgpack.UnpackException) as error:
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise BlmError(f"the message is not valid msgpack with NumPy arrays: {reason}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        out = io.BytesIO()
        np.save(out, value, allow_pickle=False)
        return {"__ndarray_class__": True, "as_npy": out.getvalue()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent")


def _decode(value: dict[Any, Any]) -> Any:
    return _read_npy(value["as_npy"]) if "__ndarray_class__" in value else value


def _read_npy(data: Any) -> np.ndarray[Any, Any]:
    """Return the array of a .npy file, read-only and exactly as large as its data.

    Raises ValueError.
    """
    if not isinstance(data, bytes) or data[:6] != _MAGIC or data[6:7] not in (b"\1", b"\2", b"\3"):
        raise ValueError(f"not a .npy file: {shorten(data, 40)}")
    begin = 8 + _HEADER_LENGTH[data[6]]
    end = begin + int.from_bytes(data[8:begin], "little")
    found = _HEADER.fullmatch(data[begin : min(end, begin + 1024)])
    if found is None:
        raise ValueError(f"not the header of an array of numbers: {shorten(data[begin:end], 100)}")
    dtype, shape = np.dtype(found[1].decode()), tuple(int(n) for n in found[3].split(b",") if n.strip())
    if dtype.itemsize * math.prod(shape) != len(data) - end or max(shape, default=0) > len(data):
        raise ValueError(f"an array of {dtype} {shorten(shape)} does not have {len(data) - end} bytes")
    return np.ndarray(shape, dtype, buffer=data, offset=end, order="F" if found[2] == b"True" else "C")


def to_observations(data: Any, contract: PolicyContract) -> list[Observation]:
    """Return the observations of a "get_action" request, one per row of the batch.

    "options" may hold a "seed", and the "robot", which is required if the policy has more than one.
    Raises ContractError or BlmError that names the fault.
    """
    try:
        seen, options = _map(_map(data, "data")["observation"], "observation"), options_of(data)
        (texts,) = _map(seen["language"], "language").values()
        video, parts = _map(seen["video"], "video"), _map(seen["state"], "state")
        instructions, places = _texts(texts), _state_parts(options, contract)
        frames = {camera: _last(f"video.{camera}", video[camera], 5, "u") for camera in contract.cameras}
        states = [_last(f"state.{part}", parts[part], 3, "iuf") for part in places]
        sizes = {len(instructions), *map(len, states), *map(len, frames.values())}
        if len(sizes) > 1 or not 1 <= len(instructions) <= MAX_ROWS:
            found = ", ".join(map(str, sorted(sizes)))
            raise ValueError(f"video, state and language must have one batch of 1 to {MAX_ROWS}, got {found}")
        state = _in_order(np.concatenate(states, axis=-1), [i for found in places.values() for i in found])
    except (KeyError, TypeError, ValueError) as error:
        reason = "lacks" if isinstance(error, KeyError) else "is wrong:"
        raise BlmError(
            f"the observation {reason} {shorten(error)}; needed: 'video' with {', '.join(contract.cameras)} "
            "[B, T, H, W, 3], 'state' with arm [B, T, joints] and gripper [B, T, grippers], 'language' with "
            "one list of texts, as nested maps"
        ) from error
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


def _state_parts(options: Mapping[str, Any], contract: PolicyContract) -> dict[str, list[int]]:
    """Return the parts of the state of the robot that a request names, or of the only one."""
    robot = options.get(wire.ROBOT) or next(iter(contract.action_spaces))
    space = contract.action_spaces.get(robot) if isinstance(robot, str) else None
    return parts_of((space or next(iter(contract.action_spaces.values()))).state_kinds)


def _in_order(values: np.ndarray[Any, Any], order: Sequence[int]) -> np.ndarray[Any, Any]:
    """Return vectors [B, S] whose column i goes to place order[i]; of another length as they are, which
    the contract then refuses."""
    if values.shape[-1] != len(order):
        return values
    ordered = np.empty_like(values)
    ordered[:, list(order)] = values
    return ordered


def options_of(data: Any) -> Mapping[str, Any]:
    """Return the optional "options" of a request. Raises TypeError."""
    options = _map(data, "data").get("options")
    return {} if options is None else _map(options, "'options'")


def _map(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{what} must be a map, got {type(value).__name__}")
    return value


def _texts(value: Any) -> list[str]:
    """Return one text per row. A row is a text, or a list of which the last text counts."""
    if not isinstance(value, list):
        raise TypeError(f"language must be a list of texts, got {shorten(value)}")
    texts = [row[-1] if isinstance(row, list) and row else row for row in value]
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"language must be a list of texts, one of them is {shorten(text)}")
    return texts


def _last(what: str, value: Any, dimensions: int, kinds: str) -> np.ndarray[Any, Any]:
    """Return the last frame of each row of a batch with a time axis."""
    if not isinstance(value, np.ndarray) or value.ndim != dimensions or value.dtype.kind not in kinds:
        raise TypeError(f"{what} must be an array with {dimensions} dimensions, got {shorten(value)}")
    if not value.shape[1]:
        raise ValueError(f"{what} has no frame: {value.shape}")
    return value[:, -1]
