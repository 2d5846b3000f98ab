"""`blm export onnx` and `blm export openvino`: a checkpoint -> graphs that run without torch."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blm.app.edge.graphs import Actor, eye_and_reader
from blm.app.edge.prompts import example_prompt, picture_settings, write_tokenizer
from blm.datasets.transforms import transforms_to_json
from blm.edge.folder import GRAPHS, SUFFIX, ExportManifest, Precision, Runtime, write_manifest
from blm.edge.policy import ExportedPolicy
from blm.io import new_folder
from blm.policy.policy import CheckpointPolicy
from blm.types import BlmError, Observation, require_numbers

TOLERANCE = 2e-3
"""Maximum difference of the actions of graphs in float32 from those of torch [rad, or opening]."""
EXAMPLE = 3
"""Observations with which graphs of any batch are traced: torch would take 1 for a constant."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The form of the graphs."""

    runtime: Runtime = "onnx"
    precision: Precision = "float32"
    batch: int | None = None
    """Fixed number of observations in each run; None: any."""
    length: int | None = None
    """Fixed number of tokens of a prompt; None: any."""
    sampler_steps: int | None = None
    """Number of denoising steps; None: that of the checkpoint. Fewer are faster, and choose other
    actions."""

    def __post_init__(self) -> None:
        require_numbers(self, sampler_steps=(1, 1000))
        for name, value in (("batch", self.batch), ("length", self.length)):
            if value is not None and not 1 <= value <= 4096:
                raise BlmError(f"{name} is {value}; it must be 1 to 4096, or not given: then it is dynamic")
        if self.precision == "bfloat16" and self.runtime != "openvino":
            raise BlmError("onnxruntime has no bfloat16 on CPUs; export for openvino, or in float32")


@dataclass(frozen=True)
class ExportReport:
    """What an export was compared with."""

    difference: float
    """Largest difference of an action from that of torch [rad, or opening]."""
    observations: int
    size: int
    """Size of the folder [bytes]."""


def export_policy(source: str, out: Path, config: ExportConfig) -> ExportReport:
    """Write the graphs of a checkpoint or release, and all that is needed to run them without torch.

    The folder is verified: its actions must be those of torch. Raises BlmError, and writes nothing,
    for a policy that cannot be exported, or if a package is missing.
    """
    _require_packages(config.runtime)
    policy = CheckpointPolicy.load(source, dtype="float32", actions_only=True)
    if policy.tap.pool > 1:
        raise BlmError(f"this policy pools picture tokens (pool {policy.tap.pool}); it cannot be exported")
    network = policy.network
    if network.config.head != "dit":
        raise BlmError(
            f"only policies with a diffusion transformer are exported; this one has a {network.config.head}"
        )
    if config.sampler_steps is not None:
        network.config = replace(network.config, sampler_steps=config.sampler_steps)
    with new_folder(out) as work:
        prompt = write_tokenizer(policy, work)
        operator_sets = _write_graphs(policy, work, config)
        (work / "stats.json").write_text(json.dumps(transforms_to_json(policy.transforms), indent=1))
        manifest = ExportManifest(
            runtime=config.runtime,
            precision=config.precision,
            contract=policy.contract,
            prompt=prompt,
            pictures=picture_settings(policy),
            max_dim=policy.network.config.max_dim,
            batch=config.batch,
            length=config.length,
            operator_sets=operator_sets,
            provenance={
                "checkpoint": Path(source).name,
                "revision": policy.contract.revision,
                "sampler_steps": network.config.sampler_steps,
                "versions": {name: version(name) for name in ("blm", "torch", "transformers", "onnx")},
            },
        )
        write_manifest(work, manifest)
        report = _verify(policy, work, config)
        (work / "README.md").write_text(_card(manifest, report))
    return report


def example_observations(policy: CheckpointPolicy | ExportedPolicy, count: int) -> list[Observation]:
    """Return observations of all robots, with smooth random pictures and instructions of unlike
    lengths."""
    contract = policy.contract
    rng, robots = np.random.default_rng(0), list(contract.action_spaces)
    side = contract.image_size
    texts = ("Pick up the red cube.", "Push it.", "Put the green ball into the white bin on the left.")
    found = []
    for place in range(count):
        space = contract.action_spaces[robots[place % len(robots)]]
        coarse = rng.integers(0, 256, (len(contract.cameras), 8, 8, 3))
        scale = -(-side // 8)
        pictures = coarse.repeat(scale, 1).repeat(scale, 2)[:, :side, :side].astype(np.uint8)
        found.append(
            Observation(
                images=dict(zip(contract.cameras, pictures, strict=True)),
                state=space.middle_state(),
                instruction=texts[place % len(texts)],
                robot=robots[place % len(robots)],
                seed=place,
            )
        )
    return found


def largest_difference(
    policy: CheckpointPolicy, exported: ExportedPolicy, observations: list[Observation]
) -> float:
    """Return the largest difference of an action between two policies, one observation at a time and
    all in one batch."""
    alone = [(policy.act(o), exported.act(o)) for o in observations]
    batch = zip(policy.act_batch(observations), exported.act_batch(observations), strict=True)
    return max(float(np.abs(a.actions - b.actions).max()) for a, b in (*alone, *batch))


def _write_graphs(policy: CheckpointPolicy, folder: Path, config: ExportConfig) -> dict[str, int]:
    """Write all graphs; return the operator sets that they use."""
    eye, reader = eye_and_reader(policy.backbone, policy.tap.layer)
    count, cameras = config.batch or EXAMPLE, len(policy.contract.cameras) * policy.contract.frames
    settings, network = picture_settings(policy), policy.network.config
    pictures = torch.randint(0, 256, (count * cameras, settings.side, settings.side, 3), dtype=torch.uint8)
    ids, mask = _example_tokens(policy, count, config.length)
    rest = {
        "state": torch.zeros(count, network.max_dim),
        "robot": torch.arange(count) % len(policy.contract.action_spaces),
        "noise": torch.randn(count, network.horizon, network.max_dim),
        "dims": torch.ones(count, network.max_dim, dtype=torch.bool),
    }
    with torch.no_grad():
        features = eye(pictures)
        hidden = reader(ids, mask, features)
    tokens = {"ids": ids, "mask": mask, "features": features}
    graphs: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {
        "eye": (eye, {"pictures": pictures}),
        "reader": (reader, tokens),
        "actor": (Actor(policy.network).eval(), {"hidden": hidden, "mask": mask, **rest}),
    }
    sets = dict[str, int]()
    for name, (module, inputs) in graphs.items():
        sets |= _write_graph(module, inputs, folder / f"{name}.onnx", config)
    if config.runtime == "openvino":
        _to_openvino(folder)
    return sets


def _example_tokens(policy: CheckpointPolicy, count: int, length: int | None) -> tuple[Tensor, Tensor]:
    """Return tokens and mask [count, L] of example prompts."""
    robot = next(iter(policy.contract.action_spaces))
    prompt = example_prompt(policy, robot, "Pick up the red cube.")
    inputs = policy.backbone.read([prompt] * count, side="right")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    if length is not None:
        if length < ids.shape[1]:
            raise BlmError(f"length is {length}; a short prompt of this policy has {ids.shape[1]} tokens")
        pad = int(policy.backbone.processor.tokenizer.pad_token_id)
        ids = nn.functional.pad(ids, (0, length - ids.shape[1]), value=pad)
        mask = nn.functional.pad(mask, (0, length - mask.shape[1]))
    return ids, mask


def _write_graph(
    module: nn.Module, inputs: Mapping[str, Tensor], file: Path, config: ExportConfig
) -> dict[str, int]:
    """Write one graph; return its operator sets."""
    dims = {name: torch.export.Dim(name, max=1 << 20) for name in ("batch", "pictures", "tokens")}
    free = {"batch": config.batch is None, "pictures": config.batch is None, "tokens": config.length is None}
    axes: dict[str, tuple[str, ...]] = {
        name: ("pictures",) if name in ("pictures", "features") else ("batch",) for name in inputs
    }
    for name in {"ids", "mask", "hidden"} & axes.keys():
        axes[name] = ("batch", "tokens")
    shapes = [{at: dims[axis] for at, axis in enumerate(axes[name]) if free[axis]} for name in inputs]
    with _quiet():
        program: Any = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=["output"],
            dynamic_shapes=tuple(shapes),
            dynamo=True,
            verbose=False,
        )
        program.save(str(file), external_data=False)
    return {one.domain: one.version for one in program.model_proto.opset_import}


def _to_openvino(folder: Path) -> None:
    """Replace the ONNX graphs in a folder by OpenVINO's form."""
    openvino: Any = import_module("openvino")
    for name in GRAPHS:
        model = openvino.convert_model(str(folder / f"{name}.onnx"))
        openvino.save_model(model, str(folder / f"{name}{SUFFIX['openvino']}"), compress_to_fp16=False)
        (folder / f"{name}.onnx").unlink()


def _verify(policy: CheckpointPolicy, folder: Path, config: ExportConfig) -> ExportReport:
    observations = example_observations(policy, 4)
    gap = largest_difference(policy, ExportedPolicy.load(folder), observations)
    if config.precision == "float32" and not gap <= TOLERANCE:
        raise BlmError(
            f"actions of the exported graphs differ from those of torch by {gap:.2g}, the limit is "
            f"{TOLERANCE:g}; nothing was exported"
        )
    size = sum(path.stat().st_size for path in folder.iterdir())
    return ExportReport(gap, len(observations), size)


def _require_packages(runtime: Runtime) -> None:
    needed = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
    extras = "edge" if runtime == "onnx" else "edge,openvino"
    for name in needed[runtime]:
        try:
            import_module(name)
        except ImportError as error:
            raise BlmError(
                f"the export needs the package {name}, which is not installed: pip install 'blm[{extras}]'"
            ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes that torch's exporter prints about itself and its dependencies."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _card(manifest: ExportManifest, report: ExportReport) -> str:
    sets = manifest.operator_sets.items()
    forms = ", ".join(f"{domain or 'ONNX'} {number}" for domain, number in sets)
    return f"""---
pipeline_tag: robotics
---

# An exported policy of Boundless

Graphs of `{manifest.provenance["checkpoint"]}` (revision {manifest.provenance["revision"]}) for
{manifest.runtime} in {manifest.precision}; operator sets: {forms};
{manifest.provenance["sampler_steps"]} denoising steps. They need no torch. Their actions differ from those
of the checkpoint with as many steps by at most {report.difference:.1g} rad on {report.observations}
example observations.

```bash
blm serve FOLDER
```

`export.json` describes the graphs and holds the hash of every file: altered folders are refused.
"""
