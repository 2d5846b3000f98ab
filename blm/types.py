"""Types that all packages share: observations, actions, episodes, messages. Needs NumPy only.

Shape legend: T frames or control steps, H action horizon, D embodiment dimension (arm joints +
gripper). Units: SI and radians. Gripper opening: 0 closed, 1 open. Images: uint8, HWC, RGB. See
docs/conventions.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blm.action_space import ActionKind as ActionKind
from blm.action_space import ActionSpace as ActionSpace
from blm.action_space import as_array, as_float32
from blm.errors import BlmError as BlmError
from blm.errors import ContractError as ContractError
from blm.errors import LateError as LateError
from blm.errors import UnknownNameError as UnknownNameError
from blm.errors import lookup as lookup
from blm.errors import require_numbers as require_numbers
from blm.errors import shorten as shorten
from blm.pictures import PICTURE_FITS, fit_picture
from blm.pictures import ImageArray as ImageArray
from blm.pictures import PictureFit as PictureFit

FloatArray = NDArray[np.floating[Any]]
_ADDED = {"frames": 1, "training": "unknown", "picture_fit": "exact"}
"""Later fields of a contract -> default, which is not written, so that older clients read it."""
MAX_INSTRUCTION = 400
"""Maximum length of an instruction [bytes of UTF-8]; each byte may become a token of every prompt.
With 1,000 tokens, a batch of eight robots took 405 instead of about 100 ms (`blm-nano`, two cores).
Instructions of open datasets stay below 300."""
CAMERA_PIXELS = 1280 * 720
"""Pixels of the largest usual camera picture, which bound the messages of clients."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The inputs of a policy at one control step."""

    images: Mapping[str, ImageArray]
    """Camera name -> uint8 [height, width, 3] RGB."""
    state: FloatArray
    """[S] joint positions (rad) and gripper opening, in the order that the robot's ActionSpace
    states."""
    instruction: str
    robot: str
    seed: int = 0
    """Seed of the sampling noise; the same observation and seed give the same chunk."""
    chunk: FloatArray | None = None
    """[P, D] for real-time chunking: the remaining actions of the chunk in progress, from this step
    on. The new chunk continues them."""
    inference_delay: int = 0
    """Inference delay: number of these actions that are executed before the new chunk arrives."""
    history: tuple[Observation, ...] = ()
    """Observations at the previous decisions of the episode, oldest first, for a policy whose
    contract has a history; see `blm.chunks.ObservationHistory`."""


def decision_seed(seed: int, step: int) -> int:
    """Return the seed of the policy's noise at a step of an episode, the same on every machine."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True)
class ActionChunk:
    """H consecutive actions. The first one is for the step of the observation."""

    actions: FloatArray
    """[H, D] absolute joint-position targets (rad) and gripper opening."""
    rate_hz: float = 20.0


Training = Literal["plain", "randomized", "none", "unknown"]
"""Whether a policy was trained with randomized looks, layouts or dynamics. "none": it was not trained."""


def joint_training(parts: Iterable[Training]) -> Training:
    """Return the record of a policy that was trained on all of these data: randomized if any part
    was, and plain only if all parts are known to be."""
    found = {*parts}
    return next((kind for kind in ("randomized", "unknown", "plain") if kind in found), "unknown")


@dataclass(frozen=True, kw_only=True)
class PolicyContract:
    """The inputs and outputs of a policy, stored in checkpoints and sent to clients."""

    action_spaces: Mapping[str, ActionSpace]
    """Robot name -> action space."""
    cameras: tuple[str, ...]
    image_size: int
    """Square images of this side [px]."""
    horizon: int
    """Actions in a chunk."""
    execute: int
    """Actions of a chunk to execute before the policy is asked again (receding horizon)."""
    rate_hz: float = 20.0
    revision: str = ""
    """Hash of the weights, or the name of a policy that has none."""
    statistics: str = ""
    """Hash of the statistics that normalise states and actions; empty if there are none."""
    frames: int = 1
    """Number of observations that the policy sees: the present one, and those of the decisions
    before it, `execute` control steps apart."""
    training: Training = "unknown"
    """Whether the training scenes were randomized; results of policies that differ in it are told apart."""
    picture_fit: PictureFit = "exact"
    """How pictures of other sizes become squares: they are accepted unless it is "exact"."""

    def __post_init__(self) -> None:
        lookup("picture_fit", self.picture_fit, dict.fromkeys(PICTURE_FITS))
        require_numbers(self, frames=(1, 64))
        lookup("training", self.training, dict.fromkeys(get_args(Training)))
        require_numbers(self, horizon=(1, 100_000), image_size=(1, 16_384), rate_hz=(1e-3, 1e6))
        if not 1 <= self.execute <= self.horizon:
            raise BlmError(f"execute is {self.execute}; it must be 1 to horizon = {self.horizon}")

    def to_json(self) -> dict[str, Any]:
        spaces = {name: space.to_json() for name, space in self.action_spaces.items()}
        fields = {**asdict(self), "action_spaces": spaces, "cameras": list(self.cameras)}
        return {name: value for name, value in fields.items() if _ADDED.get(name) != value}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PolicyContract:
        spaces = {name: ActionSpace.from_json(space) for name, space in data["action_spaces"].items()}
        return cls(**{**data, "action_spaces": spaces, "cameras": tuple(data["cameras"])})

    @property
    def picture_bytes(self) -> int:
        """Size of the largest pictures of an observation that are to be expected [bytes]."""
        pixels = max(self.image_size**2, 0 if self.picture_fit == "exact" else CAMERA_PIXELS)
        return 3 * len(self.cameras) * pixels

    def check(self, observation: Observation) -> Observation:
        """Return the observation with a float32 state, and with pictures of the policy's size.

        Raises BlmError for an observation that violates the contract.
        """
        text = observation.instruction
        if not isinstance(text, str) or len(text.encode(errors="surrogatepass")) > MAX_INSTRUCTION:
            limit = f"needed: text of at most {MAX_INSTRUCTION} bytes of UTF-8"
            raise ContractError(f"the instruction is {shorten(text, 40)}; {limit}")
        space = lookup("robot", observation.robot, self.action_spaces)
        if len(observation.history) >= self.frames:
            raise ContractError(
                f"the observation has a history of {len(observation.history)}; the policy sees {self.frames} "
                f"frames, so at most {self.frames - 1} before the present one"
            )
        return Observation(
            images=self._check_images(observation),
            state=space.check_state(observation.state, "observation"),
            instruction=observation.instruction,
            robot=observation.robot,
            seed=observation.seed,
            chunk=self._check_chunk(observation, space.dim),
            inference_delay=observation.inference_delay,
            history=tuple(replace(one, images=self._check_images(one)) for one in observation.history),
        )

    def _check_images(self, observation: Observation) -> dict[str, ImageArray]:
        images = dict[str, ImageArray]()
        for camera in self.cameras:
            if camera not in observation.images:
                have = ", ".join(sorted(observation.images)) or "none"
                raise ContractError(
                    f"observation lacks camera '{camera}'; needed: {', '.join(self.cameras)}; got: {have}"
                )
            what = f"camera '{camera}': image"
            image = as_array(observation.images[camera], what)
            images[camera] = fit_picture(image, self.picture_fit, self.image_size, what)
        return images

    def _check_chunk(self, observation: Observation, dim: int) -> FloatArray | None:
        if observation.chunk is None:
            if observation.inference_delay:
                delay = shorten(observation.inference_delay)
                raise ContractError(
                    f"inference_delay (frozen on the wire) is {delay} without a current chunk"
                )
            return None
        chunk = as_float32(observation.chunk, "the chunk in progress")
        if (
            chunk.ndim != 2
            or chunk.shape[1] != dim
            or len(chunk) > self.horizon
            or not np.isfinite(chunk).all()
        ):
            raise ContractError(
                f"the current chunk has shape {chunk.shape}; needed: finite actions of {dim}, "
                f"at most {self.horizon}"
            )
        if not 0 <= observation.inference_delay <= len(chunk):
            raise ContractError(
                f"inference_delay (frozen on the wire) is {shorten(observation.inference_delay)}; the "
                f"current chunk has {len(chunk)} actions"
            )
        return chunk if len(chunk) else None


@dataclass(frozen=True, kw_only=True)
class Episode:
    """One recorded rollout of T control steps; row t holds an observation and the next action."""

    robot: str
    task: str
    seed: int
    instruction: str
    states: FloatArray
    """[T, D] float32."""
    actions: FloatArray
    """[T, D] float32: the correct action in this state, the training target."""
    executed: FloatArray | None = None
    """[T, D] float32 executed actions; None if they are equal to `actions`."""
    images: Mapping[str, ImageArray]
    """Camera -> [T, height, width, 3]; empty when loaded without video."""
    primitives: tuple[str, ...] = ()
    """Name of the primitive in progress at each step (T names), or empty when unknown."""
    success: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)


@dataclass(frozen=True)
class Image:
    """One image in a message: pixels in memory, or a path relative to its corpus folder.

    With both, the pixels are what the path shows, and the path tells which video a frame belongs to.
    """

    pixels: ImageArray | None = None
    path: str | None = None


@dataclass(frozen=True)
class Message:
    """One chat turn. Content is text and images in reading order."""

    role: Literal["system", "user", "assistant"]
    content: tuple[str | Image, ...]
    loss: bool = True
    """Whether training learns it. Only answers are ever learnt; one without loss is context."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for part in self.content if isinstance(part, Image))


Scorer = Literal["exact", "choice", "point", "points", "box", "metric", "facts", "judge"]
"""How an answer is judged. exact: normalised string equality. choice: the letter of an option.
point: distance to "(x, y)". points: share of the points inside the mask. box: overlap of boxes
"(x1, y1, x2, y2)". metric: distance in cm. facts: what it says in free words, against `KeyFacts`.
judge: a language model compares it with the reference."""


@dataclass(frozen=True, kw_only=True)
class KeyFacts:
    """What an answer in free words must say and must not say, by the truth of its scene.

    A fact is in plain words, "one|other" is met by either of them. It is a thing ("red cube"), "yes"
    or "no", the number that the answer gives ("#3"), a relation ("red cube <left> blue ball"), or
    any other phrase.
    """

    required: tuple[str, ...] = ()
    """Facts that the answer must state."""
    forbidden: tuple[str, ...] = ()
    """Facts that the answer must not state."""
    things: tuple[str, ...] = ()
    """Everything that the answer may say is there; any other object in it is false."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question with its reference answer, from a corpus or a benchmark."""

    id: str
    kind: str
    """Question type, e.g. 'count' or 'point'."""
    messages: tuple[Message, ...]
    """All messages up to and including the user's turn, without the answer."""
    answer: str
    group: str
    """Questions about one image share a group: confidence intervals are clustered by group."""
    scorer: Scorer = "exact"
    options: tuple[str, ...] = ()
    """Options of a multiple-choice question; the answer is the letter of one (A, B, ..)."""
    mask: Image | None = None
    """Correct points are those on white pixels of this image."""
    facts: KeyFacts | None = None
    """What the answer is scored by, if the scorer is "facts"; `answer` is then one right answer of many."""


def base_kind(kind: str) -> str:
    """Return the question kind that a pair of yes/no kinds shares: 'success_negative' -> 'success'."""
    return kind.removesuffix("_positive").removesuffix("_negative")


@runtime_checkable
class Policy(Protocol):
    """Anything that turns observations into action chunks: a checkpoint, a client, an expert."""

    @property
    def contract(self) -> PolicyContract: ...

    def act(self, observation: Observation) -> ActionChunk:
        """Return the next action chunk. Raises ContractError if the contract forbids the observation."""

    def reset(self) -> None:
        """Forget the previous episode; called before each episode."""


@runtime_checkable
class Chat(Protocol):
    """Anything that answers a conversation."""

    def answer(self, messages: Sequence[Message], *, max_tokens: int = 128) -> str:
        """Return the answer to the last message, of at most `max_tokens` tokens."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters for the tokens of an answer."""

    max_tokens: int = 128
    temperature: float = 0.0
    """0: greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the most likely tokens that together have this probability."""
    repetition_penalty: float | None = None
    """As in CTRL (Keskar et al., 2019); None: the value in the model's generation_config."""
    seed: int = 0
    """The answer depends on conversation and seed only, not on other requests in the batch."""

    def __post_init__(self) -> None:
        # NaN fails each of these comparisons
        good = self.max_tokens >= 1 and 0 <= self.temperature < math.inf and 0 < self.top_p <= 1
        good_penalty = self.repetition_penalty is None or 0 < self.repetition_penalty < math.inf
        good_seed = -(2**63) <= self.seed < 2**63
        if not (good and good_penalty and good_seed):
            raise BlmError(
                f"{self}: max_tokens >= 1, temperature >= 0, top_p in (0, 1], repetition_penalty > 0 and a "
                "seed of 64 bits are needed, all finite"
            )


@dataclass(frozen=True)
class ChatCapacity:
    """Limits of one chat request. Larger requests are refused before they are decoded."""

    context_tokens: int
    """Tokens of prompt and answer together."""
    image_tokens: int
    """Tokens that the smallest image takes; larger images may take more."""
    max_text_bytes: int
    """UTF-8 bytes of all text parts together; more cannot fit into the context."""
    max_images: int
