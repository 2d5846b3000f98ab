"""Build the corpus of scene questions: random scenes, and frames of recorded episodes.

The work is split into shards, which run in parallel and survive a kill. Shards are merged in a
fixed order, so the corpus depends on the configuration only.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from rich.console import Console

from blm.backbone.prompt import PromptOrder, require_order
from blm.corpora.format.messages import CORPUS_FILE, Conversation, read_corpus
from blm.corpora.format.writing import write_corpus
from blm.corpora.scenes.annotations import QuestionSampler, QuestionTurn, by_kind, to_messages
from blm.corpora.scenes.episodes import EpisodeSteps, frame_annotations, read_steps
from blm.corpora.scenes.free_questions import free_turns
from blm.corpora.scenes.instructions import NAMED
from blm.corpora.scenes.observation import SceneObserver, rearrange
from blm.corpora.scenes.questions import control_turn, scan_step, scan_turns, scene_turns
from blm.corpora.scenes.sentences import Answers
from blm.corpora.scenes.templates import Wording
from blm.datasets.dataset import EpisodeDataset
from blm.datasets.lerobot import open_dataset
from blm.io import MARK, remove_own, work_folder
from blm.jobs import MAX_WORKERS, Result, WorkUnit, run_units
from blm.seeds import count_reserved_seeds, reserved_seeds_warning
from blm.tasks import Env
from blm.tasks.naming import Naming
from blm.tasks.randomization import NO_RANDOMIZATION, DomainRandomization
from blm.tasks.task_env import draw_scene
from blm.types import BlmError, ImageArray, require_numbers

SCENES_PER_SHARD = 400
EPISODES_PER_SHARD = 60
FREE_STREAM = 1
"""Stream of the random numbers of free questions: closed questions do not depend on them."""
FRAME_GAP = 3
"""Number of frames between two images of a sequence: 0.15 s at 20 Hz."""


@dataclass(frozen=True, kw_only=True)
class SceneCorpusConfig:
    """Which questions to generate, and from which scenes."""

    robots: tuple[str, ...]
    """Names of the robots."""
    tasks: tuple[str, ...]
    """Names of the tasks."""
    cameras: tuple[str, ...]
    """Cameras whose images the questions show."""
    image_size: int
    """Width and height of the images [px]."""
    scenes: int
    """Number of random scenes, distributed evenly over all pairs of robot and task."""
    first_seed: int
    """Seed of the first scene; scene i has seed first_seed + i.
    Use disjoint ranges for training corpora and held-out corpora."""
    turns: int = 8
    """Number of questions about each scene."""
    pointing: float = 0.3
    """Fraction of questions that ask for a point or a box, 0..1; a quarter of them ask for a box.
    These questions are learnt slowest, and control depends on them."""
    metric: float = 0.2
    """Fraction of questions about positions, displacements and distances in cm, 0..1."""
    choice: float = 0.25
    """Fraction of multiple-choice questions among the questions that allow this form, 0..1."""
    free: float = 0.0
    """Fraction of free questions ("What do you see?") among those about scenes, 0..1.
    They need --answers sentence, and are evaluated with `blm eval digital --benchmark scene_free`."""
    wording: Wording = "seen"
    """Set of question templates; the held-out templates are for evaluation only."""
    max_distractors: int = 3
    """Maximum number of distractor objects in a scene."""
    randomization: DomainRandomization = NO_RANDOMIZATION
    """Randomisation of looks, cameras, layout and sensors."""
    teach: bool = True
    """Add teaching turns (the control prompt, a list of the objects in each view).
    Also write a chain of thought before answers, if --answers is `reasoning`.
    Turn it off for held-out corpora."""
    answers: Answers = "reasoning"
    """Form of the answers.
    With `reasoning`, a chain of thought and a short answer; with `terse`, short answers only.
    With `sentence`, plain English for pretrained backbones: half of the questions ask for the
    answer only, and the others are answered in a sentence. Held-out questions all ask for it."""
    prompt: PromptOrder = "pictures_first"
    """Order of the control prompt, which must be that of Stage II (--intents.prompt).
    With text_first, each control prompt is a conversation of its own, because the other questions
    about its images begin with the images."""
    episodes: Path | None = None
    """Folder with one dataset of demonstrations per robot, whose frames are also asked about."""
    frames_per_episode: int = 6
    """Number of frames of each episode to ask about."""
    frame_turns: int = 5
    """Number of questions about each of these frames."""

    @property
    def thoughts(self) -> bool:
        """Whether answers come after a chain of thought."""
        return self.teach and self.answers == "reasoning"

    @property
    def scans(self) -> bool:
        """Whether scan turns are added, which train nano's vision tower."""
        return self.teach and self.answers != "sentence"

    def __post_init__(self) -> None:
        if not (self.robots and self.tasks and self.cameras):
            raise BlmError("a corpus needs at least one robot, one task and one camera")
        require_numbers(
            self,
            image_size=(16, 4096),
            scenes=(1, 100_000_000),
            first_seed=(0, 2**32 - 1),
            turns=(1, 10_000),
            frame_turns=(1, 10_000),
            frames_per_episode=(0, 1_000_000),
            max_distractors=(0, 100),
            pointing=(0, 1),
            metric=(0, 1),
            choice=(0, 1),
            free=(0, 1),
        )
        if self.free and self.answers != "sentence":
            raise BlmError(
                f"free questions (free is {self.free}) are answered in sentences, but answers is "
                f"'{self.answers}'; valid: sentence, or free 0"
            )
        require_order(self.prompt)
        shares = (self.pointing, self.metric, 1 - self.pointing - self.metric, self.choice)
        if min(shares) < 0 or self.choice > 1:
            raise BlmError(
                f"shares of pointing {self.pointing} and metric {self.metric} must add up to at most 1, "
                f"and multiple choice {self.choice} must be within 0..1"
            )


def build_scene_corpus(config: SceneCorpusConfig, out: Path, *, workers: int = 2) -> int:
    """Write the corpus folder `out`; return the number of conversations. A killed run resumes.

    Raises BlmError if `out` exists, or if unfinished work of another configuration is there.
    """
    if out.exists():
        raise BlmError(f"corpus folder '{out}' exists; move it away or name another one")
    if not 0 <= workers <= MAX_WORKERS:
        raise BlmError(f"workers is {workers}; it must be 0 to {MAX_WORKERS:,}")
    counts = (
        count_reserved_seeds(range(config.first_seed, config.first_seed + config.scenes))
        if config.teach
        else {}
    )
    if counts:
        Console(stderr=True).print(f"warning: {reserved_seeds_warning(str(out), counts)}", soft_wrap=True)
    shards = work_folder(shards_folder(out), SHARDS_KIND, asdict(config))
    units = [
        WorkUnit(name, (source, config, part, shards / name))
        for source, name, part in itertools.chain(_scene_shards(config), _episode_shards(config))
    ]
    run_units(write_shard, units, journal=shards / "journal.jsonl", workers=workers, title="scene questions")
    folders = [unit.payload[3] for unit in units]
    count = write_corpus(out, _merge(folders), media=_pool(folders, shards / "pool"))
    remove_shards(out)
    return count


SHARDS_KIND = "parts of a corpus"
"""Kind in the mark of a folder with unfinished shards."""


def shards_folder(out: Path) -> Path:
    """Return the folder of the unfinished shards of a corpus."""
    return out.with_name(out.name + ".shards")


def remove_shards(out: Path) -> None:
    """Remove the shards that a run, killed at its very end, left next to a finished corpus."""
    if out.exists() and (shards_folder(out) / MARK).is_file():

        def ours(name: PurePath) -> bool:
            known = name.name in (CORPUS_FILE, MARK) or name.match("journal*.jsonl")
            return known or name.parts[-2:-1] == ("images",)

        remove_own(shards_folder(out), ours)


ShardItems = tuple[str, str, Sequence[int]]
"""Robot, task (empty for episodes), and the numbers of the scenes or episodes of a shard."""


def _scene_shards(config: SceneCorpusConfig) -> Iterator[tuple[str, str, ShardItems]]:
    """Yield shards, each of one robot and task: an environment costs as much as 50 scenes."""
    cells = list(itertools.product(config.robots, config.tasks))
    for number, (robot, task) in enumerate(cells):
        for start in range(number, config.scenes, len(cells) * SCENES_PER_SHARD):
            stop = min(start + len(cells) * SCENES_PER_SHARD, config.scenes)
            yield (
                "scenes",
                f"scenes-{robot}-{task}-{start:07d}",
                (robot, task, range(start, stop, len(cells))),
            )


def _episode_shards(config: SceneCorpusConfig) -> Iterator[tuple[str, str, ShardItems]]:
    if config.episodes is None:
        return
    for robot in config.robots:
        count = open_dataset(config.episodes / robot).num_episodes
        shards = -(-count // EPISODES_PER_SHARD)
        for first in range(shards):  # every n-th episode, so that a shard holds all tasks
            yield "frames", f"frames-{robot}-{first:04d}", (robot, "", range(first, count, shards))


def write_shard(payload: tuple[str, SceneCorpusConfig, Any, Path]) -> Result:
    """Write one shard as a small corpus: an idempotent work unit."""
    source, config, part, folder = payload
    conversations = (
        _scene_conversations(config, part) if source == "scenes" else _episode_conversations(config, part)
    )
    if not folder.exists():
        write_corpus(folder, conversations)
    return {"folder": str(folder)}


def _sampler(config: SceneCorpusConfig, *stream: int) -> QuestionSampler:
    rng = np.random.default_rng((config.first_seed, *stream))
    sentences = config.answers == "sentence"
    brief = (0.5 if config.teach else 1.0) if sentences else None
    letters = sentences or not config.teach
    return QuestionSampler(rng, config.wording, config.choice, letters=letters, brief=brief)


def _scene_conversations(config: SceneCorpusConfig, part: ShardItems) -> Iterator[Conversation]:
    robot, task, numbers = part
    sampler = _sampler(config, numbers[0])
    with ExitStack() as stack:

        @cache
        def observer_for(distractors: int) -> SceneObserver:
            env = Env(
                robot,
                task,
                cameras=(),
                image_size=config.image_size,
                distractors=distractors,
                randomization=config.randomization,
            )
            return stack.enter_context(closing(SceneObserver(env, config.cameras)))

        for number in numbers:
            yield from _about_scene(config, observer_for, config.first_seed + number, sampler)


def _about_scene(
    config: SceneCorpusConfig, observer_for: Any, seed: int, sampler: QuestionSampler
) -> Iterator[Conversation]:
    """Yield the conversation about a scene, and its control prompt if that stands alone."""
    rng = np.random.default_rng(seed)
    observer: SceneObserver = observer_for(int(rng.integers(config.max_distractors + 1)))
    env = observer.env
    env.reset(seed=seed, options={"arm": "random"})
    scene = observer.observe(rearrange(env, rng))
    if config.teach:
        scene = scene.in_centimetres()
    free_rng = np.random.default_rng((seed, FREE_STREAM))
    count = int(free_rng.binomial(config.turns, config.free))
    free = free_turns(scene, env.robot, count, free_rng, config.wording)
    closed = config.turns - len(free)
    turns = scene_turns(scene, closed, sampler, pointing=config.pointing, metric=config.metric)
    turns = [*free, *turns]
    turns += scan_turns(scene) if config.scans else []
    alone: list[QuestionTurn] = []
    if config.teach and (env.task_spec.prehensile or scene.arrangement != "held"):
        control = control_turn(scene, env.task_description, env.embodiment, config.prompt)
        (alone if control.before else turns).append(control)
    group = f"scene/{env.embodiment}/{env.task}/{seed}"
    images = [scene.images[camera] for camera in config.cameras]
    row = Conversation(
        id=group,
        group=group,
        source="scene",
        kinds=tuple(turn.kind for turn in turns),
        messages=to_messages(images, turns, thoughts=config.thoughts),
        training="plain" if config.randomization == NO_RANDOMIZATION else "randomized",
        facts=tuple(turn.facts for turn in turns) if any(turn.facts for turn in turns) else (),
        independent=True,
    )
    if turns:  # without any, nothing is in view and the cameras are moved
        yield row
    if alone:
        messages = to_messages(images, alone, thoughts=config.thoughts)
        yield replace(row, id=f"{group}/control", kinds=("control",), messages=messages, facts=())


def _episode_conversations(config: SceneCorpusConfig, part: ShardItems) -> Iterator[Conversation]:
    """Yield questions about frames of recorded episodes, distributed evenly over the steps."""
    assert config.episodes is not None
    robot, _, episodes = part
    dataset = open_dataset(config.episodes / robot)
    sampler = _sampler(config, episodes[0], 1)
    for episode in sampler.rng.permutation(
        episodes
    ):  # mix the tasks, so that any prefix of the corpus is a fair sample
        first = dataset.starts[episode]
        steps = _steps(dataset, robot, int(episode))
        moments = [(index, frame) for index in range(len(steps.names)) for frame in steps.moments(index)]
        for index, frame in _balance_steps(moments, config.frames_per_episode, sampler.rng):
            instruction = dataset.instructions[dataset.task_index[first + frame]]
            turns = sampler.sample_turns(
                by_kind(frame_annotations(steps, index, frame, instruction)), config.frame_turns
            )
            turns += [scan_step(steps.names[index])] if config.scans else []
            images = _pictures(dataset, config.cameras, first, frame, sampler.rng)
            yield Conversation(
                id=f"episode/{robot}/{episode}/{frame}",
                group=f"episode/{robot}/{dataset.tasks[episode]}/{dataset.seeds[episode]}",
                source="episode",
                kinds=tuple(turn.kind for turn in turns),
                messages=to_messages(images, turns, thoughts=config.thoughts),
                training=dataset.training,
                independent=True,
            )


def _steps(dataset: EpisodeDataset, robot: str, episode: int) -> EpisodeSteps:
    """Return the steps of an episode with the words of its scene."""
    first, stop = dataset.starts[episode : episode + 2]
    task = dataset.tasks[episode]
    naming = _naming(dataset, robot, episode)
    return read_steps(task, dataset.primitives[first:stop], dataset.success[first:stop], naming)


def _naming(dataset: EpisodeDataset, robot: str, episode: int) -> Naming:
    """Return the words of an episode, which follow from its seed.

    Raises BlmError if the instruction has none of these words: another version drew the scene.
    """
    task = dataset.tasks[episode]
    if task not in NAMED:
        return Naming()
    draw = draw_scene(robot, task, dataset.seeds[episode])
    instruction = dataset.instructions[dataset.task_index[dataset.starts[episode]]]
    if not any(word in instruction for word in draw.words.values()):
        raise BlmError(
            f"episode {episode} of '{dataset.folder}' says {instruction!r}, but the scene of its seed has "
            f"the words {dict(draw.words)}: use the program version of the collection"
        )
    return Naming(draw.words, draw.other_words)


def _balance_steps(
    moments: Sequence[tuple[int, int]], count: int, rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Sample frames so that every step occurs equally often."""
    steps = {index: [m for m in moments if m[0] == index] for index, _ in moments}
    drawn = [
        (index, int(turn), steps[index][place])
        for index in steps
        for turn, place in enumerate(rng.permutation(len(steps[index])))
    ]
    order = rng.permutation(len(drawn))  # ties between steps are broken at random
    return [m for _, _, m in sorted((drawn[i] for i in order), key=lambda d: d[1])[:count]]


def _pictures(
    dataset: EpisodeDataset, cameras: Sequence[str], first: int, frame: int, rng: np.random.Generator
) -> list[ImageArray]:
    """Return the images of one frame, or of a sequence of frames that leads to it.

    A sequence has two frames in all views, or three in the first view.
    """
    form = int(rng.integers(4))
    frames, views = {2: (2, cameras), 3: (3, cameras[:1])}.get(form, (1, cameras))
    rows = [int(first) + max(0, frame - FRAME_GAP * back) for back in reversed(range(frames))]
    shown = [dataset.frames(rows, camera) for camera in views]
    return [pictures[time] for time in range(frames) for pictures in shown]


def _pool(folders: Sequence[Path], pool: Path) -> Path:
    """Move the images of all shards into one folder; their names are hashes of their content."""
    (pool / "images").mkdir(parents=True, exist_ok=True)
    for picture in (picture for folder in folders for picture in (folder / "images").glob("*.png")):
        picture.replace(pool / "images" / picture.name)
    return pool


def _merge(folders: Sequence[Path]) -> Iterator[Conversation]:
    """Interleave the shards, so that any prefix of the corpus is a fair sample of it."""
    for taken in itertools.zip_longest(*(read_corpus(folder) for folder in folders)):
        yield from filter(None, taken)
