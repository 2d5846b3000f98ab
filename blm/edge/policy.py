"""The exported policy: observation -> pictures' features -> H_k -> action chunk, without torch.

Shapes: B observations, N pictures, T features of a picture, L tokens, H action steps, D padded
dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blm.chunks import frames_of
from blm.datasets.decoding import decode_chunks
from blm.datasets.transforms import RobotTransforms
from blm.edge.folder import GRAPHS, ExportManifest, Runtime, read_manifest, read_statistics
from blm.edge.graphs import Graph, default_threads, load_graph
from blm.edge.noise import seeded_noise
from blm.edge.prompts import PromptEncoder
from blm.pictures import resized
from blm.types import ActionChunk, BlmError, ContractError, ImageArray, Observation


class ExportedPolicy:
    """A `Policy` that runs the graphs of an exported folder.

    Its chunks are those of the checkpoint up to rounding: the noise of a seed is the same.
    """

    def __init__(
        self,
        manifest: ExportManifest,
        graphs: dict[str, Graph],
        prompts: PromptEncoder,
        transforms: dict[str, RobotTransforms],
    ) -> None:
        self.manifest, self._graphs, self._prompts = manifest, graphs, prompts
        self.transforms = transforms
        suffix = f"+{manifest.runtime}" + (
            "" if manifest.precision == "float32" else f"-{manifest.precision}"
        )
        self.contract = replace(manifest.contract, revision=manifest.contract.revision + suffix)
        self.provenance = manifest.provenance

    @classmethod
    def load(
        cls, folder: Path | str, *, runtime: Runtime | None = None, threads: int | None = None
    ) -> ExportedPolicy:
        """Load the folder that `blm export` wrote; by default it runs on OMP_NUM_THREADS threads, or
        one per core.

        Raises BlmError, naming file and remedy, unless the folder is complete and unaltered, was
        exported for this `runtime`, if one is given, and its runtime is installed and can run its graphs.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        if runtime not in (None, manifest.runtime):
            raise BlmError(
                f"'{folder}' was exported for {manifest.runtime}, not for {runtime}: load it with "
                f"{manifest.runtime}"
            )
        count = default_threads() if threads is None else threads
        graphs = {
            name: load_graph(folder, name, manifest.runtime, precision=manifest.precision, threads=count)
            for name in GRAPHS
        }
        prompts = PromptEncoder(manifest.prompt, folder / "tokenizer.json", manifest.length)
        return cls(manifest, graphs, prompts, read_statistics(folder))

    def reset(self) -> None:
        """Do nothing: a chunk depends on its observation alone."""

    def act(self, observation: Observation) -> ActionChunk:
        """Return the chunk for one observation; see `act_batch`."""
        return self.act_batch([observation])[0]

    def act_batch(self, observations: Sequence[Observation]) -> list[ActionChunk]:
        """Return one chunk of absolute targets per observation, each with the noise of its seed.

        Raises BlmError for an observation that does not match the contract, and for one with a
        chunk in progress: guidance towards it needs gradients, which exported graphs do not have.
        """
        checked = [self.contract.check(observation) for observation in observations]
        if any(o.chunk is not None for o in checked):
            raise ContractError(
                "an exported policy cannot continue a chunk in progress (real-time chunking); serve the "
                "checkpoint, or send observations without it"
            )
        size = self.manifest.batch or len(checked)
        chunks = list[ActionChunk]()
        for start in range(0, len(checked), size):
            part = checked[start : start + size]
            full = part + part[-1:] * (size - len(part))
            actions = self._actions(full)[: len(part)]
            chunks += decode_chunks(self.contract, self.transforms, part, actions.astype(np.float64))
        return chunks

    def _actions(self, observations: Sequence[Observation]) -> NDArray[np.float32]:
        """Return normalised actions [B, H, D]."""
        width, robots = self.manifest.max_dim, list(self.contract.action_spaces)
        dims = [self.contract.action_spaces[o.robot].dim for o in observations]
        states = np.zeros((len(observations), width), np.float32)
        for row, o in zip(states, observations, strict=True):
            state = self.transforms[o.robot].state.forward(o.state)
            row[: len(state)] = state
        tokens = self._prompts(observations)
        pictures = [picture for o in observations for picture in self._pictures(o)]
        features = self._graphs["eye"](pictures=np.stack(pictures))
        hidden = self._graphs["reader"](ids=tokens.ids, mask=tokens.mask, features=features)
        return self._graphs["actor"](
            hidden=hidden,
            mask=tokens.mask,
            state=states,
            robot=np.array([robots.index(o.robot) for o in observations]),
            noise=seeded_noise([o.seed for o in observations], (self.contract.horizon, width)),
            dims=np.arange(width) < np.array(dims)[:, None],
        )

    def _pictures(self, observation: Observation) -> list[ImageArray]:
        """Return the pictures of an observation and its history, in the order of the prompt."""
        images = [one.images for one in (*observation.history, observation)]
        views = frames_of(images, self.contract.frames, self.contract.execute)
        settings = self.manifest.pictures
        return [resized(picture, settings.side, settings.resample) for picture in views.values()]
