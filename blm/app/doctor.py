"""Check this machine, datasets, collections and checkpoints. Each fault comes with a fix."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from blm.datasets.checks import (
    lfs_pointer_faults,
    picture_faults,
    shape_faults,
    unreadable_files,
    vector_faults,
    video_faults,
)
from blm.datasets.files import MANIFEST
from blm.datasets.lerobot import EpisodeDataset, load_dataset, verify_files
from blm.datasets.mapping import DataMapping
from blm.datasets.transforms import implausible_ranges
from blm.io import DamagedError, PointerError, abandoned_paths, read_json
from blm.robots import ROBOTS
from blm.seeds import reserved_seeds_warning
from blm.tasks.eef_env import control_of
from blm.types import BlmError

COLLECT_AGAIN = "run the same collect command again: it continues from there"
PROGRESS_FROM = 200
"""Minimum number of files or episodes for which a progress bar is shown."""
MIN_FREE_GIB = 5.0
"""Minimum free disk space [GiB]. `make demo` writes less than 1, its environment about 3."""


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` is empty if there is no fault."""

    name: str
    found: str
    fix: str = ""


def examine_machine() -> Iterator[Check]:
    """Check Python, torch, GPU, MuJoCo, rendering and free disk space."""
    yield Check(
        "python", platform.python_version(), "" if sys.version_info >= (3, 11) else "install Python 3.11+"
    )
    yield from _torch()
    yield _mujoco()
    yield _rendering()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    fix = "" if free >= MIN_FREE_GIB else f"free some space: {MIN_FREE_GIB:.0f} GiB are needed here"
    yield Check("free disk", f"{free:.1f} GiB in {Path.cwd()}", fix)


def examine_path(path: Path, mapping: DataMapping | None = None) -> Iterator[Check]:
    """Check a dataset, a collection (folder of datasets) or a checkpoint; yield each fault.

    A dataset of another program is read through `mapping`. Writes nothing and raises nothing:
    anything that cannot be examined is reported as a fault.
    """
    try:
        yield from _examine(path, mapping)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        found = f"cannot be examined ({type(error).__name__}: {reason[:200]})"
        yield Check(str(path), found, "make it readable, restore it from a copy, or name another folder")


def _with_progress(things: Sequence[Any], title: str) -> Iterable[Any]:
    """Show a progress bar for long checks, on stderr, so that the report stays clean."""
    if len(things) < PROGRESS_FROM:
        return things
    return track(things, f"checking {title}", console=Console(stderr=True), transient=True)


def _examine(path: Path, mapping: DataMapping | None) -> Iterator[Check]:
    from blm.policy.checkpoint import checkpoint_folder

    if (path / "meta/info.json").exists():
        yield from _dataset(path, mapping)
    elif (checkpoint_folder(path) / "manifest.json").exists():
        yield _checkpoint(path)
    elif (path / "collect.json").exists() or _datasets(path):
        yield from _collection(path)
    else:
        found = "neither a dataset nor a checkpoint" if path.is_dir() else "no such folder"
        found = "a file, not a folder" if path.is_file() else found
        markers = "meta/info.json, collect.json or manifest.json"
        yield Check(str(path), found, f"name a folder that has {markers}")


def _checkpoint(path: Path) -> Check:
    from blm.app.policies import load_checkpoint

    try:
        policy = load_checkpoint(path)
    except PointerError as error:
        return Check(str(path), f"checkpoint: {error.what}", error.fix)
    except BlmError as error:
        return Check(str(path), "checkpoint: damaged", str(error))
    tuning = getattr(policy, "tuning", None)
    note = f". Note: the backbone was {tuning.describe()}" if tuning is not None else ""
    return Check(str(path), f"checkpoint: no faults{note}")


def _collection(path: Path) -> Iterator[Check]:
    """Check each dataset of a collection, and name the datasets that an unfinished one lacks."""
    yield from _unfinished(path)
    folders = _datasets(path)
    if (path / "collect.json").exists():
        try:
            wanted = read_json(path / "collect.json")["robots"]
        except (BlmError, KeyError) as error:
            yield Check(str(path / "collect.json"), "damaged", f"restore it from a copy ({error})")
            wanted = ()
        for robot in wanted:
            if path / robot not in folders:
                yield Check(str(path / robot), "dataset: missing", COLLECT_AGAIN)
    for folder in folders:
        yield from _dataset(folder)


def _datasets(path: Path) -> list[Path]:
    """Return the folders of finished datasets below `path`; unfinished ones start with a dot."""
    return sorted(p.parent.parent for p in path.glob("[!.]*/meta/info.json"))


def _unfinished(path: Path) -> Iterator[Check]:
    if not (path / "summary.json").exists() and (path / "collect.json").exists():
        count = len(list((path / ".staging").glob("*/*/*/episode.json")))
        yield Check(str(path), f"unfinished collection with {count} finished episodes", COLLECT_AGAIN)
    elif (path / ".staging").exists():
        yield Check(
            str(path / ".staging"),
            "left over from a collection that was interrupted at its end",
            COLLECT_AGAIN,
        )


def _dataset(folder: Path, mapping: DataMapping | None = None) -> Iterator[Check]:
    """Yield every fault of one dataset, or one line that sums it up if it has none."""
    reported: set[str] = set()
    for error in _dataset_faults(folder, mapping):
        if str(error) not in reported:
            what, fix = (
                (error.what, error.fix) if isinstance(error, DamagedError) else ("refused", str(error))
            )
            yield Check(str(folder), f"dataset: {what}", fix)
        reported.add(str(error))
    if not reported:
        data = load_dataset(folder, mapping)
        known = "all files match the manifest" if data.manifest else "no manifest: written by another program"
        counts = f"{data.num_episodes} episodes, {data.num_frames} frames, {len(data.cameras)} cameras"
        note = f". Note: {reserved_seeds_warning('it', data.reserved_seeds)}" if data.reserved_seeds else ""
        if data.space.kind == "unknown":
            note += ". Note: kinds and units are unknown; --suggest writes a mapping, which training needs"
        yield Check(str(folder), f"dataset: good ({data.space.robot}: {counts}; {known}){note}")


def _dataset_faults(folder: Path, mapping: DataMapping | None) -> Iterator[BlmError]:
    for left in abandoned_paths(folder):
        yield DamagedError(f"'{left}' is left over from an interrupted run", COLLECT_AGAIN)
    if absent := [*lfs_pointer_faults(folder)]:
        yield from absent
        return  # missing files cannot be checked further
    try:
        has_manifest = (folder / MANIFEST).exists()
        yield from (
            verify_files(folder, _with_progress) if has_manifest else unreadable_files(folder, _with_progress)
        )
    except BlmError as error:
        yield error
        yield from unreadable_files(folder, _with_progress)
    try:
        data = load_dataset(folder, mapping)
    except BlmError as error:
        yield error
        return
    if "blm" in data.info and not data.manifest:
        yield DamagedError(f"'{folder / MANIFEST}' is missing")
    yield from vector_faults(data, every=True)
    yield from video_faults(data, every=True)
    shapes = [(data.num_frames, size) for size in (data.space.state_dim, data.space.dim)]
    yield from shape_faults(data)
    if data.num_frames and [data.states.shape, data.actions.shape] == shapes:
        yield from _range_faults(data)
        yield from picture_faults(data, _with_progress)
    if "blm" in data.info and data.space.robot in ROBOTS:
        try:
            control_of(data.space.robot, data.space, f"dataset '{folder}'")
        except BlmError as error:
            yield DamagedError(
                str(error), "collect it again with this version, or use the version that wrote it"
            )


def _range_faults(data: EpisodeDataset) -> Iterator[BlmError]:
    """Yield implausible ranges of values, and joints that never move."""
    for what in implausible_ranges(data.space, data.states, data.actions):
        yield DamagedError(what, "convert the dataset, or correct the units of its action space")
    still = np.ptp(data.actions, axis=0) == 0
    for name, kind, unmoved in zip(data.space.names, data.space.dimension_kinds, still, strict=True):
        if unmoved and kind in ("absolute_joint_position", "unknown"):
            yield DamagedError(
                f"{name} has the same target in all frames", "check the recording, or leave the episode out"
            )


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
        fix = "pip uninstall torchvision: its CUDA build breaks transformers on CPU torch; blm needs none"
        yield Check("torchvision", version("torchvision"), fix)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("gpu", ", ".join(gpus) or "none: everything runs on the CPU; large recipes need a GPU")


def _mujoco() -> Check:
    found = version("mujoco")
    fix = "pip install 'mujoco>=3.17,!=4.0.0': 4.0.0 has a wrong Newton Hessian for sparse Jacobians"
    return Check("mujoco", found, fix if found == "4.0.0" else "")


def _rendering() -> Check:
    from blm.tasks.rendering import gl_backend

    try:
        return Check("rendering", gl_backend())
    except BlmError as error:
        return Check("rendering", "does not work", str(error))
