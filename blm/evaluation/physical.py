"""Closed-loop evaluation of any `Policy`: our checkpoint, a socket, a baseline, an expert."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import av
import numpy as np

from blm.engine import Unit, run_units
from blm.evaluation.intervals import success_rate
from blm.evaluation.protocol import PhysicalProtocol, digest, protocol_hash
from blm.evaluation.results import atomically, machine, write_result
from blm.tasks import TASKS, Env, gl_backend
from blm.types import ContractError, FloatArray, ImageArray, Observation, Policy

VIDEO_CAMERA, VIDEO_SIZE = "base", 240


@runtime_checkable
class Privileged(Protocol):
    """A policy that looks into the simulator, such as the planning expert; told of each new episode."""

    def attach(self, env: Env) -> None: ...


def evaluate_physical(
    make_policy: Callable[[], Policy],
    protocol: PhysicalProtocol,
    out: Path,
    *,
    workers: int = 2,
    videos_per_cell: int = 1,
) -> dict[str, Any]:
    """Run every episode of the protocol; write `out`/result.json and videos; return the result.

    `make_policy` is picklable; it is called here, to compare contracts, and once per worker. A killed run
    continues from `out`/journal.jsonl. Raises ContractError when the policy does not fit the protocol.
    """
    start = time.monotonic()
    policy = make_policy()
    contract = policy.contract
    _close(policy)
    protocol.require_fits(contract)
    run = f"{protocol_hash(protocol)}/{contract.revision}/{videos_per_cell}"
    cells = list(itertools.product(protocol.robots, protocol.tasks))
    units = [
        Unit(f"{run}/{robot}/{task}/{seed}", (robot, task, seed, index < videos_per_cell))
        for robot, task in cells
        for index, seed in enumerate(protocol.seeds)
    ]
    setup: dict[str, Any] = {"setup": _set_up, "setup_args": (make_policy, protocol, out)}
    journal = out / "journal.jsonl"
    results = run_units(run_episode, units, journal=journal, workers=workers, title="episodes", **setup)
    _close(_worker)  # of this process, when workers is 0
    rows = list(results.values())
    of_cell = {cell: [row for row in rows if (row["robot"], row["task"]) == cell] for cell in cells}
    return write_result(
        out,
        protocol,
        start,
        kind="physical",
        score="success_once",
        model=contract.revision,
        overall=_summary(rows),
        cells=[{"robot": cell[0], "task": cell[1], **_summary(part)} for cell, part in of_cell.items()],
        machine={**machine(), "rendering": gl_backend()},
        rows=rows,
    )


def decision_seed(seed: int, step: int) -> int:
    """Seed of the policy's noise at one step of one episode: the same wherever the policy runs."""
    return int(np.random.SeedSequence((seed, step)).generate_state(1)[0])


class _Worker:
    """What one worker process keeps between episodes: the policy, and the environment of the last cell."""

    def __init__(self, make_policy: Callable[[], Policy], protocol: PhysicalProtocol, out: Path) -> None:
        self.make_policy, self.protocol, self.out = make_policy, protocol, out
        self._env: Env | None = None

    @cached_property
    def policy(self) -> Policy:
        return self.make_policy()

    def env(self, robot: str, task: str) -> Env:
        if self._env is None or (self._env.embodiment, self._env.task) != (robot, task):
            _close(self._env)
            size = self.protocol.image_size
            self._env = Env(robot, task, cameras=(), image_size=size, terminate_on_success=False)
        return self._env

    def close(self) -> None:
        _close(self._env)
        _close(self.__dict__.pop("policy", None))


_worker: _Worker | None = None


def _set_up(make_policy: Callable[[], Policy], protocol: PhysicalProtocol, out: Path) -> None:
    global _worker
    _close(_worker)
    _worker = _Worker(make_policy, protocol, out)


def _close(thing: object) -> None:
    if hasattr(thing, "close"):  # environments and remote policies hold resources, other policies none
        thing.close()


def run_episode(unit: tuple[str, str, int, bool]) -> dict[str, Any]:
    """One episode: (robot, task, seed, whether to film it) -> its row."""
    assert _worker is not None, "run_episode needs _set_up"
    robot, task, seed, film = unit
    protocol, policy, env, spec = _worker.protocol, _worker.policy, _worker.env(robot, task), TASKS[task]
    unseen = {"phrasing": len(spec.phrasings) + seed % len(spec.held_out_phrasings)}
    env.reset(seed=seed, options=unseen if protocol.phrasing == "held_out" else None)
    scene = digest([np.round(part, 6).tolist() for part in (env.data.qpos, env.data.mocap_pos)])
    policy.reset()
    if isinstance(policy, Privileged):
        policy.attach(env)
    waits: list[float] = []
    frames: list[ImageArray] = []
    infos: list[dict[str, Any]] = []
    actions = _actions(policy, env, seed, protocol, waits)
    end = protocol.max_steps
    while len(infos) < end:
        if film:
            frames.append(env.picture(VIDEO_CAMERA, VIDEO_SIZE))
        infos.append(env.step(next(actions))[4])
        if first := _first_success(infos):
            end = min(protocol.max_steps, first + protocol.settle_steps)
    video = f"videos/{robot}-{task}-{seed}.mp4" if film else None
    if video:
        write_video(_worker.out / video, frames, protocol.rate_hz)
    row = {"id": f"{robot}/{task}/{seed}", "robot": robot, "task": task, "seed": seed, "scene": scene}
    row |= {"instruction": env.task_description, "act_ms": 1000 * float(np.median(waits)), "video": video}
    return row | _outcome(infos)


def _actions(
    policy: Policy, env: Env, seed: int, protocol: PhysicalProtocol, waits: list[float]
) -> Iterator[FloatArray]:
    """Ask for a chunk, hand out its first `execute` actions, ask again; `waits` gets the seconds of each.

    Only the pictures that the policy sees are drawn: rendering costs more than physics.
    """
    for step in itertools.count(0, protocol.execute):
        observation = Observation(
            images={camera: env.picture(camera) for camera in protocol.cameras},
            state=env.state(),
            instruction=env.task_description,
            robot=env.embodiment,
            seed=decision_seed(seed, step),
        )
        begin = time.monotonic()
        chunk = np.asarray(policy.act(observation).actions, dtype=np.float32)
        waits.append(time.monotonic() - begin)
        shape = (policy.contract.horizon, env.contract_space.dim)
        if chunk.shape != shape or not np.isfinite(chunk).all():
            raise ContractError(f"the policy promised finite actions {shape}, gave {chunk.shape}:\n{chunk}")
        yield from chunk[: protocol.execute]


def _outcome(infos: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = _first_success(infos)
    flags = [
        name
        for name, value in infos[0].items()
        if isinstance(value, bool | np.bool_) and "success" not in name
    ]
    never = [flag for flag in flags if not any(info[flag] for info in infos)]
    missed = "never: " + ", ".join(never) if never else "never all at once"
    return {
        "success_once": first > 0,
        "success_at_end": bool(infos[-1]["success"]),
        "steps": len(infos),
        "first_success": first or None,
        "reason": "" if first else missed,
    }


def _first_success(infos: Sequence[dict[str, Any]]) -> int:
    """The first step after which the rule held, counted from 1; 0 for none."""
    return next((step for step, info in enumerate(infos, start=1) if info["success"]), 0)


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    scores = ("success_once", "success_at_end")
    rates = {score: asdict(success_rate([row[score] for row in rows])) for score in scores}
    return {"n": len(rows), **rates, "act_ms": float(np.median([row["act_ms"] for row in rows]))}


def write_video(path: Path, frames: Sequence[ImageArray], rate_hz: float) -> None:
    """Write H.264 that browsers play, small enough to embed (about 100 kB for ten seconds)."""
    faststart = {"movflags": "faststart"}
    with atomically(path) as file, av.open(str(file), "w", format="mp4", options=faststart) as container:
        stream = container.add_stream("libx264", rate=round(rate_hz), options={"crf": "30"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
