"""Command that renders recorded episodes, and the variations of suite24-plus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from blm.cli.command import CliCommand
from blm.types import BlmError

console = Console()
PLUS = "suite24-plus"
"""Name that stands for the scenes of `blm.tasks.suite_plus` in place of a dataset's folder."""


@dataclass(frozen=True, kw_only=True)
class View(CliCommand):
    """Write an episode as a video, a contact sheet or a Rerun recording.

    With `--form suite`, write one image of a collection. For `suite24-plus` in place of a dataset,
    write one image of its axes and levels for each robot and task.

    Example: blm view runs/demo/episodes/panda --episode 3 --form sheet
    """

    dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
    """Folder of one robot's dataset, or `suite24-plus`.
    With `--form suite`, the folder of a collection of several robots."""
    episode: int = 0
    """Index of the episode in the dataset, from 0; of suite24-plus, the seed of the scenes."""
    mapping: Path | None = None
    """Mapping through which the dataset is read: pictures and values are those that the policy sees."""
    form: Literal["mp4", "sheet", "rerun", "suite"] = "mp4"
    """Form of the output.
    With `mp4`, a video; with `sheet`, a PNG with frames side by side.
    With `rerun`, a recording for the Rerun viewer (needs the extra `viewer`).
    With `suite`, a PNG with the first episode of every robot and task."""
    out: Path | None = None
    """File to write; by default in the working folder, named after robot and episode.
    For suite24-plus, the folder of the images; by default suite24-plus."""

    def run(self, command_line: Sequence[str]) -> None:
        console.print(f"wrote {self._write()}", soft_wrap=True)

    def _write(self) -> Path:
        if self.dataset == Path(PLUS):
            from blm.app.plus_sheets import write_plus_sheets

            return write_plus_sheets(self.out or Path(PLUS), self.episode)
        from blm.app.viewing import collection_sheet, contact_sheet, write_mp4, write_rerun
        from blm.datasets.lerobot import open_dataset
        from blm.datasets.mapping import read_mapping

        if self.form == "suite":
            return collection_sheet(self.dataset, self.out or Path("suite.png"))
        data = open_dataset(self.dataset, None if self.mapping is None else read_mapping(self.mapping))
        if not 0 <= self.episode < data.num_episodes:
            valid = f"valid are 0..{data.num_episodes - 1}"
            raise BlmError(f"episode {self.episode} is not in '{self.dataset}': {valid}")
        suffix = {"mp4": "mp4", "sheet": "png", "rerun": "rrd"}[self.form]
        path = self.out or Path(f"{data.space.robot}-{self.episode:05d}.{suffix}")
        episode = data.episode(self.episode)
        fps = round(data.space.rate_hz)
        if self.form == "sheet":
            return contact_sheet([episode], path, fps=fps)
        grippers = [place for place, kind in enumerate(data.space.state_kinds) if kind == "gripper"]
        if self.form == "mp4":
            return write_mp4(episode, path, fps=fps, gripper=grippers[0] if grippers else None)
        return write_rerun(episode, path, fps, data.space.names, data.space.state_names)
