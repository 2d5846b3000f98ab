"""What this machine can run, and what is wrong with a dataset or a checkpoint: each fault with its fix."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from blm.types import BlmError

MIN_FREE_GIB = 5.0
"""`make demo` writes less than 1 GiB beside an environment of about 3 GiB."""


@dataclass(frozen=True)
class Check:
    """One line of the report. `fix` is empty when all is well."""

    name: str
    found: str
    fix: str = ""


def examine_machine() -> Iterator[Check]:
    """Check Python, torch, GPU, MuJoCo, rendering and disk."""
    yield Check(
        "python", platform.python_version(), "" if sys.version_info >= (3, 11) else "install Python 3.11+"
    )
    yield from _torch()
    yield _mujoco()
    yield _rendering()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    fix = "" if free >= MIN_FREE_GIB else f"free some space: {MIN_FREE_GIB:.0f} GiB are needed here"
    yield Check("free disk", f"{free:.1f} GiB in {Path.cwd()}", fix)


def examine_path(path: Path) -> Check:
    """Open a dataset or a checkpoint the way training and serving do; a fault comes with its fix."""
    from blm.data.episodes import open_dataset
    from blm.policy.policy import CheckpointPolicy

    readers: dict[str, tuple[str, Callable[[Path], object]]] = {
        "dataset": ("meta/info.json", open_dataset),
        "checkpoint": ("manifest.json", CheckpointPolicy.load),
    }
    for kind, (marker, reader) in readers.items():
        if (path / marker).exists():
            try:
                reader(path)
            except BlmError as error:
                return Check(str(path), f"{kind}: damaged", str(error))
            return Check(str(path), f"{kind}: good")
    markers = " or ".join(marker for marker, _ in readers.values())
    return Check(str(path), "neither a dataset nor a checkpoint", f"name a folder that has {markers}")


def _torch() -> Iterator[Check]:
    import torch

    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
        fix = "pip uninstall torchvision: its CUDA build breaks transformers on CPU torch; blm needs none"
        yield Check("torchvision", version("torchvision"), fix)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield Check("gpu", ", ".join(gpus) or "none: everything runs on the CPU, large recipes need a GPU")


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
