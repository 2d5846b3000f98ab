"""Build the scene-question corpus: random scenes, and frames of recorded episodes.

Work is cut into shards that run in parallel and survive a kill; the shards are merged in order, so the corpus
depends on the configuration only.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blm.corpora.messages import Conversation, read_corpus, write_corpus
from blm.corpora.questions import (
    ask_done,
    ask_next,
    control_turn,
    observe_scene,
    scene_turns,
    to_messages,
)
from blm.data.episodes import open_dataset
from blm.engine import Unit, run_units
from blm.media import with_pixels
from blm.tasks import Env
from blm.types import BlmError

SCENES_PER_SHARD = 400


@dataclass(frozen=True, kw_only=True)
class SceneCorpusConfig:
    """What to ask about, and where the scenes come from."""

    robots: tuple[str, ...]
    tasks: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int
    scenes: int
    """Random scenes, spread evenly over robots x tasks."""
    first_seed: int
    """Scene i has seed first_seed + i; training and held-out corpora use disjoint ranges."""
    turns: int = 8
    """Questions about each scene."""
    max_distractors: int = 3
    control: bool = True
    """Ask the policy's own prompt too. Off for held-out corpora: its long answer is no benchmark item."""
    episodes: Path | None = None
    """Folder with one dataset per robot whose frames are asked about too."""
    frames_per_episode: int = 6

    def __post_init__(self) -> None:
        if self.scenes < 1 or self.turns < 1:
            raise BlmError(
                f"a corpus needs scenes and turns of at least 1, got {self.scenes} and {self.turns}"
            )


def build_scene_corpus(config: SceneCorpusConfig, out: Path, *, workers: int = 2) -> int:
    """Write the corpus folder `out`; return the number of conversations. Resumes after a kill."""
    if out.exists():
        raise BlmError(f"corpus folder '{out}' exists; remove it or name another one")
    shards = out.with_name(out.name + ".shards")
    units = [
        Unit(f"scenes-{start:07d}", ("scenes", config, start, shards / f"scenes-{start:07d}"))
        for start in range(0, config.scenes, SCENES_PER_SHARD)
    ]
    if config.episodes is not None:
        units += [
            Unit(f"frames-{robot}", ("frames", config, robot, shards / f"frames-{robot}"))
            for robot in config.robots
        ]
    run_units(write_shard, units, journal=shards / "journal.jsonl", workers=workers, title="scene questions")
    count = write_corpus(out, _merge([unit.payload[3] for unit in units]))
    shutil.rmtree(shards)
    return count


def write_shard(payload: tuple[str, SceneCorpusConfig, Any, Path]) -> dict[str, Any]:
    """Write one shard as a small corpus of its own (a work unit: running it twice changes nothing)."""
    source, config, part, folder = payload
    conversations = _random_scenes(config, part) if source == "scenes" else _episode_frames(config, part)
    if not folder.exists():
        write_corpus(folder, conversations)
    return {"folder": str(folder)}


def _random_scenes(config: SceneCorpusConfig, start: int) -> Iterator[Conversation]:
    cells = list(itertools.product(config.robots, config.tasks))
    with ExitStack() as stack:

        @cache  # an environment costs as much as ten scenes
        def environment(robot: str, task: str, distractors: int) -> Env:
            size = config.image_size
            return stack.enter_context(
                Env(robot, task, cameras=config.cameras, image_size=size, distractors=distractors)
            )

        for index in range(start, min(start + SCENES_PER_SHARD, config.scenes)):
            rng = np.random.default_rng(config.first_seed + index)
            robot, task = cells[index % len(cells)]
            env = environment(robot, task, int(rng.integers(config.max_distractors + 1)))
            yield _random_scene(config, env, config.first_seed + index, rng)


def _random_scene(config: SceneCorpusConfig, env: Env, seed: int, rng: np.random.Generator) -> Conversation:
    env.reset(seed=seed, options={"arm": "random"})
    scene = observe_scene(env, config.cameras)
    turns = scene_turns(scene, config.turns, rng)
    if config.control:
        turns.append(control_turn(scene, env.task_description, env.embodiment))
    group = f"scene/{env.embodiment}/{env.task}/{seed}"
    return Conversation(
        id=group,
        group=group,
        source="scene",
        kinds=tuple(turn.kind for turn in turns),
        messages=to_messages([scene.images[camera] for camera in config.cameras], turns),
    )


def _episode_frames(config: SceneCorpusConfig, robot: str) -> Iterator[Conversation]:
    assert config.episodes is not None
    dataset = open_dataset(config.episodes / robot)
    rng = np.random.default_rng(config.first_seed)
    for episode in range(dataset.num_episodes):
        rows = np.flatnonzero(dataset.episode_index == episode)
        for row in _balanced_rows(rows, dataset.success[rows], config.frames_per_episode, rng):
            instruction = dataset.instructions[dataset.task_index[row]]
            turns = [
                ask_done(instruction, bool(dataset.success[row])),
                ask_next(instruction, str(dataset.primitives[row])),
            ]
            images = [dataset.frames([row], camera)[0] for camera in config.cameras]
            yield Conversation(
                id=f"episode/{robot}/{episode}/{row}",
                group=f"episode/{robot}/{dataset.tasks[episode]}/{dataset.seeds[episode]}",
                source="episode",
                kinds=tuple(turn.kind for turn in turns),
                messages=to_messages(images, turns),
            )


def _balanced_rows(rows: np.ndarray, done: np.ndarray, count: int, rng: np.random.Generator) -> list[int]:
    """Draw frames, half of them after the task was done, so that 'no' is not the safe answer."""
    after, before = rows[done], rows[~done]
    picked = [rng.choice(part, min(len(part), count // 2), replace=False) for part in (after, before)]
    return sorted(int(row) for part in picked for row in part)


def _merge(folders: list[Path]) -> Iterator[Conversation]:
    for folder in folders:
        for conversation in read_corpus(folder):
            yield replace(conversation, messages=with_pixels(conversation.messages, folder))
