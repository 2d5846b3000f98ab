"""One simulated robot that a served model drives through the real protocol, in a thread of its own."""

from __future__ import annotations

import base64
import io
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as Pillow

from blm.robots import ROBOTS
from blm.serving.client import RemotePolicy
from blm.tasks import TASKS, Env
from blm.types import BlmError, ImageArray, Observation, PolicyContract, decision_seed, lookup

SHOWN = ("base", "wrist")
"""Cameras that people watch; the model sees those of its contract."""
SHOWN_SIZE = 256
MOST_STEPS = 200
SETTLE = 10
"""Steps that are still shown after a success."""
FARTHEST = 0.3
"""An object is pushed at most so far at a time [m]."""
LONGEST_INSTRUCTION = 300


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a visitor wants to see."""

    robot: str
    task: str
    seed: int
    instruction: str = ""
    """Instead of the task's own words."""

    @classmethod
    def read(cls, asked: Mapping[str, Any]) -> Scene:
        """Raises BlmError naming what is wrong."""
        robot, task = str(asked.get("robot")), str(asked.get("task"))
        lookup("robot", robot, ROBOTS)
        lookup("task", task, TASKS)
        seed, words = asked.get("seed"), asked.get("instruction") or ""
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise BlmError(f"the seed is {seed!r}; it must be a whole number from 0 to 2147483647")
        if not isinstance(words, str) or len(words) > LONGEST_INSTRUCTION:
            raise BlmError(f"an instruction is a text of at most {LONGEST_INSTRUCTION} characters")
        return cls(robot=robot, task=task, seed=seed, instruction=words.strip())


class Rollout(threading.Thread):
    """An episode that can be paused, disturbed and looked at; it stays to be looked at when it is over."""

    def __init__(
        self, scene: Scene, uri: str, api_key: str | None, tell: Callable[[dict[str, Any]], None]
    ) -> None:
        """`tell` gets messages for the visitor; it is called from this thread."""
        super().__init__(name="blm-playground", daemon=True)
        self.scene, self.uri, self.api_key, self.tell = scene, uri, api_key, tell
        self.commands: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self.paused, self.stopped = False, False

    def stop(self) -> None:
        self.stopped = True
        self.commands.put({"type": "nothing"})

    def run(self) -> None:
        try:
            with closing(RemotePolicy(self.uri, api_key=self.api_key)) as policy:
                lookup("robot of this model", self.scene.robot, policy.contract.action_spaces)
                size = policy.contract.image_size
                with closing(
                    Env(
                        self.scene.robot,
                        self.scene.task,
                        cameras=(),
                        image_size=size,
                        terminate_on_success=False,
                    )
                ) as env:
                    self._play(env, policy)
        except BlmError as error:
            self.tell({"type": "error", "message": str(error)})

    def _play(self, env: Env, policy: RemotePolicy) -> None:
        env.reset(seed=self.scene.seed)
        env.task_description = self.scene.instruction or env.task_description
        self.tell({"type": "scene", "instruction": env.task_description, "objects": movable(env)})
        self._show(env, {"step": 0})
        steps = self._steps(env, policy)
        while not self.stopped:
            now = time.monotonic()
            over = self.paused
            if not self.paused and (state := next(steps, None)) is not None:
                self._show(env, state)
            elif not self.paused:
                over = True
            self._obey(env, policy.contract, wait_s=0.2 if over else 0.0)
            time.sleep(max(0.0, 1 / policy.contract.rate_hz - (time.monotonic() - now)) * (not over))

    def _steps(self, env: Env, policy: RemotePolicy) -> Iterator[dict[str, Any]]:
        """Drive step by step; the simulation waits for the model, and the visitor is told for how long."""
        step, success = 0, -1
        while step < MOST_STEPS:
            begin = time.perf_counter()
            chunk = policy.act(look(env, policy.contract, decision_seed(self.scene.seed, step))).actions
            latency_ms = 1000 * (time.perf_counter() - begin)
            for action in chunk[: policy.contract.execute]:
                info = env.step(action)[4]
                step += 1
                success = step if info["success"] and success < 0 else success
                over = step >= MOST_STEPS or 0 <= success <= step - SETTLE
                yield {
                    "step": step,
                    "latency_ms": round(latency_ms, 1),
                    "success": success >= 0,
                    "over": over,
                }
                if over:
                    return

    def _obey(self, env: Env, contract: PolicyContract, wait_s: float) -> None:
        """Carry out what the visitor wants."""
        try:
            command = self.commands.get(timeout=wait_s) if wait_s else self.commands.get_nowait()
        except queue.Empty:
            return
        if command["type"] == "pause":
            self.paused = bool(command.get("on", True))
        elif command["type"] == "look":
            images = {camera: env.picture(camera) for camera in contract.cameras}
            pictures = {camera: data_uri(image, "PNG") for camera, image in images.items()}
            self.tell({"type": "look", "id": command.get("id"), "images": pictures})
        elif command["type"] == "move":
            self._move(env, command)

    def _move(self, env: Env, command: Mapping[str, Any]) -> None:
        shift = np.asarray([command.get("dx"), command.get("dy")], dtype=object)
        if not all(isinstance(v, int | float) and abs(v) <= FARTHEST for v in shift):
            self.tell({"type": "error", "message": f"dx and dy are at most {FARTHEST} m, got {shift}"})
            return
        try:
            env.shift_object(str(command.get("object")), np.array([*map(float, shift), 0.0]))
        except BlmError as error:
            self.tell({"type": "error", "message": str(error)})
            return
        self._show(env, {})

    def _show(self, env: Env, state: Mapping[str, Any]) -> None:
        pictures = {camera: data_uri(env.picture(camera, SHOWN_SIZE), "JPEG") for camera in SHOWN}
        self.tell({"type": "frame", "images": pictures, **state})


def look(env: Env, contract: PolicyContract, seed: int) -> Observation:
    """What the model sees now."""
    return Observation(
        images={camera: env.picture(camera) for camera in contract.cameras},
        state=env.state(),
        instruction=env.task_description,
        robot=env.embodiment,
        seed=seed,
    )


def movable(env: Env) -> dict[str, str]:
    """Name -> what to call it, of everything in the scene."""
    return {name: f"{thing.color} {thing.kind}" for name, thing in env.objects().items()}


def data_uri(image: ImageArray, form: str) -> str:
    buffer = io.BytesIO()
    Pillow.fromarray(image).save(buffer, form, quality=85)
    return f"data:image/{form.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
