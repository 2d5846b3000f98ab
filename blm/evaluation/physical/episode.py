"""One closed-loop episode in a worker process: its key -> JSON of an EpisodeResult."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np

from blm.chunks import ChunkExecutor, ObservationHistory
from blm.evaluation.physical.outcome import StepOutcome, judge, observe_step
from blm.evaluation.physical.policy_host import HostedPolicy
from blm.evaluation.physical.result import EpisodeResult
from blm.evaluation.protocol import EpisodeKey, PhysicalProtocol, digest, phrasing_of
from blm.io import replacing
from blm.jobs import Result
from blm.tasks import TASKS, TaskEnv
from blm.tasks.eef_env import control_of, env_class
from blm.types import ContractError, FloatArray, ImageArray, Observation, Policy, decision_seed

VIDEO_CAMERA, VIDEO_SIZE = "base", 240


@runtime_checkable
class PrivilegedPolicy(Protocol):
    """A policy that sees the simulator's state, such as the planning expert."""

    def attach(self, env: TaskEnv) -> None:
        """Prepare for a new episode in this environment, which has been reset."""
        ...


class EpisodeWorker:
    """State of a worker process between episodes: its policy, and the last cell's environment."""

    def __init__(self, make_policy: Callable[[], Policy], protocol: PhysicalProtocol, out: Path) -> None:
        self.make_policy, self.protocol, self.out = make_policy, protocol, out
        self._env: TaskEnv | None = None

    @cached_property
    def policy(self) -> Policy:
        return self.make_policy()

    def env(self, robot: str, task: str) -> TaskEnv:
        if self._env is None or (self._env.embodiment, self._env.task) != (robot, task):
            close(self._env)
            space = self.policy.contract.action_spaces[robot]
            world: type[TaskEnv] = env_class(control_of(robot, space, "the policy"))
            if self.protocol.simulator.startswith("maniskill"):
                from blm.tasks.maniskill import ManiSkillEnv

                world = ManiSkillEnv
            size = self.protocol.image_size
            self._env = world(robot, task, cameras=(), image_size=size, terminate_on_success=False)
        return self._env

    def close(self) -> None:
        close(self._env)
        close(self.__dict__.pop("policy", None))


_worker: EpisodeWorker | None = None


def set_up(make_policy: Callable[[], Policy], protocol: PhysicalProtocol, out: Path) -> None:
    """Prepare this process for `run_episode`."""
    global _worker
    tear_down()
    _worker = EpisodeWorker(make_policy, protocol, out)


def tear_down() -> None:
    """Free the worker state of this process, if there is any."""
    global _worker
    close(_worker)
    _worker = None


def close(thing: object) -> None:
    """Call `close` of an environment or policy that has one."""
    if hasattr(thing, "close"):
        thing.close()


@dataclass
class EpisodeTimer:
    """Wall time of one episode [s], by part."""

    policy: float = 0.0
    """Time spent waiting for the policy."""
    physics: float = 0.0
    """Time spent stepping the simulation and judging."""
    rendering: float = 0.0
    decisions: list[float] = field(default_factory=list)
    """Duration of each decision, without the wait in the queue of a shared policy."""

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        setattr(self, part, getattr(self, part) + time.perf_counter() - begin)


def run_episode(unit: tuple[EpisodeKey, bool]) -> Result:
    """Run one episode (its key, whether to film it); return its `EpisodeResult` as JSON."""
    assert _worker is not None, "run_episode needs set_up"
    key, film = unit
    protocol = _worker.protocol
    policy = _worker.policy
    env = _worker.env(key.robot, key.task)
    spec = TASKS[key.task]
    env.reset(seed=key.seed, options=_reset_options(protocol, key))
    scene = _scene_hash(env)
    policy.reset()
    if isinstance(policy, PrivilegedPolicy):
        policy.attach(env)
    start = env.named_objects()[spec.object].position
    clock = EpisodeTimer()
    frames: list[ImageArray] = []
    moments: list[StepOutcome] = []
    actions = drive(policy, env, key.seed, protocol, clock)
    limit = judged = protocol.max_steps  # the outcome depends on the steps up to `judged`
    drive_on = protocol.purpose == "evaluation"
    while len(moments) < (limit if drive_on else judged):
        if film and len(moments) < judged:
            frames.append(env.picture(VIDEO_CAMERA, VIDEO_SIZE))
        action = next(actions)
        with clock.timing("physics"):
            info = env.step(action)[4]
            moments.append(observe_step(env, float(action[-1]), info))
        if moments[-1].success and judged == limit:
            judged = min(limit, len(moments) + protocol.settle_steps)
    video = f"videos/{key.id.replace('/', '-')}.mp4" if film else None
    if video:
        write_video(_worker.out / video, frames, protocol.rate_hz)
    result = EpisodeResult(
        id=key.id,
        robot=key.robot,
        task=key.task,
        seed=key.seed,
        condition=key.condition,
        scene=scene,
        instruction=env.task_description,
        phrasing=phrasing_of(protocol, key.seed),
        video=video,
        seconds_policy=clock.policy,
        seconds_physics=clock.physics,
        seconds_rendering=clock.rendering,
        act_ms=1000 * float(np.median(clock.decisions)),
        **asdict(judge(start, moments[:judged], prehensile=spec.prehensile)),
        success_at_limit=moments[-1].success if len(moments) == limit else None,
    )
    return result.to_json()


def _reset_options(protocol: PhysicalProtocol, key: EpisodeKey) -> dict[str, Any]:
    """Return the options that give an episode its wording and condition.

    A perturbed episode has the wording of its twin, unless its condition is one of language.
    """
    options: dict[str, Any] = {"visible_goals": True} if protocol.visible_goals else {}
    if phrasing_of(protocol, key.seed) == "held_out":
        spec = TASKS[key.task]
        options["phrasing"] = len(spec.phrasings) + key.seed % len(spec.held_out_phrasings)
    return options | key.condition.reset_options(key.robot, key.task, key.seed)


def _scene_hash(env: TaskEnv) -> str:
    """Return a hash of the present poses of all objects and of the arm."""
    poses = [np.round([*thing.position, *thing.quaternion], 6) for thing in env.objects().values()]
    return digest([part.tolist() for part in (*poses, np.round(env.state(), 6))])


def drive(
    policy: Policy, env: TaskEnv, seed: int, protocol: PhysicalProtocol, clock: EpisodeTimer
) -> Iterator[FloatArray]:
    """Yield the action of each control step; see `ChunkExecutor` for delayed chunks.

    With a latency of L seconds a chunk arrives ceil(L * rate) steps late; the arm holds its own
    position until the first one. The episode's variation may add a delay, and hold each action for
    several steps: of the actions for those steps, the first is executed. The policy's view has the
    variation's noise. Only the images that the policy sees are rendered: rendering costs more than
    physics.
    """
    executor = ChunkExecutor(protocol.execute, hold=env.resting_action())
    history = ObservationHistory(policy.contract)
    dynamics = env.variation.dynamics
    held = env.resting_action()
    while True:
        if executor.decision_due:
            with clock.timing("rendering"):
                observation = env.observation(decision_seed(seed, executor.step), protocol.cameras)
            with clock.timing("policy"):
                chunk, seconds = _ask(policy, history.extend(observation))
            clock.decisions.append(seconds)
            executor.receive(chunk, _delay(protocol, seconds) + dynamics.delay)
        is_new = executor.step % dynamics.hold == 0
        action = executor.next_action()
        held = action if is_new else held
        yield held


def _ask(policy: Policy, observation: Observation) -> tuple[FloatArray, float]:
    """Return the chunk [H, D], and the duration of the decision [s]."""
    begin = time.perf_counter()
    chunk = np.asarray(policy.act(observation).actions, dtype=np.float32)
    seconds = policy.seconds if isinstance(policy, HostedPolicy) else time.perf_counter() - begin
    contract = policy.contract
    shape = (contract.horizon, contract.action_spaces[observation.robot].dim)
    if chunk.shape != shape or not np.isfinite(chunk).all():
        raise ContractError(f"the policy promised finite actions {shape}, gave {chunk.shape}:\n{chunk}")
    return chunk, seconds


def _delay(protocol: PhysicalProtocol, seconds: float) -> int:
    """Return the number of control steps between an observation and the arrival of its chunk."""
    if protocol.latency == "none":
        return 0
    late = seconds if protocol.latency == "measured" else float(protocol.latency)
    return math.ceil(late * protocol.rate_hz - 1e-9)  # 0.15 s at 20 Hz are 3 steps, not 4


def write_video(path: Path, frames: Sequence[ImageArray], rate_hz: float) -> None:
    """Write H.264 that browsers can play, small enough to embed (about 100 kB for ten seconds)."""
    faststart = {"movflags": "faststart"}
    with replacing(path) as file, av.open(str(file), "w", format="mp4", options=faststart) as container:
        stream = container.add_stream("libx264", rate=round(rate_hz), options={"crf": "30"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
