"""Commands for the simulated suite: evaluate policies, and compare results.

An exported policy is evaluated without torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from blm.cli.command import CliCommand
from blm.cli.physical_tables import console, print_result
from blm.types import BlmError, Policy, lookup, require_numbers

if TYPE_CHECKING:
    from blm.evaluation import PhysicalProtocol


@dataclass(frozen=True, kw_only=True)
class EvaluatePhysical(CliCommand):
    """Evaluate a policy in closed loop; write OUT/result.json, videos and OUT/report.html.

    Example: blm eval physical --model runs/demo/stage2/checkpoint --out results/demo
    """

    model: str
    """Policy: a checkpoint, the folder of an exported policy, expert, zero, random, replay:DATASET,
    lerobot:FOLDER, or ws://HOST:PORT. FOLDER is of a policy that LeRobot saved (docs/lerobot.md); the
    last is the address of an OpenPI server."""
    out: Path
    """Folder to write. Run the same command again to resume."""
    protocol: str = "suite24"
    """Name of the protocol: suite24, suite24-v2, suite24-plus, suite24-dynamics or suite24-words.
    A run with other robots, tasks, episodes, axes, levels or latency gets an unnamed protocol."""
    robots: tuple[str, ...] = ()
    """Robots to evaluate; by default those of the protocol."""
    tasks: tuple[str, ...] = ()
    """Tasks to evaluate; by default those of the protocol."""
    episodes: int | None = None
    """Number of episodes for each robot and task, and for each condition of a perturbed protocol.
    By default that of the protocol."""
    axes: tuple[str, ...] = ()
    """Axes, dynamics or controls of a perturbed protocol to evaluate; by default all.
    The same scenes without them are always evaluated too."""
    levels: tuple[int, ...] = ()
    """Levels of the axes to evaluate; by default all."""
    latency: Literal["none", "measured"] | float = "none"
    """Time between an observation and its actions: none, measured, or a number [s].
    With `none`, the simulation waits for the policy.
    With `measured`, the simulation continues while the policy computes.
    A number is the latency of every call."""
    workers: int = 2
    """Number of worker processes; 0 runs all work in the main process."""
    simulator: Literal["mujoco", "maniskill"] = "mujoco"
    """Simulator; `maniskill` runs the Panda's tasks in ManiSkill.
    It needs a separate Python environment (docs/maniskill.md)."""
    engine: Literal["local", "ray"] = "local"
    """Where the episodes run: on this machine, or on a Ray cluster."""
    device: str = "cpu"
    """Torch device of a checkpoint: cpu, cuda, cuda:N or mps. On a GPU, one model answers all
    workers in batches."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of a checkpoint's backbone; by default bfloat16 on CUDA, and the stored
    precision elsewhere."""
    attn_implementation: str | None = None
    """Attention implementation in transformers: eager, sdpa, flash_attention_2, ..; by default the
    model's own."""
    compile: Literal["none", "default", "cuda-graphs"] = "none"
    """Compile the tapped blocks, the bridge and the sampler with torch.compile.
    `default` needs a C++ compiler on the CPU and triton on a GPU; `cuda-graphs` needs a GPU."""
    max_batch: int = 64
    """Maximum number of observations in such a batch. With 1, results are bit-reproducible."""
    cameras: tuple[str, ...] = ("base", "wrist")
    """Cameras of a policy that has no contract."""
    image_size: int = 112
    """Width and height of the images for a policy that has no contract [px]."""
    horizon: int = 16
    """Number of actions in a chunk of a policy that has no contract."""
    execute: int = 8
    """Number of actions of a chunk to execute, for a policy that has no contract."""
    continued: bool = False
    """Use real-time chunking: each chunk continues the previous one.
    Motion is smoother, and inference is slower."""
    videos: int = 1
    """Number of episodes for each robot and task to record as videos."""
    api_key: str | None = None
    """API key of an OpenPI server."""
    mapping: Path | None = None
    """Mapping of the dataset that a LeRobot policy was trained on, if it is not of this program.
    `blm doctor DATASET --suggest` proposes one."""
    lerobot_python: Path = Path(".venv-lerobot/bin/python")
    """Python of LeRobot's environment, which scripts/lerobot.sh creates."""
    server_name: str = ""
    """Name and version of the model behind a server that sends no contract.
    The address does not identify the model, so without a name
    an interrupted evaluation cannot resume and must start again in another folder."""

    def __post_init__(self) -> None:
        from blm.jobs import MAX_WORKERS
        from blm.seeds import EVALUATION_SEEDS
        from blm.tasks.suite_plus import LEVELS

        require_numbers(self, episodes=(1, len(EVALUATION_SEEDS)), videos=(0, 1_000_000))
        require_numbers(self, levels=(LEVELS[0], LEVELS[-1]))
        require_numbers(self, workers=(0, MAX_WORKERS), max_batch=(1, 100_000), image_size=(16, 4096))
        if self.latency not in ("none", "measured"):
            require_numbers(self, latency=(0, 3600))
        require_numbers(self, horizon=(1, 100_000), execute=(1, self.horizon))

    def run(self, command_line: Sequence[str]) -> None:
        from blm.evaluation import evaluate_physical

        with ExitStack() as stack:
            make, protocol = self._policy_and_protocol(stack)
            result = evaluate_physical(
                make,
                protocol,
                self.out,
                workers=self.workers,
                videos_per_cell=self.videos,
                engine=self.engine,
                max_batch=self.max_batch,
            )
        print_result(result)
        file = self.out / "result.json"
        console.print(f"result: {file}", soft_wrap=True)
        if protocol.purpose == "evaluation":
            self._report(file, protocol.name or "own protocol")

    def _lerobot(self, stack: ExitStack) -> Callable[[], Policy]:
        """Start a LeRobot policy, which ends with `stack`. Raises BlmError for flags that it lacks."""
        from blm.app.lerobot_policies import lerobot_process

        flags = {"--continued": self.continued, "--compile": self.compile != "none"}
        flags |= {
            "--dtype": self.dtype is not None,
            "--attn-implementation": self.attn_implementation is not None,
        }
        flags["--engine ray"] = self.engine == "ray"
        if wrong := [flag for flag, given in flags.items() if given]:
            raise BlmError(f"a LeRobot policy has no {', '.join(wrong)}: LeRobot's own process runs it here")
        process = lerobot_process(
            self.model,
            robots=self.robots,
            mapping=self.mapping,
            python=self.lerobot_python,
            device=self.device,
        )
        console.print("starting LeRobot's process", soft_wrap=True)
        return stack.enter_context(process).make_policy

    def _policy_and_protocol(self, stack: ExitStack) -> tuple[Callable[[], Policy], PhysicalProtocol]:
        """Return the policy and the protocol; a process that the policy needs ends with `stack`."""
        from blm.evaluation import PROTOCOLS, PhysicalProtocol
        from blm.evaluation.conditions import select
        from blm.evaluation.physical.ready_policy import ReadyPolicy
        from blm.evaluation.protocol import require_no_variation

        if self.model.startswith("replay:"):
            from blm.app.policies import load_replay

            return load_replay(Path(self.model.removeprefix("replay:")))
        is_lerobot = self.model.startswith("lerobot:")
        if self.mapping is not None and not is_lerobot:
            raise BlmError("--mapping is for LeRobot policies (--model lerobot:FOLDER)")
        make = self._lerobot(stack) if is_lerobot else self._factory()
        wanted = {name: getattr(self, name) for name in ("robots", "tasks", "episodes")}
        changes: Any = {name: value for name, value in wanted.items() if value}
        standard = lookup("protocol", self.protocol, PROTOCOLS)
        conditions = tuple(standard.get("conditions", ()))
        if self.axes or self.levels:
            changes["conditions"] = conditions = select(conditions, self.axes, self.levels)
        if self.simulator == "maniskill":
            require_no_variation(conditions, standard.get("visible_goals", False))
            changes |= {"robots": ("panda",), "simulator": f"maniskill {version('mani_skill')}"}
        ready = ReadyPolicy(make)
        if is_lerobot:
            changes["robots"] = tuple(ready.contract.action_spaces)
        return ready, PhysicalProtocol.named(self.protocol, ready.contract, latency=self.latency, **changes)

    def _factory(self) -> Callable[[], Policy]:
        """Return a picklable function that creates the policy."""
        from blm.app.exported import load_exported, require_no_torch_flags
        from blm.edge.folder import is_export

        if is_export(self.model):
            require_no_torch_flags(
                self.model,
                device=self.device != "cpu",
                dtype=self.dtype is not None,
                attn_implementation=self.attn_implementation is not None,
                compile=self.compile != "none",
                continued=self.continued,
            )
            return partial(load_exported, Path(self.model))
        from blm.app.policies import policy_factory, with_real_time_chunking

        make = policy_factory(
            self.model,
            cameras=self.cameras,
            image_size=self.image_size,
            horizon=self.horizon,
            execute=self.execute,
            api_key=self.api_key,
            load={
                "device": self.device,
                "dtype": self.dtype,
                "attn_implementation": self.attn_implementation,
                "compile": self.compile,
            },
            server_name=self.server_name,
        )
        return partial(with_real_time_chunking, make) if self.continued else make

    def _report(self, file: Path, protocol: str) -> None:
        from blm.evaluation.report import ReportData, build_report

        report = self.out / "report.html"
        build_report(ReportData(title=f"{self.model}: {protocol}", physical={self.model: file}), report)
        console.print(f"report: {report}", soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class Compare(CliCommand):
    """Print the paired difference between two results of one protocol.

    Both results must come from the same scenes or questions; other protocols are refused.

    Example: blm compare results/mine results/other
    """

    a: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="A")]
    """Folder of an evaluation, or its result.json."""
    b: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="B")]
    """Folder of the evaluation to compare with, or its result.json."""
    across_training: bool = False
    """Compare results of a perturbed protocol even if one policy was trained with randomized scenes
    (augmented) and the other was not (zero-shot); both are labelled."""

    def run(self, command_line: Sequence[str]) -> None:
        from blm.evaluation import format_comparison, load_result

        names = (str(self.a), str(self.b))
        results = load_result(self.a), load_result(self.b)
        print(format_comparison(*results, names=names, across_training=self.across_training))
