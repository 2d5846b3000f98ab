"""`Recipe`: the settings of one run of the whole loop, and the config of each of its parts.

A recipe holds each setting once. Where a part's own config type fits (`Stage1Config`, `LoopConfig`,
`PolicyConfig`), the recipe contains it. `CollectConfig`, `SceneCorpusConfig`,
`PolicyTrainingConfig`, `HiddenStateConfig` and `PhysicalProtocol` also hold robots, folders and
seeds, which a recipe states once for all parts or which follow from the run folder. For these, the
recipe contains a small class of settings, and the functions at the end of this file build the
config: the only place where settings become configs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from blm.backbone.pooling import MAX_POOL
from blm.backbone.precision import BackboneOptions, WeightDtype, require_attention
from blm.backbone.prompt import PromptOrder, require_order
from blm.corpora import SceneCorpusConfig
from blm.corpora.public import PlacedCorpus, place
from blm.corpora.scenes.sentences import Answers
from blm.datasets.lerobot import open_dataset
from blm.evaluation import PhysicalProtocol
from blm.planner import CollectConfig
from blm.policy.network import PolicyConfig
from blm.robots import ROBOTS
from blm.seeds import EVALUATION_SEEDS, STAGE1_HELD_OUT_SEEDS, TRAINING_SEEDS, VALIDATION_SEEDS
from blm.tasks import SUITE24, TASKS
from blm.tasks.randomization import NO_RANDOMIZATION, DomainRandomization
from blm.tasks.scene import CAMERAS
from blm.training.loop.loop import LoopConfig
from blm.training.policy.backbone_tuning import BackboneTuning, require_tuning
from blm.training.policy.config import PolicyTrainingConfig
from blm.training.policy.cotraining import LanguageCotraining, require_cotraining
from blm.training.policy.hidden_states import (
    MIN_DIMS,
    CachePrecision,
    HiddenStateConfig,
    require_precision,
)
from blm.training.pretraining.nano import NanoPretrainingConfig
from blm.training.sft.train import Stage1Config
from blm.types import BlmError, PolicyContract, lookup, require_numbers

FIRST_EPISODE_SEED = 500_000
"""Offset of demonstrations in a seed range; scene questions start at 0 and share no scene."""


@dataclass(frozen=True, kw_only=True)
class DemonstrationSettings:
    """Demonstrations by the planning expert."""

    episodes: int
    """Number of successful demonstrations to keep for each robot and task."""
    held_out_episodes: int
    """Number of demonstrations for each robot and task on held-out scenes.
    Held-out questions show their frames."""
    noise: tuple[float, ...] = (0.0, 0.01, 0.02)
    """Standard deviations of the noise added to executed joint targets [rad].
    Each episode draws one of them."""
    disturbed: float = 0.15
    """Fraction of episodes in which the gripper command is briefly inverted, 0..1.
    The demonstrations then contain misses, drops and recoveries."""
    random_starts: float = 0.3
    """Fraction of episodes that start away from the home pose, 0..1."""
    hold: int = 10
    """Number of control steps at the end of each episode in which the arm stays at the goal."""
    distractors: int = 0
    """Number of coloured distractor objects in each scene that nothing collides with."""
    randomization: DomainRandomization = NO_RANDOMIZATION
    """Randomisation of looks, cameras, layout, sensors and start."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out_episodes=(1, 1_000_000))


@dataclass(frozen=True, kw_only=True)
class CorpusSettings:
    """Scene questions for Stage I."""

    scenes: int
    """Number of random scenes to ask about, distributed evenly over all pairs of robot and task."""
    held_out_scenes: int
    """Number of random scenes in the held-out corpora."""
    turns: int = 8
    """Number of questions about each scene."""
    max_distractors: int = 3
    """Maximum number of distractor objects in a scene."""
    randomization: DomainRandomization = NO_RANDOMIZATION
    """Randomisation of looks, cameras, layout and sensors."""
    frames_per_episode: int = 8
    """Number of frames of each demonstration to ask about."""
    answers: Answers = "reasoning"
    """Form of the answers, also of held-out questions; see `blm corpus build --help`.
    `sentence` is for backbones that already speak English."""
    free: float = 0.0
    """Fraction of free questions ("What do you see?") among those about scenes, 0..1.
    They need --corpus.answers sentence."""

    def __post_init__(self) -> None:
        require_numbers(self, held_out_scenes=(1, 1_000_000), free=(0, 1))


@dataclass(frozen=True, kw_only=True)
class MixtureSettings:
    """What Stage I trains on beside scene questions, and how much of each.

    The weight of a corpus is the number of times that an epoch sees each of its conversations: with
    0.5, an epoch sees half of them, and the next epoch the other half.
    """

    public: tuple[str, ...] = ()
    """Public corpora, each as NAME:WEIGHT (`blm corpus list` shows the names) or PATH:WEIGHT.
    A missing one is named and left out; a faulty one stops the run."""
    corpora_folder: str = "corpora"
    """Folder with one corpus folder for each name in --stage1.mixture.public."""
    scenes: float = 1.0
    """Weight of the scene questions; 0 leaves them out."""
    replay_share: float = 0.0
    """Fraction of the training examples that the base model wrote itself, in [0, 1).
    They are general dialogues, text and pictures, that limit forgetting."""
    replay_rows: int = 2000
    """Number of conversations that the base model writes before the training.
    They repeat if the share needs more."""
    replay_tokens: int = 64
    """Maximum length of the answers that the base model writes [tokens]; longer ones are dropped."""

    def __post_init__(self) -> None:
        require_numbers(self, scenes=(0, 1000), replay_rows=(1, 10_000_000), replay_tokens=(1, 4096))
        if not 0 <= self.replay_share < 1:
            raise BlmError(f"stage1.mixture.replay_share is {self.replay_share}; it must be in [0, 1)")
        names = [corpus.name for corpus in self.placed]
        if taken := sorted({n for n in names if names.count(n) > 1 or n in ("scenes", "replay")}):
            raise BlmError(f"stage1.mixture.public names {', '.join(taken)} twice; each source needs a name")

    @property
    def placed(self) -> tuple[PlacedCorpus, ...]:
        """The public corpora with their folders. Raises BlmError for an unknown name."""
        return tuple(place(text, Path(self.corpora_folder)) for text in self.public)


@dataclass(frozen=True, kw_only=True)
class Stage1Settings:
    """Stage I: fine-tuning of the backbone."""

    backbone: str = "nano"
    """Name of a backbone, a backbone's folder, or an id of the Hugging Face hub."""
    schooling: NanoPretrainingConfig = field(default_factory=NanoPretrainingConfig)
    """Pretraining of a new nano backbone; other backbones ignore it."""
    training: Stage1Config
    """Fine-tuning."""
    mixture: MixtureSettings = field(default_factory=MixtureSettings)
    """Public corpora, scene questions and replay."""
    epochs: float = 0.0
    """Length of the fine-tuning in epochs of the mixture, such as 0.5.
    The number of steps follows, and --stage1.training.loop.steps is its maximum.
    With 0, that is the number of steps."""

    def __post_init__(self) -> None:
        require_numbers(self, epochs=(0, 10_000))
        if not self.mixture.scenes and not self.mixture.public:
            raise BlmError("stage1.mixture has neither scenes nor public corpora; give one a weight")

    @property
    def mixed(self) -> bool:
        """Whether Stage I trains on more than all scene questions for a number of steps."""
        mixture = self.mixture
        return bool(self.epochs or mixture.public or mixture.replay_share or mixture.scenes != 1)


@dataclass(frozen=True, kw_only=True)
class Stage2Settings:
    """Stage II: training of the bridge and the policy on the frozen backbone."""

    loop: LoopConfig
    """Training loop."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Bridge, diffusion transformer and losses."""
    layer: int = 3
    """Block k of the language model, counted from 1, whose output H_k the bridge reads."""
    stride: int = 2
    """Cache the hidden states of every n-th frame."""
    precision: CachePrecision = "float16"
    """Form of the hidden-state cache, float16 or compact; see `HiddenStateConfig`."""
    dims: int = 1024
    """Channels that a compact hidden-state cache keeps of each token."""
    pool: int = 1
    """Average picture tokens over squares of n x n tokens, in training and when the policy acts."""
    frames: int = 1
    """Number of observations in a prompt: the present one and those of the decisions before."""
    views: int = 0
    """Augmented views of each frame to cache beside the frame."""
    execute: int = 8
    """Number of actions of a chunk to execute before the next observation."""
    drive: int = 0
    """Closed-loop validation episodes for each robot and task at every evaluation.
    Evaluations happen every --stage2.loop.eval-every steps.
    With 0, the validation loss alone selects the best checkpoint."""
    tune: BackboneTuning = field(default_factory=BackboneTuning)
    """Training of the backbone, which is frozen by default."""
    cotrain: LanguageCotraining = field(default_factory=LanguageCotraining)
    """Language co-training of a backbone that is tuned; by default on the run's scene questions."""

    def __post_init__(self) -> None:
        require_tuning(self.tune, self.loop, cache=None, only_new=False)
        if self.cotrain.weight:
            require_cotraining(with_corpora(self.cotrain, Path()), self.loop, tuned=self.tune.on)
        require_numbers(self, layer=(1, 10_000), stride=(1, 100_000), views=(0, 1000), frames=(1, 64))
        require_numbers(self, dims=(MIN_DIMS, 1_000_000), pool=(1, MAX_POOL))
        require_precision(self.precision)
        require_numbers(self, drive=(0, len(VALIDATION_SEEDS)))
        if not 1 <= self.execute <= self.policy.horizon:
            raise BlmError(f"stage2.execute {self.execute} must lie in 1..horizon = {self.policy.horizon}")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Evaluation in both spaces, on scenes that are not in any training data."""

    episodes: int
    """Number of closed-loop episodes for each robot and task."""
    max_steps: int = 200
    """Number of control steps after which an episode ends."""
    max_questions: int = 600
    """Maximum number of held-out questions, distributed evenly over the scenes."""

    def __post_init__(self) -> None:
        require_numbers(self, episodes=(1, len(EVALUATION_SEEDS)), max_steps=(1, 1_000_000))
        require_numbers(self, max_questions=(1, 10**9))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run of the whole loop: demonstrations, scene questions, Stage I, Stage II, evaluation."""

    name: str
    """Name of the recipe. The run folder is runs/NAME unless --run names another folder."""
    robots: tuple[str, ...] = tuple(ROBOTS)
    """Robots of all stages."""
    tasks: tuple[str, ...] = SUITE24
    """Tasks of all stages."""
    cameras: tuple[str, ...] = ("base", "wrist")
    """Cameras whose images the model sees."""
    image_size: int = 112
    """Width and height of the camera images [px]; must be even."""
    prompt: PromptOrder = "pictures_first"
    """Order of text and images in the control prompt, which Stage I teaches and Stage II reads.
    With text_first, acting reads the text only once in an episode."""
    workers: int = 2
    """Number of worker processes for collection, questions, hidden-state caches and evaluation.
    With 0, all work runs in the main process."""
    engine: Literal["local", "ray"] = "local"
    """Where collection and closed-loop evaluation run: on this machine, or on a Ray cluster."""
    device: str = "cpu"
    """Torch device of training, the hidden-state cache and evaluation: cpu, cuda, cuda:N or mps."""
    dtype: WeightDtype | None = None
    """Precision of frozen weights; by default bfloat16 on CUDA and float32 elsewhere. What is
    trained stays in float32."""
    attn_implementation: str | None = None
    """Attention implementation of the backbone in transformers: eager, sdpa, flash_attention_2, ..;
    by default the model's own."""
    demonstrations: DemonstrationSettings
    """Demonstrations by the planning expert."""
    corpus: CorpusSettings
    """Scene questions for Stage I."""
    stage1: Stage1Settings
    """Stage I: fine-tuning of the backbone."""
    stage2: Stage2Settings
    """Stage II: training of the bridge and the policy on the frozen backbone."""
    evaluation: EvaluationSettings
    """Evaluation in both spaces."""

    def __post_init__(self) -> None:
        for kind, names, registry in (("robot", self.robots, ROBOTS), ("task", self.tasks, TASKS)):
            if not names or len(set(names)) != len(names):
                raise BlmError(f"a recipe needs at least one {kind}, and each only once; got {names}")
            for name in names:
                lookup(kind, name, registry)
        if not self.cameras:
            raise BlmError(f"a recipe needs at least one camera; valid: {', '.join(CAMERAS)}")
        require_attention(self.attn_implementation)
        require_order(self.prompt)
        require_numbers(self, image_size=(16, 4096))
        if self.image_size % 2:
            raise BlmError(f"image_size is {self.image_size}; videos need an even side")
        collect_config(self, held_out=False)  # the configs check the limits of the remaining settings
        corpus_config(self, Path(), "train")


CorpusName = Literal["train", "held_out", "held_out_wording"]
RobotsAndTasks = tuple[tuple[str, ...], tuple[str, ...]]
"""Robots and tasks that one model is trained for."""


def collect_config(recipe: Recipe, *, held_out: bool) -> CollectConfig:
    """Return the config of the demonstrations: for training, or on Stage I's held-out scenes."""
    settings = recipe.demonstrations
    seeds = STAGE1_HELD_OUT_SEEDS if held_out else TRAINING_SEEDS
    values = _values_for(CollectConfig, recipe, settings)
    values["episodes"] = settings.held_out_episodes if held_out else settings.episodes
    values["first_seed"] = seeds.start + FIRST_EPISODE_SEED
    if held_out:
        values["randomization"] = NO_RANDOMIZATION
    return CollectConfig(**values)


def corpus_config(recipe: Recipe, run: Path, corpus: CorpusName) -> SceneCorpusConfig:
    """Return the config of a corpus of scene questions of a run folder.

    "held_out" and "held_out_wording" ask about the same scenes, the latter in wordings that
    training never uses.
    """
    settings = recipe.corpus
    training = corpus == "train"
    values = _values_for(SceneCorpusConfig, recipe, settings)
    values["scenes"] = settings.scenes if training else settings.held_out_scenes
    values["first_seed"] = (TRAINING_SEEDS if training else STAGE1_HELD_OUT_SEEDS).start
    values["episodes"] = run / ("episodes" if training else "episodes_held_out")
    values["teach"] = training
    if not training:
        values["randomization"] = NO_RANDOMIZATION
    values["wording"] = "held_out" if corpus == "held_out_wording" else "seen"
    return SceneCorpusConfig(**values)


def policy_training_config(
    recipe: Recipe, run: Path, backbone: Path, cache: Path, trained: RobotsAndTasks
) -> PolicyTrainingConfig:
    """Return the config of Stage II for a model of some of the run's robots and tasks.

    `cache` is the folder of the hidden-state caches. Frames of other tasks in the same datasets get
    weight 0.
    """
    robots, tasks = trained
    datasets = tuple(run / "episodes" / robot for robot in robots)
    recorded = {task for folder in datasets for task in open_dataset(folder).tasks}
    values = _values_for(PolicyTrainingConfig, recipe, recipe.stage2)
    values["datasets"] = datasets
    values["backbone"] = str(backbone)
    seen = _values_for(HiddenStateConfig, recipe, recipe.stage2)
    values["intents"] = HiddenStateConfig(**seen, frame_steps=recipe.stage2.execute)
    values["weights"] = dict.fromkeys(sorted(recorded - {*tasks}), 0.0)
    values["cache"] = cache
    if recipe.stage2.tune.on:
        features = recipe.stage2.tune.features or str(cache / "features")
        values |= {"cache": None, "tune": replace(recipe.stage2.tune, features=features)}
        values["cotrain"] = with_corpora(recipe.stage2.cotrain, run)
    return PolicyTrainingConfig(**values)


def with_corpora(cotrain: LanguageCotraining, run: Path) -> LanguageCotraining:
    """Return the config of co-training with the run's scene questions, unless it names corpora."""
    if not cotrain.weight or cotrain.corpora:
        return cotrain
    return replace(cotrain, corpora=(str(run / "corpora/train"),))


def physical_protocol(recipe: Recipe, contract: PolicyContract, trained: RobotsAndTasks) -> PhysicalProtocol:
    """Return the protocol of the closed-loop evaluation of a model of these robots and tasks."""
    return PhysicalProtocol.for_policy(
        contract,
        robots=trained[0],
        tasks=trained[1],
        episodes=recipe.evaluation.episodes,
        max_steps=recipe.evaluation.max_steps,
        phrasing="both",
    )


def load_options(recipe: Recipe) -> BackboneOptions:
    """Return the form in which the recipe's backbones and checkpoints are loaded."""
    return {
        "device": recipe.device,
        "dtype": recipe.dtype,
        "attn_implementation": recipe.attn_implementation,
    }


def _values_for(config: type, recipe: Recipe, settings: object) -> dict[str, Any]:
    """Return the fields that a config shares, by name, with the recipe or a part's settings."""
    names = {field.name for field in fields(config)}
    return {name: value for name, value in (vars(recipe) | vars(settings)).items() if name in names}
