"""The named recipes: functions that return a `Recipe`. Variants `replace` a few fields.

The command line overrides any field by its dotted name (`--stage2.loop.steps 500`); the resulting
recipe is saved in the run folder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from blm.app.recipe import (
    CorpusSettings,
    DemonstrationSettings,
    EvaluationSettings,
    MixtureSettings,
    Recipe,
    Stage1Settings,
    Stage2Settings,
)
from blm.bridge import BridgeConfig
from blm.policy.network import PolicyConfig
from blm.tasks import SUITE24
from blm.training.loop.loop import LoopConfig
from blm.training.pretraining.nano import NanoPretrainingConfig
from blm.training.sft.lora import Lora
from blm.training.sft.tokenize import TokenizationConfig
from blm.training.sft.train import Stage1Config


def nano_stage1(*, eye: int, drill: int, steps: int, batch_size: int = 8) -> Stage1Settings:
    """Return Stage I of a nano backbone from random weights.

    The three numbers are training steps: of the vision tower alone, of the grounding drill (one
    image at a time), and of Stage I proper.
    """
    defaults = NanoPretrainingConfig()
    schooling = NanoPretrainingConfig(
        eye=replace(defaults.eye, steps=eye),
        drill=replace(defaults.drill, steps=drill),
    )
    training = frozen_vision_tower(steps=steps, batch_size=batch_size, lr=2e-3)
    return Stage1Settings(schooling=schooling, training=replace(training, supervise_attention=1.0))


def frozen_vision_tower(*, steps: int, batch_size: int, lr: float) -> Stage1Config:
    """Return a config of Stage I that trains all but the vision tower, matrices with Muon."""
    loop = LoopConfig(steps=steps, batch_size=batch_size, lr=lr, muon=10 * lr, title="Stage I")
    return Stage1Config(loop=loop, vision_scale=0.0)


def nano_stage2(*, steps: int, batch_size: int = 64) -> Stage2Settings:
    """Return Stage II of the nano policy."""
    loop = LoopConfig(steps=steps, batch_size=batch_size, lr=2e-3, muon=0.02, title="Stage II")
    return Stage2Settings(loop=loop)


def demo() -> Recipe:
    """The recipe of `make demo`: all robots, two tasks, minutes on two CPU cores.

    Its backbone is initialised from the release `blm-nano` and briefly fine-tuned; its policy
    starts from random weights.
    """
    return Recipe(
        name="demo",
        tasks=("push_cube", "pick_cube"),
        cameras=("base", "side", "wrist"),
        demonstrations=DemonstrationSettings(episodes=16, held_out_episodes=2),
        corpus=CorpusSettings(scenes=800, held_out_scenes=120, turns=6),
        stage1=Stage1Settings(
            backbone="blm-nano", training=frozen_vision_tower(steps=60, batch_size=8, lr=2e-4)
        ),
        stage2=nano_stage2(steps=450),
        evaluation=EvaluationSettings(episodes=4, max_questions=300),
    )


def ci() -> Recipe:
    """The smallest run that exercises every part: a test of the code, not of learning."""
    return replace(
        demo(),
        name="ci",
        tasks=SUITE24,
        cameras=("base", "wrist"),
        demonstrations=DemonstrationSettings(episodes=1, held_out_episodes=1),
        corpus=CorpusSettings(scenes=40, held_out_scenes=8, turns=4),
        stage1=nano_stage1(eye=10, drill=10, steps=10, batch_size=4),
        stage2=nano_stage2(steps=10, batch_size=8),
        evaluation=EvaluationSettings(episodes=1, max_steps=60, max_questions=60),
    )


def nano() -> Recipe:
    """How `blm-nano` was trained (see its model card): the small model, hours on two CPU cores."""
    return replace(
        demo(),
        name="nano",
        tasks=SUITE24,
        cameras=("base", "side", "wrist"),
        demonstrations=DemonstrationSettings(episodes=80, held_out_episodes=4),
        corpus=CorpusSettings(scenes=24_000, held_out_scenes=600, turns=10, frames_per_episode=6),
        stage1=nano_stage1(eye=2600, drill=1500, steps=6000),
        stage2=nano_stage2(steps=20_000),
        evaluation=EvaluationSettings(episodes=50, max_questions=3000),
    )


PUBLIC = ("sharerobot:1", "robovqa:1", "agibot:1", "holoassist:1", "bridgev2:1", "general:0.3")
"""Public corpora of the pretrained recipes: those to which the paper's gains point, and general
questions about pictures, of which RoboBrain repeats about a third (0.34 to 0.68)."""


def smol() -> Recipe:
    """The smol backbone, whose weights are Python packages, with LoRA in Stage I. Not run yet.

    LoRA at this learning rate moves the model far; one example in three of replay kept its KL
    divergence at 0.025 instead of 0.72 nats (docs/stage1.md).
    """
    loop = LoopConfig(steps=20_000, batch_size=16, lr=1e-3, title="Stage I")
    training = Stage1Config(loop=loop, lora=Lora(rank=16), cache_features=True)
    mixture = MixtureSettings(public=("general:0.3",), replay_share=1 / 3, replay_rows=2000)
    base = nano()
    return replace(
        base,
        name="smol",
        image_size=128,
        corpus=replace(base.corpus, answers="sentence"),
        stage1=Stage1Settings(backbone="smol", training=training, mixture=mixture, epochs=0.5),
        stage2=replace(base.stage2, layer=20),
    )


def _qwen(name: str, layer: int, policy: PolicyConfig) -> Recipe:
    """Fine-tune language model and merger, but not the vision tower, as Qwen's scripts do.

    Half an epoch as in Qwen's scripts, at the learning rate of Cosmos-Reason1. One example in five
    is replay: the upper end of 10 to 20 %, because it is short text (a few percent of the tokens),
    and because InternVL's authors still saw the domain win at 1 to 1. Pictures are limited to 448 x
    448 px (256 tokens), so that 8 frames fit into 4,096 tokens. Features are not cached: in half
    an epoch a picture is seen about once, and those of 400,000 frames would fill 2 TB.
    """
    loop = LoopConfig(
        steps=100_000, batch_size=128, lr=1e-5, weight_decay=0.0, eval_every=500, title="Stage I"
    )
    training = Stage1Config(
        loop=loop,
        vision_scale=0.0,
        limits=TokenizationConfig(max_length=4096, max_pixels=448 * 448),
        pack_length=4096,
        checkpoint_blocks=True,
    )
    mixture = MixtureSettings(public=PUBLIC, replay_share=0.2, replay_rows=10_000, replay_tokens=256)
    loop2 = LoopConfig(steps=80_000, batch_size=256, lr=1e-4, weight_decay=1e-5, title="Stage II")
    base = nano()
    return replace(
        base,
        name=name,
        image_size=224,
        demonstrations=DemonstrationSettings(episodes=500, held_out_episodes=10),
        corpus=replace(base.corpus, answers="sentence"),
        stage1=Stage1Settings(backbone=name, training=training, mixture=mixture, epochs=0.5),
        stage2=Stage2Settings(loop=loop2, policy=policy, layer=layer),
    )


def qwen2_5_vl_3b() -> Recipe:
    """A recipe for one GPU: the policy has half of the paper's depth, and the dropout of GR00T N1.5.
    Not run yet."""
    bridge = BridgeConfig(width=1024, latents=32, blocks=2, heads=16)
    policy = PolicyConfig(
        bridge=bridge, width=1024, blocks=8, heads=16, max_dim=32, future_layer=6, dropout=0.2
    )
    return _qwen("qwen2_5_vl_3b", 24, policy)


def qwen2_5_vl_7b() -> Recipe:
    """The paper's backbone, and the policy head of GR00T N1.5 (16 blocks of 1536, dropout 0.2).
    Not run yet."""
    bridge = BridgeConfig(width=1024, latents=32, blocks=4, heads=16)
    policy = PolicyConfig(
        bridge=bridge, width=1536, blocks=16, heads=32, max_dim=32, future_layer=12, dropout=0.2
    )
    return _qwen("qwen2_5_vl_7b", 19, policy)


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe for recipe in (demo, ci, nano, smol, qwen2_5_vl_3b, qwen2_5_vl_7b)
}
