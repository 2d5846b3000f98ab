"""Recipes: functions that return one complete, frozen configuration tree. Variants `replace` a few fields.

The command line overrides any field by its dotted name (`--stage2.steps 500`); the resolved recipe is saved
beside everything it made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from blm.bridge import BridgeConfig
from blm.jobs import MAX_WORKERS
from blm.planner.expert import HOLD_STEPS
from blm.policy.network import PolicyConfig
from blm.robots import ROBOTS
from blm.seeds import EVALUATION_SEEDS, VALIDATION_SEEDS
from blm.tasks import TASKS
from blm.tasks.appearance import PLAIN, Appearance
from blm.tasks.scene import CAMERAS
from blm.training.loop.loop import LoopConfig
from blm.training.pretraining.nano import NanoPretrainingConfig
from blm.training.sft.lora import Lora
from blm.training.sft.train import Stage1Config
from blm.types import BlmError, lookup, require_numbers


@dataclass(frozen=True, kw_only=True)
class Demonstrations:
    """What the planner records."""

    episodes: int
    """Kept demonstrations per robot and task."""
    held_out_episodes: int
    """The same on Stage I's held-out scenes, for questions about episodes; never trained on."""
    noise: tuple[float, ...] = (0.0, 0.01, 0.02)
    disturbed: float = 0.15
    random_starts: float = 0.3
    hold: int = 10
    distractors: int = 0
    appearance: Appearance = PLAIN
    """These are the fields of `CollectConfig` with the same names."""

    def __post_init__(self) -> None:
        require_numbers(self, episodes=(1, 1_000_000), held_out_episodes=(1, 1_000_000))
        require_numbers(self, noise=(0, 1), disturbed=(0, 1), random_starts=(0, 1), distractors=(0, 100))
        require_numbers(self, hold=(HOLD_STEPS, 100_000))


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Scene questions for Stage I."""

    scenes: int
    held_out_scenes: int
    turns: int = 8
    """Questions about one scene."""
    max_distractors: int = 3
    frames_per_episode: int = 8

    def __post_init__(self) -> None:
        require_numbers(self, scenes=(1, 100_000_000), held_out_scenes=(1, 1_000_000), turns=(1, 10_000))
        require_numbers(self, max_distractors=(0, 100), frames_per_episode=(0, 1_000_000))


@dataclass(frozen=True, kw_only=True)
class Stage1:
    """Fine-tuning of the backbone."""

    backbone: str = "nano"
    """A name of BACKBONES, or a folder."""
    schooling: NanoPretrainingConfig = field(default_factory=NanoPretrainingConfig)
    """nano only: what it learns first."""
    training: Stage1Config


@dataclass(frozen=True, kw_only=True)
class Stage2:
    """Training of bridge and policy on the frozen backbone."""

    loop: LoopConfig
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    layer: int = 3
    """k: the block of the language model whose output H_k the bridge reads."""
    stride: int = 2
    """Cache every n-th frame."""
    execute: int = 8
    """Actions of a chunk that are carried out before the policy is asked again."""
    drive: int = 0
    """Episodes of each robot and task at every evaluation (`loop.eval_every`), on seeds for validation."""

    def __post_init__(self) -> None:
        require_numbers(self, layer=(1, 10_000), stride=(1, 100_000), drive=(0, len(VALIDATION_SEEDS)))
        if not 1 <= self.execute <= self.policy.horizon:
            raise BlmError(f"stage2.execute {self.execute} must lie in 1..horizon = {self.policy.horizon}")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Both spaces, on seeds that nothing was trained on."""

    episodes: int
    """Closed-loop episodes per robot and task."""
    max_steps: int = 200
    max_questions: int = 600
    """Held-out questions asked, evenly over the scenes."""

    def __post_init__(self) -> None:
        require_numbers(self, episodes=(1, len(EVALUATION_SEEDS)), max_steps=(1, 1_000_000))
        require_numbers(self, max_questions=(1, 10**9))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of the whole loop."""

    name: str
    robots: tuple[str, ...] = tuple(ROBOTS)
    tasks: tuple[str, ...] = tuple(TASKS)
    cameras: tuple[str, ...] = ("base", "wrist")
    image_size: int = 112
    workers: int = 2
    """Worker processes for collection, questions, the intent cache and evaluation; 0: this process."""
    engine: Literal["local", "ray"] = "local"
    """Where collection and closed-loop evaluation run: on this machine, or on a Ray cluster."""
    demonstrations: Demonstrations
    corpus: Corpus
    stage1: Stage1
    stage2: Stage2
    evaluation: Evaluation

    def __post_init__(self) -> None:
        for kind, names, registry in (("robot", self.robots, ROBOTS), ("task", self.tasks, TASKS)):
            if not names or len(set(names)) != len(names):
                raise BlmError(f"a recipe needs {kind}s, each once; got {names}")
            for name in names:
                lookup(kind, name, registry)
        if not self.cameras:
            raise BlmError(f"a recipe needs cameras, of {', '.join(CAMERAS)}")
        for camera in self.cameras:
            lookup("camera", camera, CAMERAS)
        require_numbers(self, image_size=(16, 4096), workers=(0, MAX_WORKERS))
        if self.image_size % 2:
            raise BlmError(f"image_size is {self.image_size}; videos need an even side")


def stage1(*, eye: int, drill: int, steps: int, batch_size: int = 8) -> Stage1:
    """Stage I of the nano backbone from scratch, in steps: its eye, the drill, then everything."""
    basis = NanoPretrainingConfig()
    schooling = NanoPretrainingConfig(
        eye=replace(basis.eye, steps=eye),
        drill=replace(basis.drill, steps=drill),
    )
    return Stage1(schooling=schooling, training=_all_but_eye(steps=steps, batch_size=batch_size, lr=2e-3))


def _all_but_eye(*, steps: int, batch_size: int, lr: float) -> Stage1Config:
    loop = LoopConfig(steps=steps, batch_size=batch_size, lr=lr, muon=10 * lr, title="Stage I")
    return Stage1Config(loop=loop, vision_scale=0.0)


def stage2(*, steps: int, batch_size: int = 64) -> Stage2:
    """Stage II of the nano policy."""
    loop = LoopConfig(steps=steps, batch_size=batch_size, lr=2e-3, muon=0.02, title="Stage II")
    return Stage2(loop=loop)


def demo() -> Recipe:
    """What `make demo` runs: all robots, two tasks, minutes on two CPU cores; too small for high success.

    Its backbone is the released one, which goes on learning for a moment; its policy begins from nothing.
    """
    return Recipe(
        name="demo",
        tasks=("push_cube", "pick_cube"),
        cameras=("base", "side", "wrist"),
        demonstrations=Demonstrations(episodes=16, held_out_episodes=2),
        corpus=Corpus(scenes=800, held_out_scenes=120, turns=6),
        stage1=Stage1(backbone="blm-nano", training=_all_but_eye(steps=60, batch_size=8, lr=2e-4)),
        stage2=stage2(steps=450),
        evaluation=Evaluation(episodes=4, max_questions=300),
    )


def ci() -> Recipe:
    """The smallest run that passes through every part: proves that it works, not that it learns."""
    return replace(
        demo(),
        name="ci",
        tasks=tuple(TASKS),
        cameras=("base", "wrist"),
        demonstrations=Demonstrations(episodes=1, held_out_episodes=1),
        corpus=Corpus(scenes=40, held_out_scenes=8, turns=4),
        stage1=stage1(eye=10, drill=10, steps=10, batch_size=4),
        stage2=stage2(steps=10, batch_size=8),
        evaluation=Evaluation(episodes=1, max_steps=60, max_questions=60),
    )


def nano() -> Recipe:
    """The small model at full strength, hours on two CPU cores: how `blm-nano` is made (see its card)."""
    return replace(
        demo(),
        name="nano",
        tasks=tuple(TASKS),
        cameras=("base", "side", "wrist"),
        demonstrations=Demonstrations(episodes=80, held_out_episodes=4),
        corpus=Corpus(scenes=24_000, held_out_scenes=600, turns=10, frames_per_episode=6),
        stage1=stage1(eye=2600, drill=1500, steps=6000),
        stage2=stage2(steps=20_000),
        evaluation=Evaluation(episodes=50, max_questions=3000),
    )


def smol() -> Recipe:
    """Pretrained weights without a hub: adapters in Stage I, the nano policy behind them. Not run yet."""
    loop = LoopConfig(steps=2000, batch_size=16, lr=1e-3, title="Stage I")
    training = Stage1Config(loop=loop, lora=Lora(rank=16), cache_features=True)
    base = nano()
    return replace(
        base,
        name="smol",
        image_size=128,
        stage1=Stage1(backbone="smol", training=training),
        stage2=replace(base.stage2, layer=20),
    )


def _qwen(name: str, layer: int, policy: PolicyConfig) -> Recipe:
    """Full fine-tuning of language model and merger with a frozen eye, as the fine-tuning scripts of Qwen."""
    loop = LoopConfig(steps=10_000, batch_size=128, lr=1e-5, weight_decay=0.0, title="Stage I")
    training = Stage1Config(
        loop=loop, vision_scale=0.0, pack_length=4096, cache_features=True, checkpoint_blocks=True
    )
    loop2 = LoopConfig(steps=80_000, batch_size=256, lr=1e-4, weight_decay=1e-5, title="Stage II")
    base = nano()
    return replace(
        base,
        name=name,
        image_size=224,
        demonstrations=Demonstrations(episodes=500, held_out_episodes=10),
        stage1=Stage1(backbone=name, training=training),
        stage2=Stage2(loop=loop2, policy=policy, layer=layer),
    )


def qwen2_5_vl_3b() -> Recipe:
    """A GPU's recipe: half of the paper's depth in the policy. Not run yet."""
    bridge = BridgeConfig(width=1024, latents=32, blocks=2, heads=16)
    policy = PolicyConfig(bridge=bridge, width=1024, blocks=8, heads=16, max_dim=32, future_layer=6)
    return _qwen("qwen2_5_vl_3b", 24, policy)


def qwen2_5_vl_7b() -> Recipe:
    """The paper's scale: its backbone, and the policy head of GR00T N1.5 (16 blocks of 1536). Not run yet."""
    bridge = BridgeConfig(width=1024, latents=32, blocks=4, heads=16)
    policy = PolicyConfig(bridge=bridge, width=1536, blocks=16, heads=32, max_dim=32, future_layer=12)
    return _qwen("qwen2_5_vl_7b", 19, policy)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (demo, ci, nano, smol, qwen2_5_vl_3b, qwen2_5_vl_7b)
}
